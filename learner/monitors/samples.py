"""Some completions of some generation batches, for people to read: what was asked, answered, and how it was scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learner.run_dir.files import read_lines
from learner.utils.atomic import write_atomically

#: Generation batches that are kept; characters of a prompt, and of a completion.
BATCHES, PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 40, 1500, 3000
#: The newest so many batches are kept whatever came before.
_NEWEST = 8


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        why: it was chosen: the first of its batch, the best, the worst.
        reward: weighted sum of `rewards`; None where no function gave one.
        spans: [step, first token, end, kv] of every version it was sampled from; None: not known here (it came to
            another rank, or in several turns).
        lag: of its oldest token, in generation batches.
    """

    why: str
    prompt: str
    completion: str
    reward: float | None
    rewards: dict[str, float | None]
    advantage: float | None
    tokens: int | None = None
    finish_reason: str | None = None
    spans: list[tuple[int, int, int, str]] | None = None
    lag: int | None = None


def choose(rewards: Sequence[float | None]) -> dict[int, str]:
    """Which rows to show, and why: the first, the best and the worst; a row that is several of them is shown once."""
    scored = [row for row, reward in enumerate(rewards) if reward is not None]
    chosen: dict[int, list[str]] = {0: ["first"]} if rewards else {}
    if scored:
        best = max(scored, key=lambda row: rewards[row] or 0.0)
        worst = min(scored, key=lambda row: rewards[row] or 0.0)
        chosen.setdefault(best, []).append("best")
        if rewards[worst] != rewards[best]:
            chosen.setdefault(worst, []).append("worst")
    return {row: ", ".join(why) for row, why in chosen.items()}


def total(rewards: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The weighted sum, as TRL adds rewards up: those that are missing do not count."""
    scored = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
    return sum(scored) if scored else None


def text_of(message: Any, limit: int) -> str:
    """A prompt or completion as text: a string, or chat messages with their roles."""
    if isinstance(message, str):
        return clip(message, limit)
    if isinstance(message, list) and len(message) == 1 and _plain(message[0]):
        return clip(message[0]["content"], limit)
    messages = message if isinstance(message, list) else [message]
    return clip("\n\n".join(_turn(turn) for turn in messages), limit)


def clip(text: str, limit: int) -> str:
    """At most about `limit` characters: the beginning and the end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail]}\n[… {len(text) - limit} characters left out …]\n{text[-tail:]}"


def thinned(batches: list[dict[str, Any]], limit: int = BATCHES) -> list[dict[str, Any]]:
    """At most `limit` of them, spread over the run: the first, the newest, and of the others evenly many."""
    kept = list(batches)
    while len(kept) > limit:
        inner = range(1, len(kept) - _NEWEST)
        kept.pop(min(inner, key=lambda i: kept[i + 1]["step"] - kept[i - 1]["step"]))
    return kept


class Samples:
    """`completions.jsonl`: one line for each generation batch that is kept, `{"step", "samples"}`.

    `step` is the first optimizer step that trains on the batch.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.batches: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Go on with those of a resumed run up to `step`."""
        self.batches = [batch for batch in read_lines(self._path) if batch["step"] <= step] if step else []

    def add(self, step: int, samples: Sequence[Sample]) -> None:
        """Those of a generation batch."""
        self.batches = thinned([*self.batches, {"step": step, "samples": [asdict(sample) for sample in samples]}])

    def write(self) -> None:
        """Replace the file, so that it never grows."""
        write_atomically(self._path, "".join(json.dumps(batch) + "\n" for batch in self.batches))


def _plain(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), str) and not message.get("tool_calls")


def _turn(message: Any) -> str:
    if not isinstance(message, dict):
        return str(message)
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    calls = message.get("tool_calls")
    called = f"\n{json.dumps(calls, default=str, ensure_ascii=False)}" if calls else ""
    return f"{message.get('role', 'message')}: {content}{called}"
