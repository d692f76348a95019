"""`shared` and the HTTP-only parts of the learner work where neither torch nor vllm is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "vllm", "transformers", "peft", "trl"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""
SHARED = [
    "shared",
    *(
        f"shared.{m}"
        for m in ("adapter_file", "errors", "fingerprint", "rollouts", "sampling", "bearer_tokens", "weights")
    ),
]
SERVERS = [f"learner.servers.{m}" for m in ("client", "compatibility", "discovery", "event_log", "pool", "router")]


@pytest.mark.parametrize("modules", [SHARED, SERVERS], ids=["shared", "servers"])
def test_imports_without_torch_and_vllm(modules: list[str]) -> None:
    code = BLOCK + "".join(f"import {module}\n" for module in modules)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_block_blocks() -> None:
    ended = subprocess.run([sys.executable, "-c", BLOCK + "import torch"], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "blocked" in ended.stderr
