from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from learner.trainer.compiling import Compile, compile_layers
from shared.errors import InvalidRequest

MAX_STEPS = 1000


def _logged_by(choice: Compile, seconds: list[float], caplog: pytest.LogCaptureFixture, **arguments: Any) -> list[str]:
    """Return what is logged by a training on a pretended GPU whose steps take that long."""
    callbacks: list[Any] = []
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cuda")),
        args=SimpleNamespace(full_determinism=False, **arguments),
        model=nn.Linear(2, 2),
        add_callback=callbacks.append,
    )
    taken: list[float] = []
    compile_layers(trainer, choice, lambda: taken[-1])
    with caplog.at_level(logging.INFO, "lockstep.passes"):
        for callback in callbacks:
            callback.on_train_begin(trainer.args, None, None)
        for step, value in enumerate(seconds, start=1):
            taken.append(value)
            for callback in callbacks:
                callback.on_step_end(trainer.args, SimpleNamespace(max_steps=MAX_STEPS, global_step=step), None)
    return [record.getMessage() for record in caplog.records]


def test_on_compiles_at_once_and_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    assert _logged_by("on", [32.0, 2.0, 2.0], caplog) == ["compiling layers took 30 s: a step trains for 2.0 s now"]


def test_auto_compiles_where_it_pays(caplog: pytest.LogCaptureFixture) -> None:
    assert _logged_by("auto", [4.0, 3.0, 3.0, 42.0, 2.0, 2.0], caplog) == [
        "compiling layers, which takes about a minute: 997 steps of 3.0 s are left",
        "compiling layers took 40 s: a step trains for 2.0 s now",
    ]


def test_auto_leaves_short_trainings_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert _logged_by("auto", [0.4, 0.3, 0.3, 0.3, 0.3], caplog) == [
        "layers are not compiled: 997 steps of 0.3 s would not make up for it"
    ]


def test_off_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert _logged_by("off", [3.0] * 6, caplog) == []


def test_on_is_refused_without_a_gpu() -> None:
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(InvalidRequest, match="for GPUs only"):
        compile_layers(trainer, "on", lambda: 1.0)
