"""Pack rows of prompt and completion into passes of a bounded number of tokens, each distinct prompt once.

A pass is one row [1, N] of segments. A prompt that several rows share becomes a segment of its own, without its last
token; each row is a segment that begins with the last token of its prompt, so that the first token of every completion
is scored from a position of its own. A segment attends to itself, causally, and to the segment it continues.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Where in a row's completion another sequence begins, and how many of its tokens from there are its prompt.
Part = tuple[int, int]


class Row(NamedTuple):
    """Token ids of a prompt, with at least one token, and of its completion.

    From the first of `parts` on, the completion holds further sequences, each with a prompt of its own, which is not
    scored: an agent's episode whose conversation has forked. They see nothing of each other.
    """

    prompt: list[int]
    completion: list[int]
    parts: Sequence[Part] = ()


class _Sequence(NamedTuple):
    """What one causal sequence of a row scores: `completion` lies at `column` of the row's completion."""

    row: int
    column: int
    prompt: list[int]
    completion: list[int]


def _sequences(rows: Sequence[Row]) -> list[_Sequence]:
    found = []
    for number, row in enumerate(rows):
        ends = [*(start for start, _ in row.parts), len(row.completion)]
        found.append(_Sequence(number, 0, row.prompt, row.completion[: ends[0]]))
        for (start, length), end in zip(row.parts, ends[1:], strict=True):
            begin = start + length
            found.append(_Sequence(number, begin, row.completion[start:begin], row.completion[begin:end]))
    return found


class Segment(NamedTuple):
    """Positions [start, stop) of a pass, which continue positions [prefix, prefix + prefix_length)."""

    start: int
    stop: int
    prefix: int
    prefix_length: int


@dataclass(frozen=True)
class PackedPass:
    """One forward pass.

    Attributes:
        input_ids, position_ids, next_ids: int64 [1, N]; `next_ids` is -100 where nothing is scored.
        segments: all tokens, in order.
        rows, columns: int64 [S], for each scored position the row and the index within its completion.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    next_ids: torch.Tensor
    segments: list[Segment]
    rows: torch.Tensor
    columns: torch.Tensor


def rows_of(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    width_T: int,
    parts: Sequence[Sequence[Part]] | None = None,
) -> list[Row] | None:
    """Return the rows of a padded batch; None if one cannot be packed.

    Args:
        input_ids, attention_mask: [B, P + T]; prompts padded on the left to P, completions on the right to T.
        width_T: T.
        parts: of each row; those of a row without completion (TRL's `mask_truncated_completions`) do not count.
    """
    width_P = input_ids.size(1) - width_T
    # One copy from the device for each.
    ids, mask = input_ids.cpu(), attention_mask.cpu().long()
    prompts_B, completions_B = mask[:, :width_P].sum(1), mask[:, width_P:].sum(1)
    column = torch.arange(mask.size(1))
    expected = (column >= width_P - prompts_B[:, None]) & (column < width_P + completions_B[:, None])
    if not torch.equal(mask.bool(), expected) or not bool((prompts_B > 0).all()):
        return None
    return [
        Row(row[width_P - p : width_P], row[width_P : width_P + t], own if t else ())
        for row, p, t, own in zip(
            ids.tolist(), prompts_B.tolist(), completions_B.tolist(), parts or [()] * len(mask), strict=True
        )
    ]


def plan_passes(rows: Sequence[Row], max_tokens: int, device: torch.device) -> list[PackedPass]:
    """Distribute rows over passes of at most `max_tokens`, rows of one prompt side by side; a longer row goes alone.

    Example:
        rows = [Row([5, 6, 7], [8]), Row([5, 6, 7], [9, 10])]
        [each] = plan_passes(rows, max_tokens=64, device=torch.device("cpu"))
        assert each.input_ids.tolist() == [[5, 6, 7, 8, 7, 9, 10]]
    """
    sequences = _sequences(rows)
    families: dict[tuple[int, ...], list[int]] = {}
    for number, sequence in enumerate(sequences):
        families.setdefault(tuple(sequence.prompt[:-1]), []).append(number)
    order = sorted(families.items(), key=lambda family: len(family[0]), reverse=True)
    total = sum(len(prefix) + sum(1 + len(sequences[n].completion) for n in numbers) for prefix, numbers in order)
    # As many passes as are needed, of about the same size.
    limit = min(max_tokens, math.ceil(1.05 * total / math.ceil(total / max_tokens)))
    chosen: list[list[tuple[tuple[int, ...], list[int]]]] = []
    filled = limit
    for prefix, numbers in order:
        members: list[int] | None = None
        for number in sorted(numbers, key=lambda n: len(sequences[n].completion), reverse=True):
            own = 1 + len(sequences[number].completion)
            if members is None or filled + own > limit:
                if filled + len(prefix) + own > limit:
                    chosen.append([])
                    filled = 0
                members = []
                chosen[-1].append((prefix, members))
                filled += len(prefix)
            members.append(number)
            filled += own
    return [_pass(each, sequences, device) for each in chosen]


def _pass(
    families: list[tuple[tuple[int, ...], list[int]]], sequences: Sequence[_Sequence], device: torch.device
) -> PackedPass:
    ids: list[int] = []
    positions: list[int] = []
    next_ids: list[int] = []
    segments: list[Segment] = []
    scored: list[tuple[int, int]] = []

    def add(tokens: Sequence[int], first_position: int, targets: Sequence[int], prefix: int, length: int) -> None:
        segments.append(Segment(len(ids), len(ids) + len(tokens), prefix, length))
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        next_ids.extend([-100] * (len(tokens) - len(targets)))
        next_ids.extend(targets)

    for prefix, members in families:
        start, shared = len(ids), len(members) > 1 and len(prefix) > 0
        if shared:
            add(prefix, 0, (), start, 0)
        for number in members:
            sequence = sequences[number]
            own = [sequence.prompt[-1], *sequence.completion]
            targets = [*sequence.completion, -100]
            if shared:
                add(own, len(prefix), targets, start, len(prefix))
            else:
                add([*prefix, *own], 0, targets, len(ids), 0)
            scored += [(sequence.row, sequence.column + i) for i in range(len(sequence.completion))]
    tensor = torch.tensor([ids, positions, next_ids], device=device)
    targets_2S = torch.tensor(scored, dtype=torch.long, device=device).reshape(-1, 2)
    return PackedPass(tensor[:1], tensor[1:2], tensor[2:], segments, targets_2S[:, 0], targets_2S[:, 1])
