"""Which copies between buffer and slot go together."""

from __future__ import annotations

import torch

from rollout_server.slot_layout import grouped


def test_one_narrow_tensor_does_not_hold_up_the_others() -> None:
    rank, slot_rank = 4, 16
    stack_a, stack_b = torch.zeros(2, 1, slot_rank, 32), torch.zeros(2, 1, 48, slot_rank)
    a_RI, b_OR, full_b_OR = torch.randn(rank, 32), torch.randn(48, rank), torch.randn(48, slot_rank)
    pairs = [
        (a_RI, stack_a[1, 0, :rank]),
        (b_OR, stack_b[1, 0, :, :rank]),
        (full_b_OR, stack_b[0, 0]),
        (a_RI[:, :16], stack_a[0, 0, :rank, :16]),
    ]
    fast, slow = grouped(pairs)
    assert [t.shape for t in fast.received] == [a_RI.shape, full_b_OR.shape]
    assert [t.shape for t in slow.received] == [b_OR.shape, (rank, 16)]
    for copies in (fast, slow):
        torch._foreach_copy_(copies.slot, copies.received)
    assert torch.equal(stack_a[1, 0, :rank], a_RI) and torch.equal(stack_b[1, 0, :, :rank], b_OR)
    assert torch.equal(stack_b[0, 0], full_b_OR) and not stack_b[1, 0, :, rank:].any()


def test_there_is_no_empty_group() -> None:
    (only,) = grouped([(torch.ones(2, 2), torch.zeros(2, 2))])
    assert len(only.slot) == 1
