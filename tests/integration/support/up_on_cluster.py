"""`learner up --cluster` as a process, and a recipe for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from learner.run_dir.files import HISTORY_FILE, read_lines
from tests.integration.support.forked import FORKING, REPOSITORY
from tests.integration.support.learner_process import COMMON, write_questions
from tests.integration.support.server import ENVIRONMENT
from tests.integration.support.waiting import until
from tests.support.arguments import arguments

LONG_S = 900.0


def write_recipe(path: Path, *, server: dict[str, Any] | None = None, **own: Any) -> None:
    """Write the recipe of a training that goes on until it is stopped.

    Args:
        server: more flags of the server.
        own: more options.
    """
    options = {name.removeprefix("--"): value for name, value in zip(COMMON[::2], COMMON[1::2], strict=True)}
    more = {
        "task": str(write_questions(path.with_suffix(".jsonl"), 64)),
        "max_steps": 100_000,
        "save_steps": 100_000,
        # The training leaves the cores to a server that starts.
        "reward_funcs": "tests.support.rewards:odd_at_leisure",
        "reward_workers": 0,
        "run_page": False,
        "env": {**ENVIRONMENT, "PYTHONPATH": FORKING},
    }
    flags = {"max-model-len": 256, "max-num-seqs": 16, "enforce-eager": True, "num-gpu-blocks-override": 256}
    path.write_text(yaml.safe_dump({**options, **more, **own, "server": flags | (server or {})}))


class Up:
    """`learner up --cluster` as a process."""

    def __init__(self, address: str, recipe: Path, out: Path, log: Path, *, servers: int = 1, **more: object) -> None:
        self.out, self._log = out, log
        flags = {"--config": recipe, "--output_dir": out, "--cluster": address, "--servers": servers}
        flags |= {f"--{name}": value for name, value in more.items()}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "learner.cli", "up", *arguments(flags)],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until_it_says(self, *words: str, times: int = 1) -> None:
        until(
            lambda: all(self.said().count(word) >= times for word in words) or self.process.poll() is not None, LONG_S
        )
        assert self.process.poll() is None, self.said()[-6000:]

    def until_steps(self, servers_up: int, more: int) -> None:
        """Wait for `more` proven steps with this number of servers."""

        def count() -> int:
            rows = read_lines(self.out / HISTORY_FILE)
            return sum(row["servers_up"] == servers_up and row["logprob_gap"] is not None for row in rows)

        begun = count()
        until(lambda: count() >= begun + more or self.process.poll() is not None, LONG_S)
        assert self.process.poll() is None, self.said()[-6000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
