"""Who is measured in `bench.serve`: one engine behind four front ends, and how a wave of requests is sent to each."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common.servers import Server, environment, free_port
from bench.common.shapes import Shape, served_rank
from bench.contenders.vllm_adapter_files import vllm_serve
from bench.serve.load import WAVE_LIMIT_S, Ask, completions_body, generate_body, http_wave

BARE, OURS, OUR_OPENAI, VLLM = "AsyncLLM in process", "/v1/generate", "our /v1/completions", "vllm serve"
OUR_BODIES = ((OURS, generate_body), (OUR_OPENAI, completions_body))
ROWS = (BARE, OURS, OUR_OPENAI, VLLM)
NOTES = {
    BARE: "its requests are made in its own process: no HTTP, no JSON, no client",
    OUR_OPENAI: "vLLM's own handlers behind our proxy; they make the texts, too",
    VLLM: "with our worker class and adapter slots, so that the engine is the same; makes the texts, too",
}
Wave = Callable[[Sequence[Ask], int], tuple[float, list[float]]]  # seconds of the whole and of each request


@dataclass
class Contender:
    """One row: a server, and how a wave is sent to it."""

    row: str
    server: Server
    wave: Wave
    tokens_per_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)  # a token, of the process that answers requests
    request_s: list[float] = field(default_factory=list)
    failed: str | None = None


def start(
    shape: Shape, folder: Path, work: Path, options: argparse.Namespace, flags: Sequence[str], device: str | None
) -> list[Contender]:
    """The servers of all rows that are asked for, none of them ready yet."""
    rank = str(served_rank(options.rank))
    slots = (
        "--enable-lora",
        "--max-loras",
        "2",
        "--max-cpu-loras",
        "2",
        "--worker-extension-cls",
        "rollout_server.worker.extension.AdapterWorker",
        "--logprobs-mode",
        "processed_logprobs",
    )
    common = ("--served-model-name", "base", "--max-lora-rank", rank, *flags)

    def server(name: str, module: Sequence[str], more: Sequence[str], ready: str) -> Server:
        port = free_port()
        command = [sys.executable, "-m", *module, "--host", "127.0.0.1", "--port", str(port), *common, *more]
        return Server(
            name, command, port, work / f"{shape.name}-{name.replace(' ', '-')}.log", environment(device), ready=ready
        )

    contenders: list[Contender] = []
    if BARE in options.only:
        bare = server("engine", ["bench.serve.engine", str(folder)], (), "/health")
        contenders.append(Contender(BARE, bare, functools.partial(_engine_wave, bare.url)))
    wanted = [(row, make) for row, make in OUR_BODIES if row in options.only]
    if wanted:
        own = server("rollout-server", ["rollout_server.cli", str(folder)], (), "/ready")
        contenders += [Contender(row, own, _over_http(own.url, make)) for row, make in wanted]
    if VLLM in options.only:
        vllm = server("vllm serve", vllm_serve(folder), slots, "/health")
        contenders.append(Contender(VLLM, vllm, _over_http(vllm.url, completions_body)))
    return contenders


def _over_http(url: str, make: Callable[[Ask, str], tuple[str, dict[str, Any]]]) -> Wave:
    return lambda asks, concurrency: asyncio.run(http_wave(url, asks, concurrency, lambda ask: make(ask, "base")))


def _engine_wave(url: str, asks: Sequence[Ask], concurrency: int) -> tuple[float, list[float]]:
    body = json.dumps({"asks": asks, "concurrency": concurrency}).encode()
    with urllib.request.urlopen(f"{url}/wave", body, timeout=WAVE_LIMIT_S) as answer:
        document = json.load(answer)
    return document["seconds"], document["each"]
