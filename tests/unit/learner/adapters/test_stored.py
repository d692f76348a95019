from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from learner.adapters.stored import fetch_base
from shared.fingerprint import fingerprint_checkpoint


def test_only_files_of_the_model_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["config.json", "model.safetensors", "tokenizer.model", "modeling_own.py", "consolidated.safetensors"]
    names.append("other/a.json")
    taken = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list, ignore_patterns: list) -> str:
        filter_names = huggingface_hub.utils.filter_repo_objects
        taken.append(list(filter_names(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fingerprint_checkpoint("somebody/model")
    fetch_base("somebody/model")
    assert taken == [names[:2], names[:4]]
