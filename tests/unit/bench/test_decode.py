"""What bench.decode asks, checks and writes down; the servers are stand-ins."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench import decode
from bench.common.fidelity import ADAPTER_STD, divergence
from bench.common.harness import Skip
from bench.common.load import random_prompts
from bench.common.models import SHAPES, Policy, optimizer_step, write_weights
from bench.common.servers import Setting
from bench.decode import (
    ADAPTER,
    BASE,
    COLUMNS,
    COLUMNS_BASE,
    FP8,
    INVARIANT,
    MERGE,
    PLAIN,
    DecodeBench,
    Target,
)
from shared.rollouts import GenerateRequest
from shared.weights import WeightVersion

TINY = SHAPES["tiny"]
VERSION = WeightVersion(run_id="r", fence=0, step=5)


class Fake:
    """Answers on both routes: token t of a sequence is 7, its logprob -1.5."""

    def __init__(self, version: WeightVersion | None = None, short: bool = False) -> None:
        self.version, self.short, self.bodies = version, short, list[Any]()
        self.http = httpx.Client(base_url="http://fake", transport=httpx.MockTransport(self.answer))

    def answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append((request.url.path, body))
        if request.url.path == "/v1/completions":
            ids, logprobs = self.tokens(body["max_tokens"])
            choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
            choices = [{**choice, "index": i} for i in range(len(body["prompt"]))]
            return httpx.Response(200, json={"choices": choices[::-1]})
        asked = GenerateRequest.model_validate(body)
        ids, logprobs = self.tokens(asked.sampling.max_tokens or 0)
        version = self.version.model_dump() if self.version else None
        spans = [{"version": version, "start": 0, "end": len(ids), "kv": "fresh"}]
        group = {"completions": [{"token_ids": ids, "logprobs": logprobs, "spans": spans}]}
        return httpx.Response(200, json={"epoch": "e", "groups": [group] * len(asked.prompts)})

    def tokens(self, count: int) -> tuple[list[int], list[float]]:
        count -= self.short
        return [7] * count, [-1.5] * count

    def target(self, row: str, policy: WeightVersion | str | None = None) -> Target:
        return Target(row, Server(), self.http, policy)  # type: ignore[arg-type]


class Server:
    """Nothing runs."""

    name, start_s, started = "fake", 1.0, 0.0

    def tail(self) -> str:
        return "log"

    def gpu_memory(self) -> int | None:
        return 123

    def wait_ready(self, timeout_s: float) -> None:
        pass

    def end(self) -> None:
        pass


def test_both_kinds_of_server_are_asked_for_the_same() -> None:
    prompts = random_prompts(3, 512, 16, seed=0)
    plain, ours, base = Fake(), Fake(VERSION), Fake()
    for target in (plain.target(PLAIN), ours.target(ADAPTER, VERSION), base.target(BASE, "base")):
        sampled, seconds = target.ask(prompts, 4)
        assert sampled == [([7] * 4, [-1.5] * 4)] * 3
        assert seconds > 0
    [(path, body)] = plain.bodies
    assert path == "/v1/completions"
    assert body["prompt"] == prompts
    assert body["logprobs"] == 0
    assert (body["ignore_eos"], body["temperature"], body["max_tokens"], body["n"]) == (True, 1.0, 4, 1)
    [(path, body)] = ours.bodies
    asked = GenerateRequest.model_validate(body)
    assert path == "/v1/generate"
    assert asked.policy == VERSION
    assert asked.return_text is False
    assert [prompt.token_ids for prompt in asked.prompts] == prompts
    assert (asked.sampling.ignore_eos, asked.sampling.temperature, asked.sampling.max_tokens) == (True, 1.0, 4)


@pytest.mark.parametrize(
    ("target", "word"),
    [
        (Fake(short=True).target(PLAIN), "came back"),
        (Fake(VERSION).target(BASE, "base"), "not of base"),
        (Fake().target(ADAPTER, VERSION), "not of"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_no_figure(target: Target, word: str) -> None:
    with pytest.raises(RuntimeError, match=word):
        target.ask([[1, 2]], 4)


def test_divergence_estimates_the_kl_of_served_from_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64)
    served, own = logits.log_softmax(0), (logits + 0.1 * torch.randn(50, dtype=torch.float64)).log_softmax(0)
    kl = (served.exp() * (served - own)).sum().item()
    ids = torch.multinomial(served.exp(), 200_000, replacement=True)
    figures = divergence(served[ids], own[ids])
    assert figures["kl_k3"] == pytest.approx(kl, rel=0.05)
    assert figures["kl_k1"] == pytest.approx(kl, abs=1e-3)
    assert figures["mean_abs_gap"] > figures["kl_k3"] > 0


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    folder = TINY.write(tmp_path_factory.mktemp("model"), "float32")
    made = Policy(folder, "cpu", "float32")
    write_weights(made, TINY, folder, "float32")
    return made, folder


def test_the_servers_load_the_learners_base(policy: tuple[Policy, Path]) -> None:
    made, folder = policy
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert json.loads((folder / "config.json").read_text()) == TINY.config("float32")
    for name, tensor in made.base.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def serve(model: PeftModel, target: Target, monkeypatch: pytest.MonkeyPatch, adapter: bool) -> None:
    """Lets `target` answer with the logprobs of the model itself, computed token by token."""

    def ask(prompts: list[list[int]], tokens: int) -> Any:
        rows = [prompt + random_prompts(1, TINY.vocab, tokens, seed=i)[0] for i, prompt in enumerate(prompts)]
        ids = torch.tensor(rows)
        with torch.no_grad():
            if adapter:
                logits = model(input_ids=ids).logits
            else:
                with model.disable_adapter():
                    logits = model(input_ids=ids).logits
        own = [
            [logits[b, t - 1].log_softmax(-1)[row[t]].item() for t in range(len(prompts[b]), len(row))]
            for b, row in enumerate(rows)
        ]
        return [(row[len(prompts[0]) :], logprobs) for row, logprobs in zip(rows, own, strict=True)], 1.0

    monkeypatch.setattr(target, "ask", ask)


def test_fidelity_sees_a_forgotten_adapter(policy: tuple[Policy, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with policy[0].adapter(8, "float32") as model:
        optimizer_step(model, ADAPTER_STD)
        gaps = {}
        for row, adapter in ((ADAPTER, True), (MERGE, False), (BASE, False)):
            target = Fake().target(row, "base")
            serve(model, target, monkeypatch, adapter)
            gaps[row] = target.fidelity(model, TINY.vocab)
    assert gaps[ADAPTER]["tokens"] == 8 * 64
    assert gaps[ADAPTER]["max_abs_gap"] < 1e-5
    assert gaps[BASE]["max_abs_gap"] < 1e-5
    assert gaps[MERGE]["mean_abs_gap"] == pytest.approx(gaps[MERGE]["adapter_effect"], rel=1e-3)
    assert gaps[ADAPTER]["one_product_max_abs_gap"] < 1e-5
    assert gaps[MERGE]["one_product_mean_abs_gap"] == pytest.approx(gaps[MERGE]["adapter_effect"], rel=1e-3)
    assert gaps[MERGE]["mean_abs_gap"] > 100 * gaps[ADAPTER]["mean_abs_gap"]


def make_bench(tmp_path: Path, *more: str) -> DecodeBench:
    flags = ["--shapes", "tiny", "--rank", "8", "--batches", "2,4", "--tokens", "4", "--waves", "3"]
    bench = DecodeBench([*flags, "--json", str(tmp_path / "decode.json"), *more])
    bench.scratch = bench.work = tmp_path
    return bench


def test_servers_take_turns_and_a_failure_stays_in_its_row(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    fakes = {PLAIN: Fake(), ADAPTER: Fake(VERSION), MERGE: Fake(VERSION, short=True)}
    targets = [fakes[PLAIN].target(PLAIN), *(fakes[row].target(row, VERSION) for row in (ADAPTER, MERGE))]
    bench.waves(TINY, targets, 2)
    plain, adapter, merge = bench.rows
    assert plain["ratio_to_plain"] == {"median": 1.0, "mean": 1.0, "min": 1.0, "max": 1.0}
    assert adapter["n"] == 3
    assert adapter["gpu_memory_mib"] == 123
    ratios = sorted(p / a for p, a in zip(plain["waves_s"], adapter["waves_s"], strict=True))
    assert adapter["ratio_to_plain"]["median"] == pytest.approx(ratios[1], rel=0.02)
    assert adapter["tokens_per_s"]["max"] == pytest.approx(2 * 4 / min(adapter["waves_s"]), rel=0.02)
    assert not merge["ok"]
    assert "came back" in merge["error"]
    # One wave that is not counted; every server is sent the same prompts; a server that failed is asked no more.
    assert [len(fakes[row].bodies) for row in (PLAIN, ADAPTER, MERGE)] == [4, 4, 1]
    sent = [[prompt["token_ids"] for prompt in body["prompts"]] for _, body in fakes[ADAPTER].bodies]
    assert sent == [body["prompt"] for _, body in fakes[PLAIN].bodies]
    document = json.loads((tmp_path / "decode.json").read_text())
    assert set(document) == {"headline", "ok", "machine", "rows"}
    assert not document["ok"]


def test_after_the_deadline_rows_are_skipped(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.deadline = time.monotonic() - 1
    bench.waves(TINY, [Fake().target(PLAIN)], 2)
    assert bench.rows[0]["skipped"] == "the deadline had passed"
    assert bench.document()["ok"] is False


@pytest.mark.parametrize("more", [["--parallel-start"], []])
def test_a_server_that_does_not_know_the_flag(
    policy: tuple[Policy, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    class Refuses(Server):
        def wait_ready(self, timeout_s: float) -> None:
            raise RuntimeError("unrecognized arguments: --apply merge")

    def open_targets(name: str, server: Any, model: Any, stack: Any) -> list[Target]:
        if name == PLAIN:
            return [Fake().target(PLAIN)]
        row, *base = decode.SERVERS[name][0]
        return [Fake(VERSION).target(row, VERSION), *(Fake().target(one, "base") for one in base)]

    monkeypatch.setattr(decode, "start", lambda name, *_: Refuses() if name == MERGE else Server())
    monkeypatch.setattr(decode, "open_targets", open_targets)
    bench = make_bench(tmp_path, *more)
    bench.run()
    rows = {(row["row"], row["batch"]): row for row in bench.rows}
    assert len(rows) == len(bench.rows) == 18
    for batch in (2, 4):
        assert "unrecognized" in rows[MERGE, batch]["error"]
        assert all(rows[row, batch]["ratio_to_plain"] for row in (PLAIN, ADAPTER, BASE, COLUMNS, COLUMNS_BASE))
        assert rows[ADAPTER, batch]["fidelity"]["adapter_effect"] > 0
        assert rows[COLUMNS, batch]["fidelity"]["adapter_effect"] > 0
        assert rows[INVARIANT, batch]["fidelity"]["one_product_mean_abs_gap"] > 0


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("bench.common.servers.Server", lambda name, command, *_, **__: started.append(command))
    setting = Setting(tmp_path, "cuda:0", "0", "float32", ("--dtype", "float32"))
    for name in decode.SERVERS:
        decode.start(name, setting, tmp_path / "tiny", 8)
    plain, adapter, columns, merge, invariant, *quantized = started
    assert not any("lora" in word for word in plain)
    assert plain[-2:] == ["--dtype", "float32"]
    assert "rollout_server.cli" in adapter
    assert adapter[-2:] == ["--apply", "adapter"]
    assert columns[-2:] == ["--apply", "columns"]
    assert merge[-2:] == ["--apply", "merge"]
    assert invariant[-3:] == ["--apply", "columns", "--deterministic"]
    assert [command[-2:] for command in quantized] == [["--quantization", "fp8"], ["--quantization", "bitsandbytes"]]


def test_bases_are_quantized_on_gpus_only(tmp_path: Path) -> None:
    with pytest.raises(Skip, match="GPUs"):
        decode.start(FP8, Setting(tmp_path, "cpu", None, "float32", ()), tmp_path / "tiny", 8)


def test_the_key_value_cache_has_room_for_the_largest_wave() -> None:
    bench = DecodeBench(["--batches", "32,256", "--tokens", "256"])
    bench.device = "cuda:0"
    flags = bench.sized(SHAPES["qwen3-4b"]).engine_flags
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert values["--max-num-seqs"] == "256"
    assert values["--max-model-len"] == "288"
    assert 256 * 272 * 147_456 < int(values["--kv-cache-memory-bytes"]) < 13e9


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--batches", "0,4"], "1 or more"),
        (["--batches", "many"], "many"),
        (["--batch-invariant"], "GPUs only"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        DecodeBench(flags)
    assert word in capsys.readouterr().err


def test_table_and_picture(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    for batch in (2, 4):
        short = Fake(short=True).target(MERGE, VERSION)
        bench.waves(TINY, [Fake().target(PLAIN), Fake(VERSION).target(ADAPTER, VERSION), short], batch)
    lines = bench.table().splitlines()
    assert len(lines) == 2 + 6
    assert "error: RuntimeError" in lines[4]
    assert "100.0%" in lines[2]
    bench.plot(tmp_path / "a.png", bench.measured())
    bench.plot(tmp_path / "b.png", [])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
