"""What a run was made of, for its summary: whoever finds its adapter later can tell what it belongs to."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shared.weights import ServerState

_PACKAGES = ("lockstep-rl", "trl", "peft", "transformers", "torch")


def provenance(
    model: str, revision: str | None, task: str, base_weights: str | None, server: ServerState
) -> dict[str, Any]:
    """Model, task, fingerprint of the base, and versions on both sides."""
    versions = {"vllm": server.vllm_version}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # of a source tree that was never installed
            continue
    return {
        "model": model,
        "model_revision": revision,
        "base_weights": base_weights,
        "task": task,
        "versions": versions,
    }
