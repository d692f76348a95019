"""Wrong flags of `rollout-server`: exit code 2, and one line that names the flag."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from rollout_server import cli
from rollout_server.lifecycle import check_config
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat.start_errors import report_errors, reported_errors
from shared.errors import InvalidRequest
from shared.weights import SERVED_RANKS


@pytest.fixture
def run(monkeypatch):
    """Run the command as far as to its configuration; return its exit code."""
    root = logging.getLogger("lockstep")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "propagate", True)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["rollout-server", *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    return run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--slots-per-rnu", "3"], "there is no --slots-per-rnu: did you mean --slots-per-run?"),
        (["--slots-per-run", "two"], "--slots-per-run"),
        (["--slots-per-run", "2.5"], "--slots-per-run"),
        (["--slots-per-run", "1"], "--slots-per-run must be 2 or more"),
        (["--slots-per-run"], "--slots-per-run: expected one argument"),
        (["--max-runs", "0"], "--max-runs must be more than 0"),
        (["--push-timeout", "nan"], "--push-timeout must be a finite number"),
        (["--push-timeout", "-1"], "--push-timeout"),
        (["--drain-seconds", "inf"], "--drain-seconds must be a finite number"),
        (["--apply", "twice"], "--apply"),
        (["--apply", "columns", "--fully-sharded-loras"], "--fully-sharded-loras"),
        (["--max-lora-rank", "24"], "--max-lora-rank"),
        (["--dtype", "bf61"], "--dtype"),
        (["--port", "http"], "--port"),
        (["--token-file", "/nowhere"], "/nowhere"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--lora-modules", "a=b"], "--lora-modules"),
        (["--no-enable-lora"], "--no-enable-lora"),
        ([], "/no/such/model"),
    ],
)
def test_wrong_flags(run, capsys, argv, words):
    assert run("/no/such/model", *argv) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("rollout-server: ")
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error
    assert "usage:" not in error


def test_graphs_compiled_for_other_layers_are_not_used_again():
    configs = [cli.parse(["model", "--apply", apply])[0].additional_config for apply in ("adapter", "columns")]
    assert configs[0] != configs[1]


def test_columns_have_the_dtype_of_the_weights():
    config = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode="processed_logprobs", is_moe=False, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            nnodes=1,
            distributed_executor_backend=None,
            data_parallel_size=1,
            data_parallel_size_local=1,
        ),
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        lora_config=SimpleNamespace(lora_dtype=torch.float16),
    )
    check_config(config, ServerSettings())
    with pytest.raises(InvalidRequest, match="--lora-dtype"):
        check_config(config, ServerSettings(apply="columns"))


def test_the_ranks_that_vllm_serves():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == SERVED_RANKS


def test_the_first_error_that_a_process_of_vllm_logs_is_reported():
    vllm = logging.getLogger("vllm")
    before = list(vllm.handlers)
    report_errors()
    assert vllm.handlers == before  # outside a start there is nobody to report to
    with reported_errors() as first:
        report_errors()
        (handler,) = [handler for handler in vllm.handlers if handler not in before]
        try:
            vllm.error("no exception")
            assert first() is None
            for problem in ("the cause\nover two lines", "what came of it"):
                try:
                    raise ValueError(problem)
                except ValueError:
                    vllm.exception("EngineCore failed to start.")
            assert first() == "ValueError: the cause over two lines"
        finally:
            vllm.removeHandler(handler)
    handler.emit(logging.makeLogRecord({"exc_info": (OSError, OSError("later"), None)}))  # its folder is gone
