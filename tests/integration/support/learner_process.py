"""`learner train` as a separate process, on a few questions for a tiny model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path

from tests.integration.support.forked import ForkedProcess
from tests.integration.support.waiting import until
from tests.support.arguments import arguments

COMMON = arguments(
    {
        "--reward_funcs": "tests.support.rewards:reward_odd",
        "--reward_workers": 1,
        "--eval_size": 2,
        "--use_cpu": "true",
        "--bf16": "false",
        "--dtype": "float32",
        "--lora_r": 4,
        "--lora_alpha": 8,
        "--lora_target_modules": "all-linear",
        "--per_device_train_batch_size": 8,
        "--num_generations": 4,
        "--max_completion_length": 12,
        "--learning_rate": "1e-2",
        "--report_to": "none",
        "--gradient_checkpointing": "false",
        "--logging_steps": 1,
    }
)


def write_questions(path: Path, count: int = 12) -> Path:
    """Write a JSONL task of `count` questions."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains", "in", "Spain"]
    rows = [{"prompt": " ".join(words[i % 5 : i % 5 + 4]) + f" {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class LearnerProcess:
    """One training in `folder`; after a kill, the same command resumes it."""

    def __init__(self, url: str, model: Path, task: Path, folder: Path, *flags: str) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        own = {"--rollout_url": url, "--model_name_or_path": model, "--task": task, "--output_dir": folder}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = ForkedProcess("learner.cli", ["train", *arguments(own), *COMMON, *flags], self.log, environment)

    def steps(self) -> int:
        """Return the optimizer steps done, according to the history on disk."""
        history = self.folder / "metrics.jsonl"
        lines = history.read_text().splitlines() if history.is_file() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def kill_after(self, step: int) -> None:
        """Send SIGKILL as soon as this step is done."""
        until(lambda: self.steps() >= step or self.process.poll() is not None, 120.0)
        assert self.process.poll() is None, self.tail()
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to what is left of the process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def run_id(self) -> str:
        """Return the name of its run on the server."""
        return json.loads((self.folder / "lease.json").read_text())["run_id"]

    def finish(self) -> dict:
        """Wait for the end and return the training's summary."""
        assert self.process.wait(180) == 0, self.tail()
        return json.loads((self.folder / "train.json").read_text())

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def adapter_digest(self) -> str:
        """Return a hash of the final adapter's bytes."""
        return hashlib.sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
