"""The same training on one rank and on two, with DDP, FSDP2 and ZeRO-3: real processes, gloo between them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from learner.run_dir.checkpoint import TrainingState, save_state
from learner.utils.ports import free_port
from tests.integration.support.forked import ForkedProcess
from tests.integration.support.policy import FP32
from tests.integration.support.server import ENVIRONMENT, ServerProcess
from tests.support.arguments import arguments

TIMEOUT_S = 150


def launch(model: Path, server: ServerProcess, folder: Path, ranks: int, *options: str) -> None:
    """Run the script on this many ranks, with what torchrun would tell each of them."""
    folder.mkdir(exist_ok=True)
    begin_ranks("tests.integration.support.train_on_ranks", [[model, server.url, folder, *options]] * ranks, folder)


def begin_ranks(module: str, arguments: list[list[Any]], folder: Path, expected: int = 0) -> list[str]:
    """Run a module on several ranks, each with its arguments, to their `expected` exit; return their logs."""
    port, ranks = str(free_port()), len(arguments)
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, own in enumerate(arguments):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(ForkedProcess(module, own, logs[rank], {**os.environ, **ENVIRONMENT, **place}))
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT_S) == expected, log.read_text(errors="replace")[-6000:]
    finally:
        for process in processes:
            process.kill()
    return [log.read_text(errors="replace") for log in logs]


def train(model: Path, server: ServerProcess, folder: Path, ranks: int, *options: str) -> dict[str, Any]:
    """Run a training to its end and return its summary."""
    launch(model, server, folder, ranks, *options)
    return json.loads((folder / "summary.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    assert LoraConfig.from_pretrained(folder / "adapter").r == 8
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(model: Path, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Summary and final adapter of the training on one rank."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    return train(model, server, folder, 1), adapter(folder)


def check_same(trained: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Check equality within a share of the largest update."""
    assert trained.keys() == expected.keys()
    # B starts at zero: what it is in the end is the update.
    update = max(tensor.abs().max() for name, tensor in expected.items() if "lora_B" in name)
    assert update > 0.01
    for name, tensor in expected.items():
        difference = (trained[name] - tensor).abs().max()
        assert difference <= tolerance * update, f"{name} differs by {difference:.1e}, the update is {update:.1e}"


@pytest.mark.parametrize(
    ("sharding", "model_class"),
    [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPPeftModelForCausalLM"), ("zero3", "DeepSpeedEngine")],
)
def test_two_ranks_train_as_one(
    single: tuple[dict, dict], model: Path, server: ServerProcess, tmp_path: Path, sharding: str, model_class: str
) -> None:
    """Also when the server loses the run (`forget`) before one rank has requested its share, and when all ranks end
    after the second of three steps.
    """
    alone, expected = single
    launch(model, server, tmp_path / "two", 2, sharding, "forget", "cut")
    before = json.loads((tmp_path / "two" / "summary.json").read_text())
    # After the loss, before the push of step 2, one rank's copy of step 1 was installed again, and only one.
    first = before["installs"][0]
    assert before["steps"] == 2
    assert before["installs"] == [first, first + 1, first + 3]
    assert abs(before["canary_slope"] - 1) < 0.01

    summary = train(model, server, tmp_path / "two", 2, sharding)
    assert summary["model_class"] == model_class
    assert summary["max_update_lost"] is None
    for figure in ("steps", "pushes", "completions", "completion_tokens"):
        assert summary[figure] == alone[figure], figure
    assert len(summary["installs"]) == 2
    assert summary["max_logprob_gap"] < FP32
    check_same(adapter(tmp_path / "two"), expected, 1e-5)


def test_ranks_without_a_shared_output_dir_refuse_to_resume(model: Path, tmp_path: Path) -> None:
    """Two nodes, of which one has a checkpoint: both end, with the reason, before a server or a model is needed."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    (folders[0] / "checkpoint-2").mkdir(parents=True)
    save_state(folders[0] / "checkpoint-2", TrainingState(0, 2, 2, 2, 8, 9, settings={}))
    flags = {
        "--rollout_url": "http://127.0.0.1:9",
        "--model_name_or_path": model,
        "--task": f"{__name__}:no_task",
        "--use_cpu": "true",
        "--bf16": "false",
    }
    told = [["train", *arguments({**flags, "--output_dir": folder})] for folder in folders]
    for log in begin_ranks("learner.cli", told, tmp_path, expected=2):
        assert f"rank 0 {folders[0] / 'checkpoint-2'}, rank 1 starts over; give all nodes one" in log


def test_zero3_in_bfloat16_says_what_rounding_takes(model: Path, server: ServerProcess, tmp_path: Path) -> None:
    """TRL leaves the adapter in bfloat16 there, whose unit is 2^-8; the optimizer's copy of it is in float32."""
    summaries = [train(model, server, tmp_path / str(ranks), ranks, "zero3", "bf16") for ranks in (1, 2)]
    one, two = (adapter(tmp_path / str(ranks)) for ranks in (1, 2))
    assert {tensor.dtype for tensor in two.values()} == {torch.bfloat16}
    check_same(
        {name: tensor.float() for name, tensor in two.items()},
        {name: tensor.float() for name, tensor in one.items()},
        0.1,
    )
    for summary in summaries:
        assert 1e-4 < summary["max_update_lost"] < 0.5
        assert summary["max_logprob_gap"] < summary["logprob_tolerance"]


def test_fsdp2_trains_in_bfloat16(model: Path, server: ServerProcess, tmp_path: Path) -> None:
    """The passes are in bfloat16, the adapter in float32; the first pass is without it (the server's base)."""
    summaries = [train(model, server, tmp_path / str(ranks), ranks, "fsdp2", "bf16") for ranks in (1, 2)]
    one, two = (adapter(tmp_path / str(ranks)) for ranks in (1, 2))
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    check_same(two, one, 0.1)
    assert [summary["steps"] for summary in summaries] == [3, 3]
