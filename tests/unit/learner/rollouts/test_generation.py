"""Grouping of rows into requests, and the validation of completions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from learner.rollouts.completions import AllowedVersion, check_completion
from learner.rollouts.dispatch import Dispatcher
from learner.rollouts.generation import RemoteRollouts
from learner.servers.pool import ServerPool
from shared.errors import LockstepError, NotFinite
from shared.rollouts import Completion, RolloutGroup, VersionSpan
from shared.sampling import SamplingParams
from shared.weights import ServerState, WeightVersion

VERSION = WeightVersion(run_id="r", step=3)


def completion(*tokens, version=VERSION, **changes):
    spans = [VersionSpan(version=version, start=0, end=len(tokens))]
    values = {
        "token_ids": list(tokens),
        "logprobs": [-0.5] * len(tokens),
        "finish_reason": "stop",
        "spans": spans,
    }
    return Completion(**{**values, **changes})


class Server:
    """Numbers its completions: token 100 * first prompt token + index."""

    def __init__(self, url="http://fake"):
        self.requests, self.url = [], url

    def iter_groups(self, request):
        self.requests.append(request)
        for i, prompt in reversed(list(enumerate(request.prompts))):
            made = [completion(100 * prompt.token_ids[0] + k, log_kept_mass=[0.0]) for k in range(request.sampling.n)]
            yield RolloutGroup(prompt_index=i, prompt_token_ids=prompt.token_ids, completions=made)


def rollouts(server, sampling=SamplingParams(max_tokens=10), **changes):  # noqa: B008
    trainer = SimpleNamespace(is_training=True, generation_batch=0)
    training = SimpleNamespace(
        allowed_version=lambda ahead: AllowedVersion(VERSION),
        seed_of=lambda row, token_ids: None,
    )
    dispatcher = Dispatcher(ServerPool.of(server, ServerState.model_construct()), sampling, max_model_len=50, **changes)  # type: ignore[call-arg]
    return RemoteRollouts(dispatcher, trainer, training)


def test_equal_neighbours_share_a_request():
    server = Server()
    prompts, ids, logprobs, tokens = rollouts(server).generate([[1], [1], [2], [2]], None, 2)
    assert len(server.requests) == 1
    assert server.requests[0].sampling.n == 2
    assert server.requests[0].policy == VERSION
    assert ids == [[100], [101], [200], [201]]
    assert prompts == [[1], [1], [2], [2]]
    assert logprobs == [[[-0.5]]] * 4
    assert tokens[3] == [[201]]


def test_rows_keep_their_order_when_groups_differ():
    server = Server()
    _, ids, _, _ = rollouts(server).generate([[1], [2], [2], [3], [2]], None, 1)
    assert ids == [[100], [200], [201], [300], [200]]
    assert sorted(r.sampling.n for r in server.requests) == [1, 2]


class Silent(Server):
    """Has no finite logprob for so many of the tokens it samples next; completions have 1,000."""

    def __init__(self, missing: int, mass: float | None = -0.25) -> None:
        super().__init__()
        self.missing, self.mass = missing, mass

    def iter_groups(self, request):
        for group in super().iter_groups(request):
            for made in group.completions:
                now, self.missing = min(self.missing, 1000), max(self.missing - 1000, 0)
                values = [math.nan, math.inf, -math.inf, None] * 250
                made.token_ids, made.spans[0].end = [7] * 1000, 1000
                made.logprobs = [*values[:now], *[-0.5] * (1000 - now)]
                made.log_kept_mass = [self.mass] * 1000
            yield RolloutGroup.model_validate_json(group.model_dump_json())  # as it crosses the wire


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}])
def test_a_token_without_a_finite_logprob_is_carried_and_counted(sampling, caplog):
    remote = rollouts(Silent(1, mass=-0.25 if sampling else 0.0), SamplingParams(max_tokens=1000, **sampling))
    _, _, logprobs, _ = remote.generate([[1], [2]], None, 1)
    values = [logprob for row in logprobs for (logprob,) in row]
    assert sum(map(math.isnan, values)) == remote.stats.unscored_tokens == 1
    assert {value for value in values if not math.isnan(value)} == {-0.75 if sampling else -0.5}
    remote.generate([[1], [2]], None, 1)
    assert caplog.text.count("no finite logprob") == 1


def test_a_kept_mass_that_is_not_finite_leaves_no_logprob():
    remote = rollouts(Silent(0, mass=None), SamplingParams(max_tokens=1000, top_p=0.9))
    with pytest.raises(LockstepError, match=r"1000 of 1000 sampled tokens.*--dtype bfloat16"):
        remote.generate([[1]], None, 1)


@pytest.mark.parametrize(
    ("missing", "batches", "refused_at"),
    [(2, [3], None), (4, [3], 0), (1000, [9], 0), (4, [1, 3], 0), (1, [1, 1], None)],
)
def test_more_than_one_in_a_thousand_is_refused(missing, batches, refused_at):
    remote, refused = rollouts(Silent(missing), SamplingParams(max_tokens=1000)), None
    for number, size in enumerate(batches):
        try:
            remote.generate([[row] for row in range(1, size + 1)], None, 1)
        except NotFinite:
            refused = number
            break
    assert refused == refused_at


def test_one_broken_token_in_each_small_batch_is_refused_in_the_end():
    server = Silent(1)
    remote = rollouts(server, SamplingParams(max_tokens=1000))
    remote.stats.sampled_tokens = -900  # so the first batch has had 100 tokens
    remote.generate([[1]], None, 1)
    server.missing = 1
    with pytest.raises(NotFinite, match="2 of 1100"):
        remote.generate([[1]], None, 1)


def test_long_prompts_are_capped_and_counted(caplog):
    server = Server()
    remote = rollouts(server)
    remote.generate([[1] * 45, [2] * 46, [3]], None, 1)
    assert sorted(r.sampling.max_tokens for r in server.requests) == [4, 5, 10]
    assert remote.dispatcher.capped_prompts == 2
    assert len(caplog.messages) == 1
    with pytest.raises(LockstepError, match="no room"):
        remote.generate([[1] * 50], None, 1)


def test_seed_differs_between_ranks():
    server = Server()
    remote = rollouts(server, sampling=SamplingParams(seed=7), rank=1)
    remote.generate([[1]], None, 1)
    assert server.requests[0].sampling.seed == 7 + 2**32


def test_later_turns_of_rows_with_one_history_differ():
    """Not with one fixed seed for all of them; and a row whose history fills the context ends there."""
    server = Server()
    remote = rollouts(server, sampling=SamplingParams(seed=7, top_p=0.5))
    with remote.tool_loop():
        _, ids, logprobs, _ = remote.generate([[1], [2] * 50, [2], [1]], None, 1)
    assert {p.seed for r in server.requests for p in r.prompts} == {7, 8, 9}
    assert ids == [[100], [], [200], [100]]
    assert logprobs[1] == []
    assert remote.dispatcher.capped_prompts == 1
    assert remote.stats.completions == 0
    assert remote.stats.completion_tokens == 3


def test_greedy_groups_are_refused():
    remote = rollouts(Server(), sampling=SamplingParams(temperature=0.0))
    with pytest.raises(ValueError, match="temperature=0"):
        remote.generate([[1], [1]], None, 2)


def test_what_is_no_image_is_refused():
    with pytest.raises(LockstepError, match="is a str, not a PIL image"):
        rollouts(Server()).generate([[1]], [["image"]], 1)


OTHER = WeightVersion(run_id="r", step=2)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (completion(), "0 tokens"),
        (completion(1, finish_reason="abort"), "abort"),
        (completion(1, 2, logprobs=[-0.1]), "1 logprobs for 2"),
        (completion(1, version=OTHER), "r@0.2"),
        (completion(1, version=None), "the base"),
        (completion(1, spans=[VersionSpan(version=VERSION, start=0, end=1, kv="carried")]), "carried"),
        (completion(1, 2, spans=[VersionSpan(version=VERSION, start=0, end=1)]), "cover 1 of 2"),
        (completion(1, 2, spans=[VersionSpan(version=VERSION, start=1, end=2)]), "gap"),
        (completion(1, spans=[]), "cover 0"),
    ],
)
def test_broken_completions(bad, word):
    with pytest.raises(LockstepError, match=word):
        check_completion(bad, AllowedVersion(VERSION))


def test_groups_must_answer_the_prompts():
    server = SimpleNamespace(url="http://fake", iter_groups=lambda request: iter(()))
    with pytest.raises(LockstepError, match="requested 1 groups"):
        rollouts(server).generate([[1]], None, 1)
