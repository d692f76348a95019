"""What bench.serve asks, checks and writes down; nothing is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench.common.shapes import SHAPES
from bench.serve import __main__ as serve
from bench.serve import contenders as serve_contenders
from bench.serve.__main__ import ServeReport, figures, measure, serve_table, sized_flags
from bench.serve.contenders import BARE, OURS, ROWS, VLLM, Contender
from bench.serve.load import Ask, completions_body, generate_body, http_wave, in_parallel, make_asks
from learner.utils.processes import Stopped
from shared.rollouts import GenerateRequest

OPTIONS = serve.make_parser().parse_args(["--concurrency", "2", "--tokens", "8", "--rounds", "4"])


class Server:
    """Nothing runs."""

    def tail(self) -> str:
        return "log"

    def processor_s(self) -> float:
        return 0.0


def contender(row: str, seconds: float = 1.0) -> Contender:
    return Contender(row, Server(), lambda asks, concurrency: (seconds, [seconds / 2] * len(asks)))  # type: ignore[arg-type]


def add_rows(report: ServeReport, contenders: list[Contender]) -> None:
    about = {"shape": "tiny", "concurrency": 2, "completions": 1, "ok": True}
    for one in contenders:
        report.add({**about, "row": one.row, **figures(one, contenders)})


def test_requests_are_the_same_for_all_and_differ_from_round_to_round() -> None:
    asks = make_asks(100, 64, 512, seed=3)
    assert asks == make_asks(100, 64, 512, seed=3) != make_asks(100, 64, 512, seed=4)
    assert {16, 64} >= {min(ask.tokens for ask in asks), max(ask.tokens for ask in asks)}
    assert all(16 <= len(ask.prompt) <= 64 and min(ask.prompt) >= 3 and max(ask.prompt) < 512 for ask in asks)


def test_both_routes_are_asked_for_the_same() -> None:
    ask = Ask([5, 6], 7, n=3)
    path, body = generate_body(ask, "base")
    asked = GenerateRequest.model_validate(body)
    assert path == "/v1/generate"
    assert asked.prompts[0].token_ids == [5, 6]
    assert asked.policy == "base"
    assert (asked.sampling.max_tokens, asked.sampling.ignore_eos, asked.sampling.temperature) == (7, True, 1.0)
    assert asked.sampling.n == body["sampling"]["n"] == 3
    path, body = completions_body(ask, "base")
    assert path == "/v1/completions"
    assert body["prompt"] == [5, 6]
    assert body["logprobs"] == 0
    assert (body["n"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == (3, 7, True, 1.0)


async def test_never_more_at_a_time_than_asked_for() -> None:
    running, most = 0, 0

    async def send(ask: Ask) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * ask.tokens)
        running -= 1
        return float(ask.tokens)

    seconds, each = await in_parallel(make_asks(20, 8, 512, seed=0), 6, send)
    assert most == 6
    assert len(each) == 20
    assert seconds >= max(each) / 1000


@pytest.mark.parametrize(
    ("fault", "word"),
    [(None, ""), ("short", "not 4"), ("logprobs", "not 4"), ("fewer", "each of 2"), ("status", "answered 500")],
)
async def test_answers_over_http_are_checked(fault: str | None, word: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        count = json.loads(await request.read())["sampling"]["max_tokens"]
        found = {"token_ids": [7] * (count - (fault == "short")), "logprobs": [-1.0] * (count - (fault == "logprobs"))}
        completions = [found] * (2 - (fault == "fewer"))
        return web.json_response({"groups": [{"completions": completions}]}, status=500 if fault == "status" else 200)

    app = web.Application()
    app.router.add_post("/v1/generate", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    asks = [Ask([5, 6], 4, n=2)] * 5
    try:
        wave = http_wave(url, asks, 2, lambda ask: generate_body(ask, "base"))
        if fault is None:
            seconds, each = await wave
            assert len(each) == 5
            assert 0 < max(each) <= seconds
        else:
            with pytest.raises(RuntimeError, match=word):
                await wave
    finally:
        await runner.cleanup()


def test_a_row_says_what_it_reaches_of_the_others() -> None:
    contenders = [contender(BARE), contender(OURS, 1.25), contender(VLLM, 2.0)]
    order: list[str] = []
    for one in contenders:
        wave = one.wave
        one.wave = lambda asks, concurrency, row=one.row, wave=wave: (order.append(row), wave(asks, concurrency))[1]  # type: ignore[misc]
    measure(contenders, 2, 1, OPTIONS, 512)
    assert order[::2] == order[1::2]
    assert len(order) == 2 * 15
    assert order[:12:2] == [BARE, OURS, VLLM, OURS, VLLM, BARE]
    row = figures(contenders[1], contenders)
    assert row["n"] == 4
    assert row["requests"] == 4 * 8
    assert row["ratio_to_bare"]["median"] == pytest.approx(0.8)
    assert row["ratio_to_vllm_serve"]["median"] == pytest.approx(1.6)
    assert row["request_s"] == {"median": 0.625, "p95": 0.625}
    assert "ratio_to_bare" not in figures(contenders[0], contenders)


def test_sequences_at_a_time_are_those_of_all_requests() -> None:
    sent: list[tuple[int, int]] = []

    def wave(asks: Any, at_once: int) -> tuple[float, list[float]]:
        sent.append((len(asks), at_once))
        return 1.0, [1.0] * len(asks)

    one = Contender(BARE, Server(), wave)  # type: ignore[arg-type]
    options = serve.make_parser().parse_args(["--tokens", "4", "--rounds", "1"])
    measure([one], 256, 8, options, 512)
    assert set(sent[1::2]) == {(64, 32)}
    tokens = sum(ask.tokens for ask in make_asks(64, 4, 512, seed=256_001))
    assert figures(one, [one])["tokens_per_s"]["median"] == 8 * tokens


def test_a_contender_that_fails_costs_its_own_row_only(tmp_path: Path) -> None:
    def broken(asks: Any, concurrency: int) -> Any:
        raise RuntimeError("gone")

    contenders = [contender(BARE), Contender(OURS, Server(), broken)]  # type: ignore[arg-type]
    measure(contenders, 2, 1, OPTIONS, 512)
    report = ServeReport(tmp_path / "r.json", {"devices": ["a machine"]})
    add_rows(report, contenders)
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["ok"] is False
    assert "gone" in document["rows"][1]["error"]
    assert document["headline"] == "nothing was measured"
    lines = serve_table(document["rows"]).splitlines()
    assert len(lines) == 4
    assert "gone" in lines[3]


def test_a_round_counts_as_a_whole_and_none_begins_too_late() -> None:
    contenders = [contender(BARE), contender(OURS)]
    measure(contenders, 2, 1, OPTIONS, 512, deadline=0.0)
    assert [figures(one, contenders)["n"] for one in contenders] == [1, 1]
    contenders = [contender(BARE), contender(OURS)]
    waves, wave = 0, contenders[1].wave

    def stopped(asks: Any, concurrency: int) -> Any:
        nonlocal waves
        waves += 1
        if waves == 6:
            raise Stopped("SIGTERM")
        return wave(asks, concurrency)

    contenders[1].wave = stopped
    with pytest.raises(Stopped):
        measure(contenders, 2, 1, OPTIONS, 512)
    assert [figures(one, contenders)["n"] for one in contenders] == [1, 1]
    assert "skipped" in figures(contender(VLLM), contenders)


def test_the_headline_is_our_routes_share(tmp_path: Path) -> None:
    contenders = [contender(BARE), contender(OURS, 1.25), contender(VLLM, 2.0)]
    measure(contenders, 2, 1, OPTIONS, 512)
    report = ServeReport(None, {"devices": ["a machine"]})
    add_rows(report, contenders)
    assert report.document()["headline"] == (
        "throughput of /v1/generate on a machine: "
        "tiny at 2, 1 a request: 80.0% of the bare engine, 160.0% of vllm serve"
    )


def test_all_have_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, list[str]] = {}

    class Recorded:
        def __init__(self, name: str, command: list[str], *rest: Any, **more: Any) -> None:
            started[name], self.url = command, "http://nowhere"

    monkeypatch.setattr(serve_contenders, "Server", Recorded)
    options = serve.make_parser().parse_args(["--rank", "8"])
    options.only = [BARE, OURS]
    serve_contenders.start(SHAPES["tiny"], tmp_path, tmp_path, options, [], None)
    assert set(started) == {"engine", "rollout-server"}  # those of the rows that are asked for
    options.only = ROWS
    rows = serve_contenders.start(SHAPES["tiny"], tmp_path, tmp_path, options, ["--dtype", "float32"], None)
    assert tuple(one.row for one in rows) == ROWS
    assert set(started) == {"engine", "rollout-server", "vllm serve"}
    for command in started.values():
        joined = " ".join(command)
        assert "--max-lora-rank 8" in joined
        assert "--dtype float32" in joined
    assert "--enable-lora --max-loras 2" in " ".join(started["vllm serve"])
    assert "rollout_server.worker.extension.AdapterWorker" in started["vllm serve"]


def test_the_key_value_cache_has_room_for_the_highest_level() -> None:
    options = serve.make_parser().parse_args([])
    options.levels = [(1, 1), (256, 8)]
    flags = sized_flags(SHAPES["qwen3-4b"], options, "cuda:0")
    pairs = [flag for flag in flags if flag != "--no-enable-prefix-caching"]
    values = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert len(pairs) == len(flags) - 1
    assert values["--max-num-seqs"] == "256"
    assert values["--load-format"] == "dummy"
    assert 256 * 320 * 147_456 < int(values["--kv-cache-memory-bytes"]) < 14e9
    assert "--kv-cache-memory-bytes" not in sized_flags(SHAPES["tiny"], options, "cpu")


def test_levels_are_whole_numbers_of_requests() -> None:
    options = serve.make_parser().parse_args(["--concurrency", "32,4", "--n", "8,1"])
    assert serve.levels(options) == [(4, 1), (32, 1), (32, 8)]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--shapes", "qwen3-5b"], "unknown shape"),
        (["--only", "theirs"], "unknown row"),
        (["--concurrency", "0,4"], "1 or more"),
        (["--rank", "999"], "above"),
        (["--n", "0"], "1 or more"),
        (["--concurrency", "1,4", "--n", "8"], "multiple"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.main(flags)
    assert word in capsys.readouterr().err
