"""Wrong flags of `rollout-server`: exit code 2, and one line that names the flag."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from learner.commands import up_recipe
from learner.commands.config_file import read_config_file
from rollout_server import cli, lifecycle
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from rollout_server.vllm_compat.start_errors import report_errors, reported_errors
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import EngineDead, InvalidRequest
from shared.weights import SERVED_RANKS
from tests.support.tiny_model import make_tiny_model


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
        (["--limit-mm-per-prompt", '{"image": 2}'], "--limit-mm-per-prompt cannot be used"),
        (["--limit-mm-per-prompt.image", "0"], "set --max-images instead"),
        (["--no-enable-lora"], "--no-enable-lora"),
        ([], "model_type"),
    ],
)
def test_wrong_flags(run, capsys, tmp_path, argv, words):
    (tmp_path / "config.json").write_text("{}")
    assert run(str(tmp_path), *argv) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("rollout-server: ")
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error
    assert "usage:" not in error


@pytest.fixture
def _nothing_slow(monkeypatch):
    def resolve(argv):
        raise AssertionError("vLLM was asked")

    monkeypatch.setattr(cli, "resolve", resolve)


@pytest.mark.usefixtures("_nothing_slow")
@pytest.mark.parametrize("flags", [[], ["--host", "127.0.0.1", "--dtype", "auto"]])
def test_a_port_in_use_is_one_line_before_vllm_is_imported(run, capsys, tmp_path, flags):
    (tmp_path / "config.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(str(tmp_path), *flags, f"--port={port}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rollout-server: port {port} is in use")
    assert error.endswith("give another --port [invalid_request]\n")
    assert error.count("\n") == 1


def test_flags_are_looked_at_without_a_server(monkeypatch, capsys, tmp_path):
    model = make_tiny_model(tmp_path, seed=0)
    monkeypatch.setattr(sys, "argv", ["rollout-server", str(model), "--check", "--served-model-name", '["a", "b"]'])
    monkeypatch.setattr(logging.getLogger("lockstep"), "handlers", [])
    monkeypatch.setattr(cli, "_serve", None)
    cli.main()
    assert capsys.readouterr().out.endswith(f"rollout-server: these flags fit {model}\n")


@pytest.mark.usefixtures("_nothing_slow")
@pytest.mark.parametrize("argv", [["{}"], ["--model", "{}"], ["--dtype", "auto", "--model={}"]])
def test_a_model_that_is_not_there_is_one_line_before_vllm_is_imported(run, capsys, tmp_path, argv):
    assert run(*(word.format(tmp_path / "typo") for word in argv)) == 2
    assert capsys.readouterr().err == (
        f"rollout-server: there is no directory {tmp_path}/typo: {tmp_path} has no typo [invalid_request]\n"
    )


@pytest.mark.usefixtures("_nothing_slow")
@pytest.mark.parametrize("flag", [["--node-rank", "1"], ["--node_rank=1"], ["-r", "1"]])
def test_a_host_that_serves_no_http_needs_no_port(tmp_path, flag):
    (tmp_path / "config.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        cli.check_first([str(tmp_path), f"--port={other.getsockname()[1]}", *flag])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chat-template", "/nowhere/chat.jinja"], "chat.jinja"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "typo"], "invalid tool call parser: typo"),
        (["--served-model-name", "base", "policy"], "--served-model-name: policy"),
        (["--served-model-name", "policy:r"], "--served-model-name: policy:r"),
    ],
)
def test_flags_that_would_fail_after_the_model_has_been_loaded_fail_before(flags, words):
    with pytest.raises(ValueError, match=words):
        cli.parse(["model", *flags])


def test_a_base_is_not_called_as_the_adapter_is():
    with pytest.raises(ValueError, match="--served-model-name: policy means the adapter"):
        cli.parse(["policy"])


@pytest.mark.parametrize("flag", ["--tool-parser-plugin", "--reasoning-parser-plugin"])
def test_plugins_are_imported(flag, tmp_path):
    plugin = tmp_path / f"own_{flag[2:6]}_parsers.py"
    plugin.write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    cli.parse(["model", flag, str(plugin)])
    assert (tmp_path / "imported").exists()


_HOSTS = ["model", "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "10.0.0.1"]


@pytest.mark.parametrize("flags", [["--node-rank", "1"], ["--node-rank", "1", "--headless"], []])
def test_hosts_of_one_engine(monkeypatch, flags):
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-all-hosts")
    args, _ = cli.parse([*_HOSTS, *flags])
    assert args.headless is bool(flags)
    assert args.master_addr == "10.0.0.1"
    assert args.worker_extension_cls


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--node-rank", "1"], "hosts of one engine know each other by the token"),
        (["--headless"], "--headless: the host with --node-rank 0 is the server"),
        (["--node-rank", "2"], "--node-rank 2"),
        (["--data-parallel-size", "2"], "--data-parallel-size beside --nnodes"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
    ],
)
def test_hosts_that_cannot_be_of_one_engine(monkeypatch, flags, words):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(InvalidRequest, match=words):
        cli.parse([*_HOSTS, *flags])


def test_the_token_of_hosts_is_taken_out_of_the_environment(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("the-newest-token-of-two\nthe-other-token-of-two\n")
    several, one = (SimpleNamespace(parallel_config=SimpleNamespace(nnodes=nodes)) for nodes in (2, 1))
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-all-hosts")
    assert cli._token_of_hosts(several, ServerSettings()) == "a-token-of-all-hosts"
    assert TOKEN_VARIABLE not in os.environ
    settings = ServerSettings(token_file=str(tmp_path / "token"))
    assert cli._token_of_hosts(several, settings) == "the-newest-token-of-two"
    assert cli._token_of_hosts(one, settings) is None


def test_one_host_is_what_it_was():
    args, _ = cli.parse(["model"])
    assert (args.master_addr, args.headless, args.node_rank) == ("127.0.0.1", False, 0)


def test_a_port_taken_meanwhile_ends_the_server_before_its_engine_begins(monkeypatch):
    async def start(*_):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(lifecycle, "start", start)
    with socket.create_server(("127.0.0.1", 0)) as other:
        args = SimpleNamespace(
            host="127.0.0.1", port=other.getsockname()[1], allowed_origins=[], uvicorn_log_level="info"
        )
        with pytest.raises(InvalidRequest, match="is in use"):
            asyncio.run(cli._serve(args, None, ServerSettings()))


@pytest.mark.parametrize("reported", [True, False])
def test_an_engine_that_dies_while_it_warms_up_gives_its_own_reason(monkeypatch, reported):
    async def start(*_):
        report_errors()
        if reported:
            try:
                raise MemoryError("the worker's reason")
            except MemoryError:
                logging.getLogger("vllm").exception("EngineCore encountered a fatal error.")
        raise RuntimeError("see root cause above")

    vllm = logging.getLogger("vllm")
    monkeypatch.setattr(vllm, "handlers", list(vllm.handlers))
    monkeypatch.setattr(lifecycle, "_start", start)
    words = "MemoryError: the worker's reason" if reported else "see root cause above"
    with pytest.raises(EngineDead, match=words):
        asyncio.run(lifecycle.start(None, None, ServerSettings(), None, None, None))


async def test_an_engine_that_starts_ends_with_a_host_however_late_its_process_begins(monkeypatch):
    killed = []
    children = [[], [SimpleNamespace(kill=lambda: killed.append(1))]]
    monkeypatch.setattr(lifecycle, "_KILL_S", 0.01)
    monkeypatch.setattr(lifecycle.multiprocessing, "active_children", lambda: children.pop(0) if children else [])
    head = SimpleNamespace(lost=asyncio.get_running_loop().create_future())
    ending = asyncio.ensure_future(lifecycle._end_engine(head))
    await asyncio.sleep(0.05)
    assert len(children) == 2
    head.lost.set_result(EngineDead("host 1 has ended"))
    await asyncio.sleep(0.1)
    ending.cancel()
    assert killed == [1]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (ModuleNotFoundError("No module named 'mamba_ssm.ops'", name="mamba_ssm.ops"), "pip install mamba_ssm"),
        (type("GPT2LMHeadModel", (), {}), "cannot serve a GPT2LMHeadModel with LoRA"),
    ],
)
def test_models_that_no_adapter_could_be_served_on(found, words):
    def resolve_model_cls(architectures, model_config):
        if isinstance(found, Exception):
            raise found
        return found, found.__name__

    registry = SimpleNamespace(resolve_model_cls=resolve_model_cls)
    assert words in versions.without_lora(SimpleNamespace(registry=registry, architectures=["A"]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"dtype": torch.float32}, "not lost"),
        ({"quantization": "fp8"}, "quantized"),
        ({"use_mla": True}, "MLA"),
        ({"max_lora_rank": 256}, "of width 2560 would get 1536 columns"),
        ({"lora_dtype": torch.float32}, "dtype of its own"),
        ({"fully_sharded_loras": True}, "fully sharded"),
    ],
)
def test_which_servers_apply_adapters_in_columns_of_their_own_accord(monkeypatch, changed, reason):
    monkeypatch.setattr(versions, "takes_images", lambda model: False)
    model = {"dtype": torch.bfloat16, "quantization": None, "use_mla": False, "get_hidden_size": lambda: 2560}
    lora = {"max_lora_rank": 32, "lora_dtype": changed.get("dtype", torch.bfloat16), "fully_sharded_loras": False}
    config = SimpleNamespace(
        model_config=SimpleNamespace(**model | {name: value for name, value in changed.items() if name in model}),
        lora_config=SimpleNamespace(**lora | {name: value for name, value in changed.items() if name in lora}),
    )
    found = lifecycle.reason_against_columns(config, ServerSettings())
    assert found is None if reason is None else reason in found


def test_graphs_compiled_for_other_layers_are_not_used_again():
    configs = [cli.parse(["model", "--apply", apply])[0].additional_config for apply in ("adapter", "columns")]
    assert configs[0] != configs[1]


def test_columns_have_the_dtype_of_the_weights(monkeypatch):
    monkeypatch.setattr(versions, "without_lora", lambda model: None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            logprobs_mode="processed_logprobs",
            is_moe=False,
            dtype=torch.bfloat16,
            hf_config=SimpleNamespace(model_type="qwen3"),
        ),
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
    lifecycle.check_config(config, ServerSettings())
    with pytest.raises(InvalidRequest, match="--lora-dtype"):
        lifecycle.check_config(config, ServerSettings(apply="columns"))


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


@pytest.mark.parametrize(("name", "said"), [("__mp_main__", "False\n"), ("__main_of_tests__", "")])
def test_processes_that_vllm_spawns_import_it_without_collections(tmp_path: Path, name: str, said: str) -> None:
    (engine := tmp_path / "vllm" / "v1" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()  # or the installed one would be found
    (engine / "core.py").write_text("import gc; print(gc.isenabled())")
    script = f"import runpy; runpy.run_path({cli.__file__!r}, run_name={name!r})"
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[1])])
    child = [sys.executable, "-c", script]
    assert subprocess.check_output(child, text=True, env={**os.environ, "PYTHONPATH": path}) == said


def _parsed(section: str, tmp_path: Path) -> Any:
    """Return what the real parser makes of a recipe's `server:`."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("server:\n" + textwrap.indent(textwrap.dedent(section), "  "))
    return cli.parse(["model", *up_recipe._flags(up_recipe._server_section(read_config_file(recipe)["server"]))])[0]


def test_flags_of_a_recipe_are_of_every_kind_that_vllm_has(tmp_path: Path) -> None:
    args = _parsed(
        """
        served_model_name: [base, "007"]
        ignore_patterns: [a b, "*.bin"]
        cudagraph-capture-sizes: [1, 2, 4]
        allowed-origins: ["http://localhost:3000"]
        middleware: [a.b, c.d]
        device-ids: [2, 3]
        hf-overrides: {rope_theta: 1e6, architectures: [A]}
        compilation-config: {mode: 0}
        default-chat-template-kwargs: {enable_thinking: false}
        enable-prefix-caching: false
        enforce_eager: true
        disable-log-stats: false
        allow-policy-altering: false
        max_model_len: 1k
        seed: null
        logits-processors: []
        """,
        tmp_path,
    )
    assert args.served_model_name == ["base", "007"]
    assert args.ignore_patterns == ["a b", "*.bin"]
    assert args.cudagraph_capture_sizes == [1, 2, 4]
    assert args.allowed_origins == ["http://localhost:3000"]
    assert args.middleware == ["a.b", "c.d"]
    assert args.device_ids == [2, 3]
    assert args.hf_overrides == {"rope_theta": 1e6, "architectures": ["A"]}
    assert args.default_chat_template_kwargs == {"enable_thinking": False}
    assert (args.enable_prefix_caching, args.enforce_eager, args.disable_log_stats) == (False, True, False)
    assert args.max_model_len == 1000
    assert args.logits_processors is None


@pytest.mark.parametrize("section", ["device-ids: []", "served-model-name: []", "middleware: []"])
def test_an_empty_list_in_a_recipe_leaves_a_flag_out(tmp_path: Path, section: str) -> None:
    assert vars(_parsed(section, tmp_path)) == vars(_parsed("{}", tmp_path))


@pytest.mark.parametrize(
    ("flags", "most"), [([], 32768), (["--max-num-queued-reqs", "8"], 8), (["--max-sequences", "4"], 4)]
)
def test_no_request_may_be_larger_than_vllms_queue(flags: list[str], most: int) -> None:
    """It would be told to ask again, for ever."""
    assert cli.parse(["model", *flags])[1].max_sequences == most


@pytest.mark.parametrize("section", ["no-such: false", "enforce_eager: [true]", "hedless: true"])
def test_flags_of_a_recipe_that_there_are_not(tmp_path: Path, section: str) -> None:
    with pytest.raises(InvalidRequest):
        _parsed(section, tmp_path)


@pytest.mark.parametrize(("limit", "most"), [(2, 2), (None, 8)])
async def test_the_warm_up_keeps_to_vllms_limit(limit: int | None, most: int) -> None:
    running = [0]

    async def generate(prompt: Any, params: Any, name: str, **_: Any) -> Any:
        running.append(running[-1] + 1)
        await asyncio.sleep(0)
        yield
        running.append(running[-1] - 1)

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=2),
        scheduler_config=SimpleNamespace(max_num_queued_reqs=limit),
    )
    await lifecycle._warm_up(SimpleNamespace(generate=generate), config, lora=True)
    assert max(running) == most
    assert len(running) == 1 + 2 * 16
