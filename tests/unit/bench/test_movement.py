"""`bench.movement`: the share of an update, of made-up logprobs."""

from __future__ import annotations

import pytest
import torch

from bench.movement import MovementBench, difference, share


def test_the_share_is_of_what_should_have_moved() -> None:
    torch.manual_seed(0)
    before = [torch.randn(length, dtype=torch.float64) for length in (20, 30)]
    true = [torch.randn(length, dtype=torch.float64) for length in (20, 30)]
    after = [b + 0.25 * t for b, t in zip(before, true, strict=True)]
    figures = share(difference(after, before), true)
    assert figures["share"] == pytest.approx(0.25)
    assert figures["share_error"] == pytest.approx(0.0, abs=1e-9)
    assert figures["true_rms"] == pytest.approx(torch.cat(true).square().mean().sqrt().item())


def test_its_error_is_that_of_many_repetitions() -> None:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        true = [torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(64)]
        found.append(share([t + torch.randn(10, generator=generator, dtype=torch.float64) for t in true], true))
    spread = torch.tensor([figures["share"] for figures in found]).std().item()
    assert found[0]["share_error"] == pytest.approx(spread, rel=0.4)


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        MovementBench(["--updates", "1e-5"])
    assert MovementBench(["--updates", "1e-6:50,1e-5:5"]).options.updates == [(1e-6, 50), (1e-5, 5)]
