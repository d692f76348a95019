"""Architectures: what is served after a push is what Hugging Face computes; the newer kinds train."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.support import server
from tests.integration.support.forked import ForkedProcess
from tests.integration.support.learner_process import LearnerProcess, write_questions
from tests.integration.support.policy import FP32
from tests.integration.support.try_model import ENVIRONMENT, read
from tests.support.architectures import make_model
from tests.support.tiny_vision_model import make_tiny_vision_model

#: One of each kind, and of each way in which layers are fused; `python -m docs.models` tries all.
TRIED = [
    ("Llama", "columns"),
    ("Qwen3, tied", "adapter"),
    ("Gemma 2", "adapter"),
    ("Phi-3", "adapter"),
    ("SmolVLM", "images"),
    ("Mistral 3", "merge"),
    ("Gemma 4", "adapter"),
    ("gpt-oss", "columns"),
    ("Qwen3.5", "adapter"),
    ("Qwen3-Next", "merge"),
]


@pytest.mark.parametrize(("row", "apply"), TRIED)
def test_served_logprobs_after_a_push_are_hugging_faces(row: str, apply: str, tmp_path: Path) -> None:
    environment = {**os.environ, **server.ENVIRONMENT, **ENVIRONMENT}
    log = tmp_path / "log"
    process = ForkedProcess("tests.integration.support.try_model", [row, apply, str(tmp_path)], log, environment)
    assert process.wait(300) == 0, log.read_text(errors="replace")[-3000:]
    found = read(tmp_path)
    assert found.agrees(row), found


FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "8",
    "--max-lora-rank",
    "8",
]


def test_the_language_model_of_a_multimodal_checkpoint_trains(tmp_path: Path) -> None:
    """Two steps, each with a proof of sync."""
    model = make_model("Qwen2.5-VL", tmp_path / "model")
    with server.running_server(model, tmp_path, *FLAGS, "--language-model-only") as served:
        task = write_questions(tmp_path / "task.jsonl")
        summary = LearnerProcess(served.url, model, task, tmp_path / "run", "--max_steps", "2").finish()
    assert summary["steps"] == summary["pushes"] == 2


def test_a_model_that_cuts_images_into_tiles_trains(tmp_path: Path) -> None:
    """Two steps, each with a proof of sync that sees an image."""
    model = make_tiny_vision_model(tmp_path / "model", "smolvlm")
    with server.running_server(model, tmp_path, *FLAGS) as served:
        task, run = Path("learner.tasks.examples.counting:circles"), tmp_path / "run"
        summary = LearnerProcess(served.url, model, task, run, "--max_steps", "2", "--train_size", "4").finish()
    assert summary["steps"] == summary["pushes"] == 2
    assert summary["max_logprob_gap"] < FP32
    assert summary["max_drift_kl"] < 1e-8
