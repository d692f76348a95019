"""From what a session has recorded to one row of the training: checked, never trimmed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from learner.rollouts.completions import AllowedVersion, broken_response, check_spans
from shared.rollouts import Completion, Logprobs, VersionSpan
from shared.sessions import SessionRecord, Trajectory

#: Where a trajectory begins in its episode's `token_ids`, and how many tokens from there are its prompt.
Part = tuple[int, int]


class Episode(Completion):
    """What one run of an agent leaves for the training: all its trajectories, one after the other.

    The first trajectory continues `prompt_ids`; each of the others is a sequence of its own, which sees nothing of
    those before it (`learner.trainer.forks` computes it so). So the loss sees one row for each episode, with every
    token that it sampled.

    Attributes:
        token_ids: [T]; `logprobs` and `log_kept_mass` [T] are 0 where nothing was sampled.
        spans: versions of the sampled tokens; positions count sampled tokens.
        prompt_ids: what the first call was asked, [P].
        mask: [T], 1 where a token was sampled: only these are trained on.
        parts: of the trajectories after the first.
        last: where the trajectory that ends with the episode's last call begins and ends in `token_ids`.
        reward: the agent's; None: reward functions score the conversation.
        calls, repaired: as in `SessionRecord`.
        failure: why it is left out of its group; None: it is not.
    """

    prompt_ids: list[int]
    mask: list[int]
    parts: list[Part] = Field([])
    last: tuple[int, int]
    reward: float | None = None
    calls: int = 0
    repaired: int = 0
    failure: str | None = None

    @property
    def trajectories(self) -> int:
        """How many sequences it is trained as."""
        return 0 if self.failure else 1 + len(self.parts)

    def turns(self) -> Iterator[tuple[bool, list[int]]]:
        """Return the trajectory of the last call after its prompt: runs of tokens, and whether they were sampled."""
        begins = [0, *(start for start, _ in self.parts)]
        return self.conversations()[begins.index(self.last[0])]

    def conversations(self) -> list[Iterator[tuple[bool, list[int]]]]:
        """Return all trajectories, each as `turns`."""
        parts = [(0, 0), *self.parts]
        ends = [*(start for start, _ in self.parts), len(self.token_ids)]
        return [self._turns(start + prompt, end) for (start, prompt), end in zip(parts, ends, strict=True)]

    def _turns(self, start: int, end: int) -> Iterator[tuple[bool, list[int]]]:
        while start < end:
            stop = next((i for i in range(start, end) if self.mask[i] != self.mask[start]), end)
            yield bool(self.mask[start]), self.token_ids[start:stop]
            start = stop


def check_trajectory(trajectory: Trajectory, allowed: AllowedVersion) -> None:
    """Check that ids, sampled ranges, logprobs and spans fit together, and that the weights are allowed.

    Raises:
        LockstepError: `protocol_mismatch` for a broken record, `version_not_active` for tokens of another version.
    """
    position = 0
    for start, end in trajectory.sampled:
        if not max(position, 1) <= start < end <= len(trajectory.token_ids):
            raise broken_response(
                f"sampled tokens [{start}, {end}) of a trajectory of {len(trajectory.token_ids)} are empty, overlap "
                "others, or follow no prompt"
            )
        position = end
    length = sum(end - start for start, end in trajectory.sampled)
    for name, values in (("logprobs", trajectory.logprobs), ("log_kept_mass", trajectory.log_kept_mass)):
        if values is not None and len(values) != length:
            raise broken_response(f"{len(values)} {name} for {length} sampled tokens of a trajectory")
    if any(token < 0 for token in trajectory.token_ids):
        raise broken_response("a trajectory holds a token id below 0")
    if len(trajectory.finish_reasons) != len(trajectory.calls):
        raise broken_response(f"{len(trajectory.finish_reasons)} finish reasons for {len(trajectory.calls)} calls")
    if "abort" in trajectory.finish_reasons:
        raise broken_response("a trajectory holds a call that ended with 'abort'")
    check_spans(trajectory.spans, length, allowed)


def episode_of(record: SessionRecord, allowed: AllowedVersion, reward: float | None) -> Episode | None:
    """Return the episode that a session has recorded; None if nothing was sampled.

    Raises:
        LockstepError: as `check_trajectory`.
    """
    for trajectory in record.trajectories:
        check_trajectory(trajectory, allowed)
    trajectories = [trajectory for trajectory in record.trajectories if trajectory.sampled]
    if not trajectories:
        return None
    first, *forks = trajectories
    begin = first.sampled[0][0]
    row = _MergedRow()
    row.add(first, begin)
    parts = [row.add(fork, 0) for fork in forks]
    ends = [*(start for start, _ in parts), len(row.token_ids)]
    latest = max(range(len(trajectories)), key=lambda i: max(trajectories[i].calls, default=-1))
    return Episode(
        token_ids=row.token_ids,
        logprobs=row.logprobs,
        log_kept_mass=row.kept if all(t.log_kept_mass is not None for t in trajectories) else None,
        finish_reason="length" if trajectories[latest].finish_reasons[-1:] == ["length"] else "stop",
        spans=row.spans,
        prompt_ids=first.token_ids[:begin],
        mask=row.mask,
        parts=parts,
        last=(parts[latest - 1][0] if latest else 0, ends[latest]),
        reward=reward,
        calls=record.calls,
        repaired=record.repaired,
    )


def left_out(prompt_ids: list[int], token: int, allowed: AllowedVersion, failure: str) -> Episode:
    """Return an episode of which nothing is trained on; `token` fills its row."""
    return Episode(
        token_ids=[token],
        logprobs=[0.0],
        log_kept_mass=[0.0],
        finish_reason="stop",
        spans=[VersionSpan(version=allowed.version, start=0, end=0)],
        prompt_ids=prompt_ids,
        mask=[0],
        last=(0, 1),
        failure=failure,
    )


class _MergedRow:
    """Trajectories one after the other."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: Logprobs = []
        self.kept: Logprobs = []
        self.spans: list[VersionSpan] = []

    def add(self, trajectory: Trajectory, begin: int) -> Part:
        """Add the tokens from `begin` on; return where they lie."""
        at, sampled = len(self.token_ids), self._sampled()
        self.token_ids += trajectory.token_ids[begin:]
        mask = [0] * len(trajectory.token_ids)
        for start, end in trajectory.sampled:
            mask[start:end] = [1] * (end - start)
        self.mask += mask[begin:]
        self.logprobs += _spread(trajectory.logprobs, mask[begin:])
        self.kept += _spread(trajectory.log_kept_mass or [0.0] * sum(mask), mask[begin:])
        for span in trajectory.spans:
            last = self.spans[-1] if self.spans else None
            if last and (last.version, last.kv) == (span.version, span.kv):
                self.spans[-1] = last.model_copy(update={"end": span.end + sampled})
            else:
                moved = {"start": span.start + sampled, "end": span.end + sampled}
                self.spans.append(span.model_copy(update=moved))
        return at, trajectory.sampled[0][0]

    def _sampled(self) -> int:
        return self.spans[-1].end if self.spans else 0


def _spread(values: Sequence[float | None], mask: Sequence[int]) -> list[float | None]:
    """Return the values at the places of `mask` that are 1, and 0 elsewhere."""
    coming = iter(values)
    return [next(coming) if sampled else 0.0 for sampled in mask]
