"""GPUs as the driver tells them, and as CUDA_VISIBLE_DEVICES chooses among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.utils.gpus import Gpu, visible_gpus

H100 = Gpu("0", "NVIDIA H100 80GB HBM3", 81559 * 2.0**20, 2.0**30)
SPARK = Gpu("1", "NVIDIA GB10", 0.0, 0.0)  # whose memory is the machine's


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    tool = tmp_path / "nvidia-smi"
    lines = ("0, GPU-11aa, NVIDIA H100 80GB HBM3, 81559, 1024", "1, GPU-22bb, NVIDIA GB10, [N/A], [N/A]")
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_all(driver: pytest.MonkeyPatch) -> None:
    assert visible_gpus() == [H100, SPARK]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("", []),
        ("-1", []),
        ("1,0", ["NVIDIA GB10", "NVIDIA H100 80GB HBM3"]),
        ("1,-1,0", ["NVIDIA GB10"]),
        ("GPU-22", ["NVIDIA GB10"]),
        ("MIG-5, 0", ["a GPU", "NVIDIA H100 80GB HBM3"]),
    ],
)
def test_those_that_are_visible(driver: pytest.MonkeyPatch, visible: str, found: list[str]) -> None:
    driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = visible_gpus()
    assert [gpu.name for gpu in gpus] == found
    assert [gpu.device for gpu in gpus] == [w.strip() for w in visible.split("-1")[0].split(",") if w.strip()]


def test_no_driver(driver: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver.setenv("PATH", str(tmp_path / "empty"))
    assert visible_gpus() == []
    driver.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert visible_gpus() == [Gpu("3", "a GPU", 0.0, 0.0)]
