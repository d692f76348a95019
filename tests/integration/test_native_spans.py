"""Our spans and those of newer vLLM versions, which have one version string per engine, for all runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.support.forked import ForkedProcess
from tests.integration.support.native_spans import TOKENS
from tests.integration.support.server import ENVIRONMENT


def test_spans_are_vllms_own_for_one_run_and_right_for_several(model: Path, tmp_path: Path) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    if not hasattr(AsyncLLM, "update_weight_version"):
        pytest.skip("this vLLM labels no tokens")
    told, log = [model, tmp_path / "spans.json"], tmp_path / "log"
    process = ForkedProcess("tests.integration.support.native_spans", told, log, {**os.environ, **ENVIRONMENT})
    try:
        assert process.wait(300) == 0, log.read_text(errors="replace")[-6000:]
    finally:
        process.kill()
    result = json.loads(told[1].read_text())
    ((ours, native),) = result["still"]
    for own, vllms in result["moving"]:
        assert own == vllms
    lived_through = [[step for step, _, _ in own] for own, _ in result["moving"]]
    assert ["0", "1", "2", "3"] in lived_through, "some must live through all three pushes"
    assert ["3"] in lived_through, "some must wait for their first token until after the last push"
    # The other run's adapter has not changed. vLLM's label says it has, because there is one for the whole engine.
    assert ours == [["0", 0, max(TOKENS)]]
    assert [step for step, _, _ in native] == ["0", "1", "2", "3"]
