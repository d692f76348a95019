"""Sample completions of some generation batches, with prompts and rewards, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learner.run_dir.files import read_lines
from learner.utils.atomic import write_atomically

#: Limits: generation batches kept, characters of a prompt, characters of a completion.
BATCHES, PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 40, 1500, 3000
#: Newest batches that thinning never removes.
_NEWEST = 8


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        why: why it was chosen: first, best or worst of its batch.
        reward: weighted sum of `rewards`; None without any.
        spans: (step, start, end, kv) of every version it was sampled from; None if unknown: generated on another rank,
            or in several turns.
        lag: staleness of its oldest token, in generation batches.
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
    """Choose rows to show: the first, the best and the worst. Returns the reason for each row, each row once."""
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
    """Return the weighted sum as TRL computes it: missing rewards do not count."""
    scored = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
    return sum(scored) if scored else None


def text_of(message: Any, limit: int) -> str:
    """Render a prompt or completion, a string or chat messages, as text; of a long text, its two ends."""
    messages = message if isinstance(message, list) else [message]
    if len(messages) == 1 and isinstance(messages[0], dict) and not messages[0].get("tool_calls"):
        content = messages[0].get("content")
        messages = [content] if isinstance(content, str) else messages
    text, tail = "\n\n".join(map(_turn, messages)), limit // 3
    if len(text) <= limit:
        return text
    return f"{text[: limit - tail]}\n[… {len(text) - limit} characters left out …]\n{text[-tail:]}"


class Samples:
    """`completions.jsonl`: one line `{"step", "samples"}` per generation batch; `step` is the first to train on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.batches: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Load the batches of a resumed run up to `step`."""
        self.batches = [batch for batch in read_lines(self._path) if batch["step"] <= step] if step else []

    def add(self, step: int, samples: Sequence[Sample]) -> None:
        """Add the samples of a generation batch; keep the first, the newest, and others spread over the run."""
        kept = self.batches = [*self.batches, {"step": step, "samples": [asdict(sample) for sample in samples]}]
        while len(kept) > BATCHES:
            inner = range(1, len(kept) - _NEWEST)
            kept.pop(min(inner, key=lambda i: kept[i + 1]["step"] - kept[i - 1]["step"]))

    def write(self) -> None:
        """Rewrite the file, whose size stays bounded."""
        write_atomically(self._path, "".join(json.dumps(batch) + "\n" for batch in self.batches))


def _turn(message: Any) -> str:
    if not isinstance(message, dict):
        return str(message)
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    calls = message.get("tool_calls")
    called = f"\n{json.dumps(calls, default=str, ensure_ascii=False)}" if calls else ""
    return f"{message.get('role', 'message')}: {content}{called}"
