"""Calls of a conversation as trajectories: joined where a prompt begins with all tokens so far, else apart.

Pure bookkeeping of token ids: those that the engine was asked and answered; nothing is tokenized again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from shared.rollouts import VersionSpan
from shared.sessions import Trajectory

#: What a tokenizer gives for bytes that are no text: equal text may then be made of other bytes.
_NO_TEXT = "\ufffd"
#: Tokens before the first difference that are decoded with it: a character may be made of four.
_CONTEXT = 4
#: Tokens behind the first difference that are decoded first, and by how many times more each time after that.
_GLANCE, _WIDER = 32, 8
#: Trajectories that are compared as text, those that agree longest first.
_COMPARED = 4


@dataclass(frozen=True)
class Choice:
    """One completion of a call; `log_kept_mass` is None where it is unknown, or nothing was cut."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    log_kept_mass: Sequence[float] | None
    spans: Sequence[VersionSpan]
    finish_reason: str


@dataclass(frozen=True)
class _Rendered:
    """A prompt that was built on recorded ids, as the template rendered it: its length, a digest, and its last token.

    `recorded` is how many tokens it was built to.
    """

    length: int
    digest: bytes
    last: int
    recorded: int

    @classmethod
    def of(cls, asked: array[int], prompt: array[int]) -> _Rendered | None:
        return None if asked == prompt else cls(len(asked), _digest(asked), asked[-1], len(prompt))

    def begins(self, asked: array[int]) -> bool:
        """Return whether `asked` begins with all tokens of it."""
        if self.length > len(asked) or asked[self.length - 1] != self.last:
            return False
        return _digest(asked[: self.length]) == self.digest


@dataclass
class Branch:
    """A trajectory that may go on; fields as in `Trajectory`. `rendered`: of its last call."""

    token_ids: array[int] = field(default_factory=lambda: array("I"))
    sampled: list[tuple[int, int]] = field(default_factory=list)
    logprobs: array[float] = field(default_factory=lambda: array("d"))
    log_kept_mass: array[float] | None = field(default_factory=lambda: array("d"))
    spans: list[VersionSpan] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    rendered: _Rendered | None = None

    def begins(self, prompt: array[int]) -> bool:
        """Return whether `prompt` begins with all tokens of this trajectory."""
        length = len(self.token_ids)
        if length > len(prompt) or (length and prompt[length - 1] != self.token_ids[-1]):
            return False
        return prompt[:length] == self.token_ids

    def asked_alike(self, prompt: array[int]) -> bool:
        """Return whether `prompt` begins as its first one; the last tokens may have been joined with sampled ones."""
        length = max(self.sampled[0][0] - _CONTEXT, 1) if self.sampled else len(self.token_ids)
        if length > len(prompt) or prompt[length - 1] != self.token_ids[length - 1]:
            return False
        return prompt[:length] == self.token_ids[:length]

    def go_on(self, call: int, prompt: array[int], choice: Choice) -> None:
        """Append a call whose prompt begins with all tokens so far."""
        self.token_ids.extend(prompt[len(self.token_ids) :])
        start, before = len(self.token_ids), len(self.logprobs)
        self.token_ids.extend(choice.token_ids)
        if choice.token_ids:
            self.sampled.append((start, len(self.token_ids)))
        self.logprobs.extend(choice.logprobs)
        if choice.log_kept_mass is None:
            self.log_kept_mass = None
        elif self.log_kept_mass is not None:
            self.log_kept_mass.extend(choice.log_kept_mass)
        for span in choice.spans:
            self._append(span.model_copy(update={"start": span.start + before, "end": span.end + before}))
        self.calls.append(call)
        self.finish_reasons.append(choice.finish_reason)

    def _append(self, span: VersionSpan) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.version, last.kv) == (span.version, span.kv):
            self.spans[-1] = last.model_copy(update={"end": span.end})
        else:
            self.spans.append(span)

    def copy(self) -> Branch:
        """Return what later calls do not change."""
        return Branch(
            self.token_ids[:],
            list(self.sampled),
            self.logprobs[:],
            None if self.log_kept_mass is None else self.log_kept_mass[:],
            list(self.spans),
            list(self.calls),
            list(self.finish_reasons),
        )

    def trajectory(self, *, truncated: bool) -> Trajectory:
        """Return it as it crosses the wire. `truncated`: the trainer's sampling cuts the distribution."""
        return Trajectory(
            token_ids=self.token_ids.tolist(),
            sampled=self.sampled,
            logprobs=self.logprobs.tolist(),
            log_kept_mass=None if self.log_kept_mass is None or not truncated else self.log_kept_mass.tolist(),
            spans=self.spans,
            calls=self.calls,
            finish_reasons=self.finish_reasons,
        )


class Trajectories:
    """All trajectories of one session, in the order in which they began."""

    def __init__(self) -> None:
        self.branches: list[Branch] = []
        self.tokens = 0  # that all of them hold

    def match(self, prompt: array[int]) -> Branch | None:
        """Return the longest trajectory with which `prompt` begins."""
        found: Branch | None = None
        for branch in self.branches:
            longer = found is None or len(branch.token_ids) > len(found.token_ids)
            if longer and branch.begins(prompt):
                found = branch
        return found

    def similar(self, prompt: array[int]) -> list[array[int]]:
        """Return the token ids of trajectories from which `prompt` differs where something was sampled, or behind it;
        those that agree longest come first.
        """
        found = [branch.token_ids for branch in self.branches if branch.asked_alike(prompt)]
        return sorted(found, key=lambda token_ids: -_shared(token_ids, prompt))[:_COMPARED]

    def as_before(self, asked: array[int]) -> array[int]:
        """Return a prompt that begins with one that was built on recorded ids before, on these: its text is known."""
        found: Branch | None = None
        for branch in self.branches:
            rendered = branch.rendered
            longer = rendered and (found is None or found.rendered is None or rendered.length > found.rendered.length)
            if rendered and longer and rendered.begins(asked):
                found = branch
        if found is None or found.rendered is None:
            return asked
        return found.token_ids[: found.rendered.recorded] + asked[found.rendered.length :]

    def needed(self, prompt: array[int], choices: int) -> int:
        """Return how many tokens of the prompt a call would add."""
        match = self.match(prompt)
        return choices * len(prompt) - (len(match.token_ids) if match else 0)

    def add(self, call: int, prompt: array[int], choices: Iterable[Choice], asked: array[int] | None = None) -> int:
        """Add a call that has ended: its first choice goes on where the prompt begins with all tokens of a trajectory;
        all others begin one of their own, which repeats the prompt. Return how many forks that made.

        Args:
            asked: what the prompt was built from, if it was.
        """
        forks, branch = 0, self.match(prompt)
        for choice in choices:
            if branch is None:
                forks += bool(self.branches)
                branch = Branch()
                self.branches.append(branch)
            held = len(branch.token_ids)
            branch.go_on(call, prompt, choice)
            branch.rendered = None if asked is None else _Rendered.of(asked, prompt)
            self.tokens += len(branch.token_ids) - held
            branch = None
        return forks


def continued(
    prompt: array[int], recorded: Iterable[array[int]], decode: Callable[[list[int]], str]
) -> array[int] | None:
    """Return the prompt on the first of the recorded ids with whose text it begins; None if there are none.

    The text is the same, and so are the tokens behind it, where one of the prompt's tokens begins there. Text that is
    made of incomplete characters is never the same.

    Args:
        recorded: token ids of `Trajectories.similar`.
        decode: gives the text of token ids with that of special tokens, and changes nothing in it.
    """
    for token_ids in recorded:
        start = max(_shared(token_ids, prompt) - _CONTEXT, 0)
        if _differ_soon(token_ids, prompt, start, decode):
            continue
        text, asked = decode(token_ids[start:].tolist()), decode(prompt[start:].tolist())
        if _NO_TEXT in text or not asked.startswith(text):
            continue
        end = _boundary(prompt, start, text, decode)
        if end is None:
            continue
        built = token_ids + prompt[end:]
        if decode(built[start:].tolist()) == asked:
            return built
    return None


def _digest(token_ids: array[int]) -> bytes:
    return hashlib.blake2b(token_ids.tobytes(), digest_size=16).digest()


def _differ_soon(one: array[int], other: array[int], start: int, decode: Callable[[list[int]], str]) -> bool:
    """Return whether the texts from `start` on differ, before one of them ends, as far as it is cheap to see."""
    end, longest = start + _CONTEXT + _GLANCE, max(len(one), len(other))
    while end < longest:
        # A character that is cut is no difference.
        texts = [decode(token_ids[start:end].tolist()).rstrip(_NO_TEXT) for token_ids in (one, other)]
        shorter, longer = sorted(texts, key=len)
        if not longer.startswith(shorter):
            return True
        end = start + (end - start) * _WIDER
    return False


def _shared(one: array[int], other: array[int]) -> int:
    """Return how many tokens the two begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _boundary(prompt: array[int], start: int, text: str, decode: Callable[[list[int]], str]) -> int | None:
    """Return the `end` for which prompt[start:end] is `text`; None where a token goes on beyond it."""
    low, high = start, len(prompt)
    while low < high:
        middle = (low + high) // 2
        if len(decode(prompt[start:middle].tolist())) < len(text):
            low = middle + 1
        else:
            high = middle
    # Parts of a character are longer than the character.
    for end in range(max(low - _CONTEXT, start), min(low + _CONTEXT, len(prompt)) + 1):
        if decode(prompt[start:end].tolist()) == text:
            return end
    return None
