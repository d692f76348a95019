"""Completions of some generation batches and evaluations, in their groups, for people to read."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

from learner.run_dir.files import read_lines
from learner.utils.atomic import write_atomically

TRAINING, EVALUATION = "training", "evaluation"
#: Batches kept of each kind.
BATCHES = {TRAINING: 40, EVALUATION: 20}
#: Limits: characters of a batch, of a prompt, of a completion, of another column; completions of a group.
BATCH_CHARACTERS, PROMPT_CHARACTERS, COMPLETION_CHARACTERS, COLUMN_CHARACTERS = 40_000, 1500, 3000, 400
GROUP_SIZE, _COLUMNS = 64, 8
#: Limits of thumbnails: of a group, pixels on a side, and characters of one.
IMAGES, IMAGE_PIXELS, IMAGE_CHARACTERS = 4, 96, 10_000
#: Characters that a completion's numbers take.
_NUMBERS = 200
#: Newest batches that thinning never removes.
_NEWEST = 8


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        reward: weighted sum of `rewards`; None without any.
        spans: (step, start, end, kv) of every version it was sampled from; None if unknown: generated on another rank,
            or in several turns.
        lag: staleness of its oldest token, in generation batches.
        turns: of an agent's conversation, the text of each turn, and whether it was sampled and is trained on.
        calls, trajectories: of an agent's episode.
    """

    completion: str
    reward: float | None
    rewards: dict[str, float | None]
    advantage: float | None
    tokens: int | None = None
    finish_reason: str | None = None
    spans: list[tuple[int, int, int, str]] | None = None
    lag: int | None = None
    turns: list[tuple[bool, str]] | None = None
    calls: int | None = None
    trajectories: int | None = None


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        key: the same for the same prompt.
        columns: the other columns of the prompt's row, such as its answer; empty if unknown: of another rank.
        images: of the prompt, small, as `data:` URLs; the first `IMAGES` of them.
        size: completions of the group; `samples` may hold fewer.
    """

    key: str
    prompt: str
    columns: dict[str, str]
    size: int
    samples: list[Sample]
    images: list[str] = field(default_factory=list)


def make_group(prompt: Any, columns: Mapping[str, Any], completions: Sequence[Any], numbers: Sequence[Any]) -> Group:
    """Build a group from TRL's prompt and completions and `numbers`, the other arguments of each `Sample`.

    Of a large group it keeps the best and the worst completion, and the first ones; of long texts their two ends.
    """
    whole, pictures = text_of(prompt, 1 << 20), _pictures(prompt)
    seen = b"".join(sha256(picture.tobytes()).digest() for picture in pictures)
    shown = _kept_rows([sample["reward"] for sample in numbers])
    limit = min(COMPLETION_CHARACTERS, max(BATCH_CHARACTERS // len(shown), 300))
    shown_above = ("prompt", "image", "images") if pictures else ("prompt",)
    others = [(name, value) for name, value in columns.items() if name not in shown_above and value is not None]
    return Group(
        key=sha256(whole.encode("utf-8", "replace") + seen).hexdigest()[:12],
        prompt=text_of(prompt, PROMPT_CHARACTERS),
        columns={name: text_of(_plain(value), COLUMN_CHARACTERS) for name, value in others[:_COLUMNS]},
        size=len(completions),
        samples=[_sample(completions[row], numbers[row], limit) for row in shown],
        images=[thumbnail for picture in pictures[:IMAGES] if (thumbnail := _thumbnail(picture))],
    )


def _pictures(prompt: Any) -> list[Any]:
    """Return PIL's images in the messages of a prompt."""
    contents = [message.get("content") for message in prompt if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    pictures = [part.get("image") for part in parts if part.get("type") == "image"]
    return [picture for picture in pictures if hasattr(picture, "thumbnail")]


def _thumbnail(picture: Any) -> str | None:
    """Return a picture, small, as a `data:` URL; None where it is large all the same."""
    small, stream = picture.convert("RGB"), BytesIO()
    small.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    small.save(stream, "JPEG", quality=70)
    url = f"data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}"
    return url if len(url) <= IMAGE_CHARACTERS else None


def _sample(completion: Any, numbers: Mapping[str, Any], limit: int) -> Sample:
    if turns := numbers.get("turns"):
        each = max(limit // len(turns), 60)
        numbers = {**numbers, "turns": [(sampled, text_of(text, each)) for sampled, text in turns[: limit // 60]]}
    return Sample(text_of(completion, limit), **numbers)


def choose(groups: Sequence[Group], known: Iterable[str] = ()) -> list[Group]:
    """Choose groups of a batch, all if they are not too long: those that tell most come first.

    Args:
        known: keys of prompts whose completions can be compared with those of other batches.
    """
    if not groups:
        return []
    seen, means = set(known), [_mean(group) for group in groups]
    rows = range(len(groups))
    flat = [row for row in rows if len({sample.reward for sample in groups[row].samples}) == 1]
    wanted = [
        0,
        *[row for row in rows if groups[row].key in seen][:1],
        max(rows, key=lambda row: means[row]),
        min(rows, key=lambda row: means[row]),
        *flat[:1],
        max(rows, key=lambda row: max((sample.tokens or 0 for sample in groups[row].samples), default=0)),
        *rows,
    ]
    kept, room = set[int](), BATCH_CHARACTERS
    for row in dict.fromkeys(wanted):
        room -= _length(groups[row])
        if room >= 0 or not kept:
            kept.add(row)
    return [groups[row] for row in sorted(kept)]


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
    """`completions.jsonl`: one line `{"step", "kind", "completions", "groups"}` for each batch that is kept.

    `step` is the first to train on a batch, or the step that is evaluated; `completions` counts those of the batch.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.batches: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Load the batches of a resumed run up to `step`."""
        self.batches = [batch for batch in read_batches(self._path) if batch["step"] <= step] if step else []

    def add(self, step: int, kind: str, groups: Sequence[Group]) -> None:
        """Add a batch; keep the first, the newest, and others spread over the run."""
        known = {group["key"] for batch in self.batches for group in batch["groups"]} if kind == TRAINING else ()
        count = sum(group.size for group in groups)
        batch = {"step": step, "kind": kind, "completions": count, "groups": list(map(asdict, choose(groups, known)))}
        self.batches = [*self.batches, batch]
        same = [batch for batch in self.batches if batch["kind"] == kind]
        while len(same) > BATCHES[kind]:
            inner = range(1, len(same) - _NEWEST)
            out = same.pop(min(inner, key=lambda i: same[i + 1]["step"] - same[i - 1]["step"]))
            self.batches = [batch for batch in self.batches if batch is not out]

    def write(self) -> None:
        """Rewrite the file, whose size stays bounded."""
        write_atomically(self._path, "".join(json.dumps(batch) + "\n" for batch in self.batches))


def read_batches(path: Path) -> list[dict[str, Any]]:
    """Return the batches of `completions.jsonl`; lines of another form, such as of an older version, are left out."""
    return [row for row in read_lines(path) if row.get("kind") in (TRAINING, EVALUATION) and _has_groups(row)]


def _has_groups(batch: Mapping[str, Any]) -> bool:
    groups = batch.get("groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("samples"), list)
        and all(isinstance(sample, dict) for sample in group["samples"])
        for group in groups
    )


def _kept_rows(rewards: Sequence[float | None]) -> list[int]:
    """Return the rows of a group to keep, in their order: at most `GROUP_SIZE`, the best and the worst among them."""
    rows = range(len(rewards))
    scored = [row for row in rows if rewards[row] is not None]
    ends = [pick(scored, key=lambda row: rewards[row] or 0.0) for pick in (max, min)] if scored else []
    return sorted(list(dict.fromkeys([*ends, *rows]))[:GROUP_SIZE])


def _mean(group: Group) -> float:
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    return fmean(rewards) if rewards else 0.0


def _length(group: Group) -> int:
    texts = [group.prompt, *group.images, *group.columns.values(), *(sample.completion for sample in group.samples)]
    texts += [text for sample in group.samples for _, text in sample.turns or ()]
    return sum(map(len, texts)) + _NUMBERS * len(group.samples)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _part(part: dict[str, Any]) -> str:
    if part.get("type") != "image":
        return str(part.get("text", part))
    width, height = getattr(part.get("image"), "size", ("?", "?"))
    return f"[image, {width} x {height} pixels]"


def _turn(message: Any) -> str:
    if not isinstance(message, dict):
        return str(message)
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(_part(part) if isinstance(part, dict) else str(part) for part in content)
    calls = message.get("tool_calls")
    called = f"\n{json.dumps(calls, default=str, ensure_ascii=False)}" if calls else ""
    return f"{message.get('role', 'message')}: {content}{called}"
