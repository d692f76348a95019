"""The allocator's setting: only on a GPU, only in this process, and never the user's."""

from __future__ import annotations

import os

import pytest
import torch

from learner.trainer.memory import VARIABLES, let_segments_grow

GPU = torch.device("cuda")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    settings: list[str] = []
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", settings.append, raising=False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return settings


def test_segments_grow_in_this_process_only(chosen: list[str]) -> None:
    let_segments_grow(GPU)
    assert chosen == ["expandable_segments:True"]
    # vLLM's sleep mode looks for it there.
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_setting_stays(chosen: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    let_segments_grow(GPU)
    assert chosen == []


def test_a_cpu_has_none(chosen: list[str]) -> None:
    let_segments_grow(torch.device("cpu"))
    assert chosen == []


def test_a_torch_that_refuses_goes_on_as_before(monkeypatch: pytest.MonkeyPatch, chosen: list[str]) -> None:
    def refuse(settings: str) -> None:
        raise RuntimeError("not with this backend")

    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", refuse)
    let_segments_grow(GPU)
