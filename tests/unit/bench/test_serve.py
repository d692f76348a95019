"""What bench.serve asks, checks and writes down; nothing is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench.common.load import GENERATE, completions_body, generate_body
from bench.common.models import SHAPES
from bench.common.servers import Setting
from bench.serve import front_ends
from bench.serve.__main__ import ServeBench
from bench.serve.front_ends import BARE, OURS, ROWS, VLLM, FrontEnd, LoadRequest, http_wave, in_parallel, make_requests
from learner.utils.processes import Stopped
from shared.rollouts import GenerateRequest

TINY = SHAPES["tiny"]
FLAGS = ["--concurrency", "2", "--tokens", "8", "--rounds", "4"]


class Server:
    """Nothing runs."""

    def tail(self) -> str:
        return "log"

    def processor_s(self) -> float:
        return 0.0


def front_end(row: str, seconds: float = 1.0) -> FrontEnd:
    return FrontEnd(row, Server(), lambda requests, at_once: (seconds, [seconds / 2] * len(requests)))  # type: ignore[arg-type]


def measured(front_ends: list[FrontEnd], *more: str) -> ServeBench:
    bench = ServeBench([*FLAGS, *more])
    bench.machine = {"devices": ["a machine"]}
    bench.level(TINY, front_ends, *bench.levels[-1])
    return bench


def test_requests_are_the_same_for_all_and_differ_from_round_to_round() -> None:
    asks = make_requests(100, 64, 512, seed=3)
    assert asks == make_requests(100, 64, 512, seed=3) != make_requests(100, 64, 512, seed=4)
    assert {16, 64} >= {min(ask.tokens for ask in asks), max(ask.tokens for ask in asks)}
    assert all(16 <= len(ask.prompt) <= 64 and min(ask.prompt) >= 3 and max(ask.prompt) < 512 for ask in asks)


def test_both_routes_are_asked_for_the_same() -> None:
    ask = LoadRequest([5, 6], 7, n=3)
    body = generate_body([ask.prompt], ask.tokens, "base", ask.n)
    asked = GenerateRequest.model_validate(body)
    assert asked.prompts[0].token_ids == [5, 6]
    assert asked.policy == "base"
    assert (asked.sampling.max_tokens, asked.sampling.ignore_eos, asked.sampling.temperature) == (7, True, 1.0)
    assert asked.sampling.n == body["sampling"]["n"] == 3
    body = completions_body(ask.prompt, ask.tokens, ask.n)
    assert body["prompt"] == [5, 6]
    assert body["logprobs"] == 0
    assert (body["n"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == (3, 7, True, 1.0)


async def test_never_more_at_a_time_than_asked_for() -> None:
    running, most = 0, 0

    async def send(ask: LoadRequest) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * ask.tokens)
        running -= 1
        return float(ask.tokens)

    seconds, each = await in_parallel(make_requests(20, 8, 512, seed=0), 6, send)
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
    asks = [LoadRequest([5, 6], 4, n=2)] * 5
    try:
        wave = http_wave(url, GENERATE, asks, 2)
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
    order: list[str] = []

    def recorded(row: str, seconds: float) -> FrontEnd:
        one = front_end(row, seconds)
        return one._replace(wave=lambda requests, at_once: (order.append(row), one.wave(requests, at_once))[1])

    bench = measured([recorded(BARE, 1.0), recorded(OURS, 1.25), recorded(VLLM, 2.0)])
    assert order[::2] == order[1::2]
    assert len(order) == 2 * 15
    assert order[:12:2] == [BARE, OURS, VLLM, OURS, VLLM, BARE]
    bare, row, _ = bench.rows
    assert row["n"] == 4
    assert row["requests"] == 4 * 8
    assert row["ratio_to_bare"]["median"] == pytest.approx(0.8)
    assert row["ratio_to_vllm_serve"]["median"] == pytest.approx(1.6)
    assert row["request_s"] == {"median": 0.625, "p95": 0.625}
    assert "ratio_to_bare" not in bare


def test_sequences_at_a_time_are_those_of_all_requests() -> None:
    sent: list[tuple[int, int]] = []

    def wave(requests: Any, at_once: int) -> tuple[float, list[float]]:
        sent.append((len(requests), at_once))
        return 1.0, [1.0] * len(requests)

    flags = ["--concurrency", "256", "--n", "8", "--tokens", "4", "--rounds", "1"]
    bench = measured([FrontEnd(BARE, Server(), wave)], *flags)  # type: ignore[arg-type]
    assert set(sent[1::2]) == {(64, 32)}
    tokens = sum(request.tokens for request in make_requests(64, 4, 512, seed=256_001))
    assert bench.rows[0]["tokens_per_s"]["median"] == 8 * tokens


def test_a_front_end_that_fails_costs_its_own_row_only(tmp_path: Path) -> None:
    def broken(requests: Any, at_once: int) -> Any:
        raise RuntimeError("gone")

    front_ends = [front_end(BARE), FrontEnd(OURS, Server(), broken)]  # type: ignore[arg-type]
    bench = measured(front_ends, "--json", str(tmp_path / "r.json"))
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["ok"] is False
    assert "gone" in document["rows"][1]["error"]
    assert document["headline"] == "nothing was measured"
    lines = bench.table().splitlines()
    assert len(lines) == 4
    assert "gone" in lines[3]


def test_rows_are_written_down_when_it_is_stopped_and_none_begins_too_late() -> None:
    waves = 0

    def stopped(requests: Any, at_once: int) -> Any:
        nonlocal waves
        waves += 1
        if waves == 6:
            raise Stopped("SIGTERM")
        return 1.0, [0.5] * len(requests)

    bench = ServeBench(FLAGS)
    with pytest.raises(Stopped):
        bench.level(TINY, [front_end(BARE), FrontEnd(OURS, Server(), stopped)], 2, 1)  # type: ignore[arg-type]
    assert [row["n"] for row in bench.rows] == [1, 1]
    late = measured([front_end(BARE)], "--deadline-s", "-1")
    assert late.rows[0]["skipped"] == "the deadline had passed"


def test_the_headline_is_our_routes_share() -> None:
    bench = measured([front_end(BARE), front_end(OURS, 1.25), front_end(VLLM, 2.0)])
    assert bench.document()["headline"] == (
        "throughput of /v1/generate on a machine: "
        "tiny at 2, 1 a request: 80.0% of the bare engine, 160.0% of vllm serve"
    )


def test_all_have_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, str] = {}

    class Recorded:
        def __init__(self, name: str, command: list[str], *rest: Any, **more: Any) -> None:
            started[name], self.url = " ".join(command), "http://nowhere"

    monkeypatch.setattr("bench.common.servers.Server", Recorded)
    setting = Setting(tmp_path, "cpu", None, "float32", ("--dtype", "float32"))
    for name in dict.fromkeys(ROWS.values()):
        front_ends.start(name, setting, tmp_path, 8)
    assert set(started) == {"engine", "rollout-server", "vllm serve"}
    for command in started.values():
        assert "--max-lora-rank 8" in command
        assert "--dtype float32" in command
    assert "--enable-lora --max-loras 2" in started["vllm serve"]
    assert "rollout_server.worker.extension.AdapterWorker" in started["vllm serve"]


def test_only_servers_of_the_rows_that_are_asked_for() -> None:
    bench = ServeBench([*FLAGS, "--only", f"{BARE},{OURS}"])
    abouts = {name: [about["row"] for about in bench._abouts(TINY, name)] for name in dict.fromkeys(ROWS.values())}
    assert abouts == {"engine": [BARE], "rollout-server": [OURS], "vllm serve": []}


def test_the_key_value_cache_has_room_for_the_highest_level() -> None:
    bench = ServeBench(["--concurrency", "1,256", "--n", "1,8"])
    bench.device = "cuda:0"
    flags = [flag for flag in bench.sized(SHAPES["qwen3-4b"]).engine_flags if flag != "--no-enable-prefix-caching"]
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    assert values["--max-num-seqs"] == "256"
    assert values["--load-format"] == "dummy"
    assert 256 * 320 * 147_456 < int(values["--kv-cache-memory-bytes"]) < 14e9
    assert "--no-enable-prefix-caching" in bench.sized(TINY).engine_flags


def test_levels_are_whole_numbers_of_requests() -> None:
    assert ServeBench(["--concurrency", "32,4", "--n", "8,1"]).levels == [(4, 1), (32, 1), (32, 8)]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--only", "theirs"], "unknown row"),
        (["--concurrency", "0,4"], "1 or more"),
        (["--rank", "999"], "above"),
        (["--n", "0"], "1 or more"),
        (["--concurrency", "1,4", "--n", "8"], "multiple"),
    ],
)
def test_refused(flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        ServeBench(flags)
    assert word in capsys.readouterr().err
