"""What a session has recorded becomes one row, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from learner.agents.trajectories import Episode, episode_of, left_out
from learner.rollouts.completions import AllowedVersion, oldest_step, policy_logprobs, sampled_length
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import VersionSpan
from shared.sampling import SamplingParams
from shared.sessions import SessionRecord, Trajectory
from shared.weights import WeightVersion

V = [WeightVersion(run_id="r", step=step) for step in range(4)]
ALLOWED = AllowedVersion(V[1])
FOLLOWS = AllowedVersion(V[1], exact=False)


def trajectory(**changes: Any) -> Trajectory:
    """Two calls: [1 2] -> [3 4], then [1 2 3 4 5] -> [6]."""
    fields = {
        "token_ids": [1, 2, 3, 4, 5, 6],
        "sampled": [(2, 4), (5, 6)],
        "logprobs": [-0.3, -0.4, -0.6],
        "spans": [VersionSpan(version=V[1], start=0, end=2), VersionSpan(version=V[1], start=2, end=3)],
        "calls": [0, 1],
        "finish_reasons": ["stop", "length"],
    }
    return Trajectory.model_validate({**fields, **changes})


def fork(**changes: Any) -> Trajectory:
    """A third call, which goes on from the first one in another way: [1 2 3 4 9] -> [8 8]."""
    fields = {"token_ids": [1, 2, 3, 4, 9, 8, 8], "sampled": [(5, 7)], "logprobs": [-0.8, -0.9], "calls": [2]}
    spans = [VersionSpan(version=V[1], start=0, end=2)]
    return trajectory(**{**fields, "spans": spans, "finish_reasons": ["stop"], **changes})


def record(*trajectories: Trajectory, **changes: Any) -> SessionRecord:
    counts = {"calls": 2, "running": 0, "cut": 0, "repaired": 1}
    fields = {"session_id": "s", "run_id": "r", "ended": None, "reward": None, "metadata": {}}
    return SessionRecord(**{**fields, **counts, "trajectories": list(trajectories), **changes})


def episode(*trajectories: Trajectory, allowed: AllowedVersion = ALLOWED) -> Episode:
    made = episode_of(record(*trajectories), allowed, 1.0)
    assert made is not None
    return made


def test_a_conversation_becomes_prompt_and_masked_completion():
    made = episode(trajectory())
    assert made.prompt_ids == [1, 2]
    assert made.token_ids == [3, 4, 5, 6]
    assert made.mask == [1, 1, 0, 1]
    assert made.logprobs == [-0.3, -0.4, 0.0, -0.6]
    assert made.parts == []
    assert sampled_length(made) == 3
    assert list(made.turns()) == [(True, [3, 4]), (False, [5]), (True, [6])]
    assert (made.reward, made.repaired, made.trajectories) == (1.0, 1, 1)


def test_a_fork_follows_with_its_prompt_masked():
    made = episode(trajectory(), fork())
    assert made.token_ids == [3, 4, 5, 6, 1, 2, 3, 4, 9, 8, 8]
    assert made.mask == [1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    assert made.parts == [(4, 5)]
    assert sum(made.mask) == sampled_length(made) == 5
    assert [(span.start, span.end) for span in made.spans] == [(0, 5)], "neighbors of one version are one"
    assert list(made.turns()) == [(True, [8, 8])], "the last call's, after its prompt"
    assert made.trajectories == 2
    both = [[(True, [3, 4]), (False, [5]), (True, [6])], [(True, [8, 8])]]
    assert [list(turns) for turns in made.conversations()] == both


def test_the_conversation_is_that_of_the_last_call():
    made = episode(trajectory(calls=[0, 3]), fork())
    assert list(made.turns()) == [(True, [3, 4]), (False, [5]), (True, [6])]


def test_a_trajectory_of_which_nothing_was_sampled_is_none():
    empty = fork(sampled=[], logprobs=[], spans=[], calls=[], finish_reasons=[])
    assert episode(trajectory(), empty).token_ids == [3, 4, 5, 6]
    assert episode_of(record(empty), ALLOWED, 1.0) is None
    assert episode_of(record(), ALLOWED, 1.0) is None


def test_logprobs_before_truncation_are_those_of_sampled_tokens():
    made = episode(trajectory(log_kept_mass=[-0.1, -0.1, -0.1]))
    assert policy_logprobs(made, SamplingParams(top_k=2)) == pytest.approx([-0.4, -0.5, 0.0, -0.7])
    with pytest.raises(LockstepError, match="how much probability"):
        policy_logprobs(episode(trajectory(log_kept_mass=[-0.1] * 3), fork()), SamplingParams(top_k=2))


def test_it_is_as_old_as_its_oldest_token():
    spans = [VersionSpan(version=V[3], start=0, end=2), VersionSpan(version=V[2], start=2, end=3)]
    made = episode(trajectory(spans=spans), fork(), allowed=FOLLOWS)
    assert oldest_step(made) == 1
    assert [(span.version.step, span.start, span.end) for span in made.spans] == [(3, 0, 2), (2, 2, 3), (1, 3, 5)]
    assert oldest_step(episode(trajectory(spans=spans), allowed=FOLLOWS)) == 2
    assert oldest_step(left_out([1], 0, ALLOWED, "failed")) == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"logprobs": [-0.3, -0.4]}, "2 logprobs for 3"),
        ({"log_kept_mass": [-0.3]}, "1 log_kept_mass for 3"),
        ({"sampled": [(2, 4), (3, 4)]}, "overlap"),
        ({"sampled": [(5, 6), (2, 4)]}, "overlap"),
        ({"sampled": [(0, 2), (5, 6)]}, "follow no prompt"),
        ({"sampled": [(2, 4), (6, 7)]}, "of a trajectory of 6"),
        ({"sampled": [(2, 2), (3, 6)]}, "empty"),
        ({"spans": [VersionSpan(version=V[1], start=0, end=2)]}, "cover 2 of 3"),
        ({"spans": [VersionSpan(version=V[1], start=1, end=3)]}, "gap"),
        ({"finish_reasons": ["stop"]}, "1 finish reasons for 2 calls"),
        ({"finish_reasons": ["stop", "abort"]}, "abort"),
        ({"token_ids": [1, 2, -3, 4, 5, 6]}, "below 0"),
    ],
)
def test_a_broken_record_is_refused(changes, match):
    for trajectories in ([trajectory(**changes)], [fork(), trajectory(**changes)]):
        with pytest.raises(LockstepError, match=match) as caught:
            episode_of(record(*trajectories), ALLOWED, None)
        assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH


def test_weights_that_are_not_allowed_are_refused():
    with pytest.raises(LockstepError) as caught:
        episode_of(record(trajectory()), AllowedVersion(V[2]), None)
    assert caught.value.code is ErrorCode.VERSION_NOT_ACTIVE
    other = WeightVersion(run_id="other", step=1)
    with pytest.raises(LockstepError):
        episode_of(record(fork(spans=[VersionSpan(version=other, start=0, end=2)])), FOLLOWS, None)


def test_a_left_out_row_trains_on_nothing():
    out = left_out([1, 2], 7, ALLOWED, "it crashed")
    assert out.mask == [0]
    assert sampled_length(out) == 0
    assert out.trajectories == 0
    assert policy_logprobs(out, SamplingParams(top_k=2)) == [0.0]
