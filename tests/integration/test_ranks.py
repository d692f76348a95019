"""The same training on one rank and on two, with DDP and with FSDP2: real processes, gloo between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.integration.server import ENVIRONMENT, ServerProcess, free_port

TIMEOUT_S = 150


def train(model: Path, server: ServerProcess, folder: Path, ranks: int, *options: str) -> dict[str, Any]:
    """Run the script on so many ranks, with torchrun if there are several; answers its summary."""
    folder.mkdir()
    launcher = [] if ranks == 1 else [
        "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port()), "-m",
    ]  # fmt: skip
    command = [sys.executable, "-m", *launcher, "tests.integration.train_on_ranks", model, server.url, folder, *options]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        code = process.wait(TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text(errors="replace")[-6000:]
    return json.loads((folder / "summary.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    assert LoraConfig.from_pretrained(folder / "adapter").r == 8
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(model: Path, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Summary and final adapter of the training on one rank."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    return train(model, server, folder, 1), adapter(folder)


@pytest.mark.parametrize(
    ("options", "model_class"), [((), "DistributedDataParallel"), (("fsdp2", "forget"), "FSDPPeftModelForCausalLM")]
)
def test_two_ranks_train_as_one(
    single: tuple[dict, dict], model: Path, server: ServerProcess, tmp_path: Path, options: tuple, model_class: str
) -> None:
    """Also when the server loses the run (`forget`) while one rank has yet to ask for its share."""
    alone, expected = single
    summary = train(model, server, tmp_path / "two", 2, *options)
    assert summary["model_class"] == model_class
    for figure in ("steps", "pushes", "completions", "completion_tokens"):
        assert summary[figure] == alone[figure], figure
    assert summary["max_logprob_gap"] < 1e-4 and abs(summary["canary_slope"] - 1) < 0.01
    # After the loss, before the push of step 2, one rank's copy of step 1 was installed again, and only one.
    repeated = 1 if "forget" in options else 0
    first = summary["installs"][0]
    assert summary["installs"] == [first, first + 1, first + 2 + repeated, first + 3 + repeated]

    trained = adapter(tmp_path / "two")
    assert trained.keys() == expected.keys()
    # B starts at zero: what it is in the end is the update.
    update = max(tensor.abs().max() for name, tensor in expected.items() if "lora_B" in name)
    assert update > 0.01
    for name, tensor in expected.items():
        difference = (trained[name] - tensor).abs().max()
        assert difference <= 1e-5 * update, f"{name} differs by {difference:.1e}, the largest update is {update:.1e}"
