"""`in_flight` = `keep` and `carried`: running requests go on with the new version, and every token says its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from learner.client import RolloutClient
from shared.weights import WeightVersion
from tests.integration import policy as P
from tests.integration.server import ServerProcess
from tests.integration.waiting import outlives, until, with_enough_load

PROBE = list(range(5, 40))
FP32 = 1e-4
TOKENS = 900


@pytest.fixture(scope="module")
def policies(model: Path) -> list:
    policies = [P.make_policy(model) for _ in range(4)]
    for seed, policy in enumerate(policies):
        P.randomize(policy, seed=300 + seed)
    return policies


@pytest.fixture
def lived_through(client: RolloutClient, server: ServerProcess, policies, request) -> P.GenerateResponse:
    """Completions that were under way during three pushes."""
    base = client.state().base.weights

    def push_three_times(n: int) -> P.GenerateResponse:
        run_id = f"moved-{request.param}-{n}"
        versions = [WeightVersion(run_id=run_id, fence=0, step=step) for step in range(4)]
        blobs = [P.blob(policy, version, base) for policy, version in zip(policies, versions, strict=True)]
        client.push(run_id, [blobs[0]], P.LEASE, takeover=True)
        prompts, later = [[i, *PROBE] for i in range(10, 13)], {}
        with ThreadPoolExecutor() as pool, RolloutClient(server.url) as other:
            running = pool.submit(P.generate, other, prompts, n=n, max_tokens=TOKENS, ignore_eos=True)
            until(lambda: client.run(run_id).running_requests > 0, running=running)
            for step in (1, 2, 3):
                P.generate(client, [PROBE], max_tokens=10, ignore_eos=True)  # the others decode about as far meanwhile
                receipt = client.push(run_id, [blobs[step]], P.LEASE, in_flight=request.param)
                outlives(receipt.pause_seconds > 0)  # else nothing was decoding any more, whatever is on its way to us
                later[step] = P.generate(client, [PROBE], max_tokens=4)
            outlives(client.run(run_id).running_requests)
            answer = running.result()
        outlives(all(len(completion.spans) == 4 for group in answer.groups for completion in group.completions))
        for step, afterwards in later.items():
            assert P.largest_gap(policies[step], afterwards) < FP32
        until(lambda: sorted(slot["state"] for slot in client.run(run_id).slots) == ["active", "free"])
        return answer

    return with_enough_load(push_three_times, (8, 16, 21))  # of 3 prompts: all must be decoding at once


def _gaps(answer: P.GenerateResponse, policies: list) -> list[float]:
    """For every span the largest gap to a recomputation by the model of its version."""
    gaps = []
    for group in answer.groups:
        for completion in group.completions:
            starts = [span.start for span in completion.spans] + [len(completion.token_ids)]
            assert starts[0] == 0 and [span.end for span in completion.spans] == starts[1:]
            assert len(completion.token_ids) == TOKENS
            whole = group.prompt_token_ids + completion.token_ids
            for span in completion.spans:
                expected = P.reference(policies[span.version.step], whole)[len(group.prompt_token_ids) - 1 :]
                part = slice(span.start, span.end)
                gaps.append((torch.tensor(completion.logprobs)[part] - expected[part]).abs().max().item())
    return gaps


@pytest.mark.parametrize("lived_through", ["keep"], indirect=True)
def test_keep_every_token_is_of_the_version_its_span_names(lived_through, policies) -> None:
    for group in lived_through.groups:
        for completion in group.completions:
            assert [span.version.step for span in completion.spans] == [0, 1, 2, 3]
            assert {span.kv for span in completion.spans} == {"fresh"}
    gaps = _gaps(lived_through, policies)
    assert max(gaps) < FP32, gaps


@pytest.mark.parametrize("lived_through", ["carried"], indirect=True)
def test_carried_spans_say_so(lived_through, policies) -> None:
    for group in lived_through.groups:
        for completion in group.completions:
            assert [(span.version.step, span.kv) for span in completion.spans] == [
                (0, "fresh"), (1, "carried"), (2, "carried"), (3, "carried"),
            ]  # fmt: skip
    gaps = _gaps(lived_through, policies)
    assert min(gaps[1::4]) > FP32, "the old KV must have been kept"
    assert max(gaps[0::4]) < FP32
