"""Requests that run across pushes, with `in_flight` = `keep` and `carried`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from operator import ge

import torch
from peft import PeftModel

from learner.servers.client import RolloutClient
from shared.weights import PushReceipt, WeightVersion
from tests.integration.support import policy as P
from tests.integration.support.policy import FP32, PROBE
from tests.integration.support.server import ServerProcess
from tests.integration.support.waiting import LOADS, Load, outlives, until, with_enough_load


def generate_across_pushes(
    client: RolloutClient,
    server: ServerProcess,
    policies: Sequence[PeftModel],
    in_flight: str,
    prompts: int = 3,
    after_push: Callable[[PushReceipt], object] = lambda receipt: None,
) -> P.GenerateResponse:
    """Return completions that were being generated while all but the first of `policies` were pushed.

    Args:
        after_push: called after each of these pushes.
    """
    base = client.state().base.weights
    attempts = count()

    def push_during_generation(load: Load) -> P.GenerateResponse:
        n, tokens = load
        run_id = f"moved-{in_flight}-{next(attempts)}"
        versions = [WeightVersion(run_id=run_id, fence=0, step=step) for step in range(len(policies))]
        blobs = [P.blob(policy, version, base) for policy, version in zip(policies, versions, strict=True)]
        client.push(run_id, [blobs[0]], P.LEASE, takeover=True)
        asked = [[i, *PROBE] for i in range(10, 10 + prompts)]
        with ThreadPoolExecutor() as pool, RolloutClient(server.url, server.token) as other:
            decoded = server.metrics("vllm:generation_tokens_total")
            running = pool.submit(P.generate, other, asked, n=n, max_tokens=tokens, ignore_eos=True)
            for blob in blobs[1:]:
                # Wait for tokens of every request: refilling all their KV takes the engine fewer steps than this.
                enough = [so_far + 40 * prompts * n / len(decoded) for so_far in decoded]

                def decoded_enough(enough: list[float] = enough) -> bool:
                    return all(map(ge, server.metrics("vllm:generation_tokens_total"), enough))

                until(decoded_enough, running=running)
                after_push(client.push(run_id, [blob], P.LEASE, in_flight=in_flight))
                decoded = server.metrics("vllm:generation_tokens_total")
            answer = running.result()
        completions = [completion for group in answer.groups for completion in group.completions]
        outlives(all(len(completion.spans) == len(policies) for completion in completions))
        assert {len(completion.token_ids) for completion in completions} == {tokens}
        until(lambda: all(slot["state"] in ("active", "free") for slot in client.run(run_id).slots))
        return answer

    # Not above 21 of 3 prompts: all must be decoding at once. A machine that stalled for a second gets another chance.
    return with_enough_load(push_during_generation, [*LOADS[:3], *[Load(21, 900)] * 3])


def check_every_span(answer: P.GenerateResponse, policies: Sequence[PeftModel], in_flight: str) -> None:
    """Check that every token has the version of its span, and KV of an older version only in `carried` spans."""
    for group in answer.groups:
        for completion in group.completions:
            spans = completion.spans
            assert [span.start for span in spans] == [0] + [span.end for span in spans[:-1]]
            assert spans[-1].end == len(completion.token_ids) == len(completion.logprobs)
            assert [span.version.step for span in spans] == list(range(len(policies)))
            later = "carried" if in_flight == "carried" else "fresh"
            assert [span.kv for span in spans] == ["fresh"] + [later] * (len(spans) - 1)
            sequence = group.prompt_token_ids + completion.token_ids
            for span in spans:
                expected = P.reference(policies[span.version.step], sequence)[len(group.prompt_token_ids) - 1 :]
                part = slice(span.start, span.end)
                gap = (torch.tensor(completion.logprobs)[part] - expected[part]).abs().max().item()
                assert (gap < FP32) == (span.kv == "fresh"), (span, gap)
