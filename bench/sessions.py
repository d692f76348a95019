"""Chat calls in sessions of agents, which are recorded, beside the same calls without: throughput and processor time.

python -m bench.sessions --quick                                # a tiny model on the CPU, minutes
python -m bench.sessions --json sessions.json                   # on GPU 0

Conversations of several turns, each turn with all that was said before. The two rows take turns on one server, wave by
wave, so that what else the machine does meets both.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.common.harness import Bench
from bench.common.report import Row, fill, spread
from bench.common.servers import Server

PLAIN, SESSION = "chat/completions", "chat/completions in sessions"
#: Words as the models' tokenizer has them: text is made of the tokens that were sampled.
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ASKED = "t5 t6 t7 t8 t9 t10 t11 t12"
LIMIT_S = 600.0


class Target(NamedTuple):
    """A row: what it is measured on, with how many conversations at a time."""

    row: str
    concurrency: int
    server: Server


class WaveFigures(NamedTuple):
    """Of a wave: calls per second, processor seconds a call of the process that answers, seconds of each call."""

    calls_per_s: float
    processor_s: float
    call_s: list[float]


class SessionsBench(Bench):
    """Waves of conversations, with and without sessions."""

    name = "sessions"
    standard = "shape server-flags deadline-s"
    flags = {
        "--concurrency": ("12,64", "conversations at a time"),
        "--calls": (4, "of each conversation"),
        "--tokens": (64, "of each call"),
        "--rounds": (9, "waves of each row that are counted, after one that is not"),
        "--server-gpu": (0, ""),
    }
    quick = "--shape tiny --tokens 32 --concurrency 12"
    row_names = (PLAIN, SESSION)
    same = ("tokens", "calls")
    figure = "calls_per_s"
    about = {"at a time": "concurrency", "row": "row"}
    columns = {
        "n": "{n}",
        "calls/s": "{calls_per_s:.1f}",
        "of plain": "{ratio:.1%}",
        "processor ms/call": "{processor_s_per_call:1e3*.2f}",
        "call ms": "{call_s:1e3*.1f}",
    }
    what = "{shape}, {concurrency} conversations at a time, {row}"
    told = "{calls_per_s:.1f} calls/s, {ratio:.1%} of plain ones, {processor_s_per_call:1e3*.2f} ms of the server each"

    def check(self) -> None:
        super().check()
        self.numbers("concurrency")
        self.at_least(1, "concurrency", "calls", "tokens", "rounds")

    def pick_devices(self) -> list[str]:
        return super().pick_devices()[-1:]

    def run(self) -> None:
        options, most = self.options, max(self.options.concurrency)
        folder = self.shape.write(self.scratch / self.shape.name, self.dtype)
        template = self.scratch / "template.jinja"
        template.write_text(TEMPLATE)
        length = options.calls * (options.tokens + len(ASKED.split())) + 16
        more = ("--load-format", "dummy", "--chat-template", str(template))
        setting = self.setting(length, most, 1.1 * self.shape.kv_bytes * most * length, *more)
        flags = ("--served-model-name", "base", "--max-lora-rank", "8")
        command = ["rollout_server.cli", str(folder)]
        start = functools.partial(setting.start, "rollout-server", command, "server.log", *flags, ready="/ready")
        with self.servers({"server": start}, lambda _: [self._about(most, row) for row in self.row_names]) as servers:
            for concurrency in options.concurrency if servers else ():
                targets = [Target(row, concurrency, servers["server"]) for row in self.row_names]
                self.take_turns(targets, options.rounds, self._turn, self._about_target, figures)

    def _turn(self, target: Target, number: int) -> WaveFigures:
        options, server = self.options, target.server
        before = server.processor_s()
        seconds, each = asyncio.run(
            wave(server.url, target.concurrency, options.calls, options.tokens, in_session=target.row == SESSION)
        )
        return WaveFigures(len(each) / seconds, (server.processor_s() - before) / len(each), each)

    def _about_target(self, target: Target) -> Row:
        return self._about(target.concurrency, target.row)

    def _about(self, concurrency: int, row: str) -> Row:
        return self.about_row(row, shape=self.shape.name, concurrency=concurrency)

    def headline(self, done: Sequence[Row]) -> str:
        text = "{ratio[median]:.1%} at {concurrency}"
        found = [fill(text, row) for row in done if row["row"] == SESSION]
        return f"throughput of chat calls in sessions on {self.where}, of that without: {', '.join(found)}"


def figures(i: int, results: Sequence[list[WaveFigures]]) -> Row:
    """Return a row's figures, ratios round by round."""
    own, plain = results[i], results[0]
    return {
        "n": len(own),
        "calls_per_s": spread([wave.calls_per_s for wave in own]),
        "ratio": spread([a.calls_per_s / b.calls_per_s for a, b in zip(own, plain, strict=False)]),
        "processor_s_per_call": spread([wave.processor_s for wave in own]),
        "processor_ratio": spread([a.processor_s / b.processor_s for a, b in zip(own, plain, strict=False)]),
        "call_s": spread([statistics.median(wave.call_s) for wave in own]),
    }


async def wave(url: str, concurrency: int, calls: int, tokens: int, *, in_session: bool) -> tuple[float, list[float]]:
    """Hold two conversations for each that runs at a time; return the seconds of all, and of each call.

    Raises:
        RuntimeError: an answer that is not what was asked for.
    """
    import aiohttp  # of vLLM's own dependencies; httpx would need as much of a core as a server does

    each: list[float] = []
    limit, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(url, connector=limit, timeout=patience) as http:

        async def asked(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            async with http.request(method, path, json=body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{path} answered {answer.status}: {(await answer.text())[:300]}")
                document: dict[str, Any] = await answer.json()
                return document

        async def converse() -> None:
            path, session_id = "/v1", None
            if in_session:
                sampling = {"ignore_eos": True, "max_tokens": None}
                opened = await asked("POST", "/v1/sessions", {"policy": "base", "sampling": sampling})
                path, session_id = opened["path"], opened["session_id"]
            messages: list[dict[str, str]] = []
            for _ in range(calls):
                messages.append({"role": "user", "content": ASKED})
                body = {"model": "base", "messages": messages, "max_tokens": tokens}
                body |= {"ignore_eos": True, "temperature": 1.0, "skip_special_tokens": False}
                started = time.perf_counter()
                document = await asked("POST", f"{path}/chat/completions", body)
                each.append(time.perf_counter() - started)
                if document["usage"]["completion_tokens"] != tokens:
                    raise RuntimeError(f"{document['usage']} for {tokens} tokens")
                messages.append({"role": "assistant", "content": document["choices"][0]["message"]["content"]})
            if session_id is not None:
                record = await asked("DELETE", f"/v1/sessions/{session_id}")
                if [trajectory["calls"] for trajectory in record["trajectories"]] != [list(range(calls))]:
                    raise RuntimeError(f"{len(record['trajectories'])} trajectories instead of one")

        async def one_after_another() -> None:
            for _ in range(2):
                await converse()

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(one_after_another())
        return time.perf_counter() - started, each


if __name__ == "__main__":
    sys.exit(SessionsBench().main())
