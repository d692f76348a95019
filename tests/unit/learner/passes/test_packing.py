"""Packed passes: which tokens they hold, and that attention over their segments is that of separate rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from learner.passes import attention
from learner.passes.packing import Row, plan_passes, rows_of

CPU = torch.device("cpu")


def some_rows(seed: int = 0, prompts: int = 4, group: int = 3) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, 9))]
        rows += [Row(prompt, [rng.randrange(100) for _ in range(rng.randint(0, 12))]) for _ in range(group)]
    return rows


@pytest.mark.parametrize("max_tokens", [1, 16, 40, 10_000])
def test_every_completion_token_is_scored_once_from_the_token_before_it(max_tokens):
    rows = some_rows()
    found = {}
    for each in plan_passes(rows, max_tokens, CPU):
        assert (each.next_ids[0] != -100).sum() == len(each.rows)
        at = (each.next_ids[0] != -100).nonzero()[:, 0].tolist()
        for position, row, column in zip(at, each.rows.tolist(), each.columns.tolist(), strict=True):
            segment = next(s for s in each.segments if s.start <= position < s.stop)
            seen = each.input_ids[0, segment.prefix : segment.prefix + segment.prefix_length].tolist()
            seen += each.input_ids[0, segment.start : position + 1].tolist()
            assert seen == rows[row].prompt + rows[row].completion[:column]
            assert each.position_ids[0, position] == len(seen) - 1
            assert each.next_ids[0, position] == rows[row].completion[column]
            assert (row, column) not in found
            found[row, column] = True
    assert len(found) == sum(len(row.completion) for row in rows)


def test_sequences_of_a_row_see_nothing_of_each_other():
    """[1 2 | 3 4] and then two more sequences, [1 2 9 | 5 6] and [8 | 7], in one row's completion."""
    row = Row([1, 2], [3, 4, 1, 2, 9, 5, 6, 8, 7], [(2, 3), (7, 1)])
    (each,) = plan_passes([Row([1, 2], [3]), row], 10_000, CPU)
    found = {}
    for position in (each.next_ids[0] != -100).nonzero()[:, 0].tolist():
        segment = next(s for s in each.segments if s.start <= position < s.stop)
        seen = each.input_ids[0, segment.prefix : segment.prefix + segment.prefix_length].tolist()
        seen += each.input_ids[0, segment.start : position + 1].tolist()
        number = len(found)
        found[each.rows[number].item(), each.columns[number].item()] = seen, each.next_ids[0, position].item()
    assert found == {
        (0, 0): ([1, 2], 3),
        (1, 0): ([1, 2], 3),
        (1, 1): ([1, 2, 3], 4),
        (1, 5): ([1, 2, 9], 5),
        (1, 6): ([1, 2, 9, 5], 6),
        (1, 8): ([8], 7),
    }


def test_a_prompt_of_a_group_is_computed_once():
    rows = [Row(list(range(100)), [7] * 10) for _ in range(8)]
    (each,) = plan_passes(rows, 10_000, CPU)
    assert each.input_ids.numel() == 99 + 8 * 11


def test_passes_keep_to_the_budget_and_have_about_the_same_size():
    rows = some_rows(prompts=40)
    sizes = [each.input_ids.numel() for each in plan_passes(rows, 200, CPU)]
    assert max(sizes) <= 200
    assert min(sizes[:-1]) > 100


def test_attention_over_segments_is_that_of_separate_rows():
    rows = some_rows(1)
    (each,) = plan_passes(rows, 10_000, CPU)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, each.input_ids.numel(), 8) for heads in (4, 2, 2))
    out, weights = attention.attend(None, q, k, v, None, scaling=0.3, **attention.arguments(each))
    assert weights is None
    for s in each.segments:
        at = [*range(s.prefix, s.prefix + s.prefix_length), *range(s.start, s.stop)]
        alone = scaled_dot_product_attention(
            q[:, :, at], k[:, :, at], v[:, :, at], is_causal=True, scale=0.3, enable_gqa=True
        )
        expected = alone[:, :, s.prefix_length :].transpose(1, 2)
        torch.testing.assert_close(out[:, s.start : s.stop], expected)


def test_rows_of_a_padded_batch():
    ids = torch.tensor([[0, 5, 6, 7, 0], [1, 2, 3, 4, 8]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert rows_of(ids, mask, 2) == [Row([5, 6], [7]), Row([1, 2, 3], [4, 8])]


@pytest.mark.parametrize("hole", [(0, 1), (1, 3), (0, 2)])
def test_rows_with_holes_are_not_packed(hole):
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    mask[hole] = 0
    assert rows_of(ids, mask, 2) is None


def test_a_row_without_a_prompt_is_not_packed():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert rows_of(torch.ones_like(mask), mask, 2) is None
