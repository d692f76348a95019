"""Decoded tokens per second of a rollout server, its adapter applied in two ways, against a plain vLLM without LoRA.

python -m bench.decode --quick                                 # a tiny model on the CPU, minutes
python -m bench.decode --parallel-start --json decode.json --plot decode.png    # learner GPU 0, servers GPU 1
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel

from bench.common.choices import pick_devices
from bench.common.measure import Setting, divergence, random_prompts, spread
from bench.common.policy import Policy, trained, wait_for, write_weights
from bench.common.report import LATE, Rates, bars, describe, machine, rates_table
from bench.common.servers import Server, Way, engine_flags, environment, free_port
from bench.common.shapes import Shape, pick_shapes, served_rank
from bench.contenders.lockstep import HTTP, OurPath, Ours
from bench.contenders.vllm_adapter_files import vllm_serve
from learner.servers.client import RolloutClient
from learner.utils.processes import Stopped, stop_on_signals
from shared.weights import WeightVersion

PLAIN, ADAPTER, MERGE = "plain vLLM (no LoRA)", "lockstep --apply adapter", "lockstep --apply merge"
BASE = "lockstep --apply adapter, base requests"
#: Which rows are measured on the server of that name, and its flags.
SERVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    PLAIN: ((PLAIN,), ()),
    ADAPTER: ((ADAPTER, BASE), ()),  # the default: a rollout-server that does not know the flag serves these, too
    MERGE: ((MERGE,), ("--apply", "merge")),
}
ROWS = tuple(row for rows, _ in SERVERS.values() for row in rows)
NOTES = {PLAIN: "its /v1/completions also makes the texts; ours was asked for token ids and logprobs only"}
PROMPT_TOKENS, PUSHES, WAVE_LIMIT_S = 16, 5, 300.0
FIDELITY_SEQUENCES, FIDELITY_TOKENS = 8, 64
#: Of both LoRA matrices. At rank 32 it changes the base's weights by a twentieth of their size (0.0011 of 0.02).
ADAPTER_STD = 0.01


@dataclass
class Run:
    """All servers of one shape, all batches."""

    setting: Setting
    options: argparse.Namespace
    report: Rates
    shape: Shape
    folder: Path
    deadline: float

    def all_servers(self) -> None:
        policy = Policy(self.folder, torch.device(self.setting.device), self.setting.dtype)
        write_weights(policy, self.shape, self.folder, self.setting.dtype)
        with policy.adapter(self.options.rank, "float32") as model:
            for names in [list(SERVERS)] if self.options.parallel_start else [[name] for name in SERVERS]:
                with contextlib.ExitStack() as stack:
                    ways = self.ready(names, model, stack)
                    for batch in self.options.batches if ways else ():
                        self.waves(ways, batch)

    def ready(self, names: Sequence[str], model: PeftModel, stack: contextlib.ExitStack) -> list[Way]:
        """Start these servers, push to ours; the rows that can be measured."""
        servers, ways = {}, []
        for name in names:
            with self.failure_kept(SERVERS[name][0]):
                if self.late():
                    self.add_all(SERVERS[name][0], {"skipped": LATE})
                    continue
                servers[name] = start(name, self.setting, self.folder, served_rank(self.options.rank))
                stack.callback(servers[name].end)
        for name, server in servers.items():
            with self.failure_kept(SERVERS[name][0]):
                server.wait_ready(min(self.setting.start_timeout_s, self.deadline - server.started))
                print(f"bench: {name} ready after {server.start_s:.0f} s", flush=True)
                found = open_ways(name, server, model, stack)
                for way in found:
                    way.figures |= fidelity(way, model, self.shape.vocab)
                ways += found
        return ways

    def waves(self, ways: Sequence[Way], batch: int) -> None:
        """One wave that is not counted and those that are, the servers taking turns."""
        seconds: dict[str, list[float]] = {way.row: [] for way in ways}
        failed: dict[str, str] = {}
        for wave in range(self.options.waves + 1):
            prompts = random_prompts(batch, self.shape.vocab, PROMPT_TOKENS, seed=wave)
            for way in (*ways[wave % len(ways) :], *ways[: wave % len(ways)]):
                if way.row in failed or self.late():
                    continue
                try:
                    _, took = way.ask(prompts, self.options.tokens)
                    seconds[way.row] += [took] if wave else []
                except Exception as error:
                    failed[way.row] = f"{describe(error)}; {way.server.tail()}"
        for way in ways:
            if way.row in failed:
                self.add(way.row, batch, {"ok": False, "error": failed[way.row]})
            elif seconds[way.row]:
                rates = self.rates(way.row, batch, seconds[way.row])
                self.add(way.row, batch, {**rates, **way.figures, "gpu_memory_mib": way.server.gpu_memory()})
            else:
                self.add(way.row, batch, {"skipped": LATE})

    def rates(self, row: str, batch: int, seconds: list[float]) -> dict[str, Any]:
        """Tokens per second, and wave by wave against the plain vLLM of this run."""
        measured = self.report.has(self.shape.name, batch, PLAIN) or {}
        plain = seconds if row == PLAIN else measured.get("waves_s", [])
        ratios = [plain_s / s for plain_s, s in zip(plain, seconds, strict=False)]
        return {
            "n": len(seconds),
            "tokens_per_s": spread([batch * self.options.tokens / s for s in seconds]),
            "waves_s": [round(s, 6) for s in seconds],
            **({"ratio_to_plain": spread(ratios)} if ratios else {}),
        }

    @contextlib.contextmanager
    def failure_kept(self, rows: Sequence[str]) -> Iterator[None]:
        """A failure becomes rows."""
        try:
            yield
        except Exception as error:
            self.add_all(rows, {"ok": False, "error": describe(error)})

    def add_all(self, rows: Sequence[str], figures: dict[str, Any]) -> None:
        """The same for these rows at all batches, where there is nothing yet."""
        for batch in self.options.batches:
            for row in rows:
                if not self.report.has(self.shape.name, batch, row):
                    self.add(row, batch, figures)

    def add(self, row: str, batch: int, figures: dict[str, Any]) -> None:
        about = {
            "row": row,
            "shape": self.shape.name,
            "rank": self.options.rank,
            "batch": batch,
            "ok": True,
            "tokens": self.options.tokens,
            "servers_side_by_side": self.options.parallel_start,
        }
        self.report.add({**about, **({"note": NOTES[row]} if row in NOTES else {}), **figures})

    def late(self) -> bool:
        return time.monotonic() > self.deadline


def start(name: str, setting: Setting, folder: Path, max_rank: int) -> Server:
    """The server of these rows; it need not be ready."""
    work = setting.work / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    if name != PLAIN:
        ours = replace(setting, work=work, engine_flags=(*setting.engine_flags, *SERVERS[name][1]))
        return Ours().start(ours, folder, max_rank)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        *vllm_serve(folder),
        "--served-model-name",
        "base",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *setting.engine_flags,
    ]
    return Server("vllm serve", command, port, work / f"{folder.name}.log", environment(setting.server_device))


def open_ways(name: str, server: Server, model: PeftModel, stack: contextlib.ExitStack) -> list[Way]:
    """The rows of a server; ours has the adapter pushed, and its installs timed."""
    # A connection for each request: one kept over the others' waves may be closed by then.
    unkept = httpx.Limits(max_keepalive_connections=0)
    http = stack.enter_context(httpx.Client(base_url=server.url, timeout=WAVE_LIMIT_S, limits=unkept))
    if name == PLAIN:
        return [Way(PLAIN, server, http)]
    path = OurPath(stack.enter_context(RolloutClient(server.url)), model, HTTP)
    stack.callback(path.publisher.close)
    for step in range(1 + PUSHES):
        new_adapter(model)
        path.push(step)
    figures = {"install_s": spread([receipt.install_seconds for receipt in path.publisher.receipts[1:]])}
    policies: dict[str, WeightVersion | str | None] = {BASE: "base"}
    return [Way(row, server, http, policies.get(row, path.version), dict(figures)) for row in SERVERS[name][0]]


@torch.no_grad()
def new_adapter(model: PeftModel) -> None:
    """Change every LoRA weight; small beside the base, as a trained one is."""
    for parameter in trained(model):
        parameter.normal_(std=ADAPTER_STD)
    wait_for(trained(model)[0].device)


def fidelity(way: Way, model: PeftModel, vocab: int) -> dict[str, Any]:
    """Served logprobs of sampled tokens against the learner's own for the same tokens."""
    prompts = random_prompts(FIDELITY_SEQUENCES, vocab, PROMPT_TOKENS, seed=1_000_000)
    sampled, _ = way.ask(prompts, FIDELITY_TOKENS)
    ids_BT = torch.tensor([prompt + ids for prompt, (ids, _) in zip(prompts, sampled, strict=True)])
    served_BT = torch.tensor([logprobs for _, logprobs in sampled], dtype=torch.float64)
    own_BT = own_logprobs(model, ids_BT, adapter=way.row in (ADAPTER, MERGE))
    figures = divergence(served_BT, own_BT)
    if way.row in (ADAPTER, MERGE):  # about the gap that a server would have which forgot the adapter
        figures["adapter_effect"] = (own_BT - own_logprobs(model, ids_BT, adapter=False)).abs().mean().item()
    return {"fidelity": figures}


@torch.no_grad()
def own_logprobs(model: PeftModel, ids_BT: torch.Tensor, *, adapter: bool) -> torch.Tensor:
    """Teacher-forced logprobs of the tokens behind the prompts, by the learner's model in its own dtype."""
    model.eval()
    ids_BT = ids_BT.to(model.get_input_embeddings().weight.device)
    with contextlib.nullcontext() if adapter else model.disable_adapter():
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float()
    logprobs_BTV = torch.log_softmax(logits_BTV, dim=-1)
    return logprobs_BTV.gather(-1, ids_BT[:, PROMPT_TOKENS:, None])[..., 0].double().cpu()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Answers the exit code: 0 if no row failed."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.rank, options.batches, options.tokens, options.waves = "tiny", 8, "4", 16, 2
    try:
        shapes = pick_shapes(options.shapes)
        served_rank(options.rank)
        options.batches = sorted({int(batch) for batch in options.batches.split(",")})
        if min(*options.batches, options.tokens, options.waves, options.rank) < 1:
            raise ValueError("batches, tokens, waves and the rank are 1 or more")
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "-m", "bench.decode", *(sys.argv[1:] if argv is None else argv)])
    devices, learner, server = pick_devices(options)
    report = Rates(options.json, machine(devices, command))
    deadline = time.monotonic() + (options.deadline_s or math.inf)
    dtype = "float32" if learner == "cpu" else "bfloat16"
    stopped = False
    try:
        with stop_on_signals():
            for shape in shapes:
                # The weights are gigabytes: they never lie in --work-dir.
                with tempfile.TemporaryDirectory(prefix="bench-decode-") as scratch:
                    flags, work = sized_flags(shape, options, learner), options.work_dir or Path(scratch)
                    setting = Setting(work, learner, server, dtype, flags)
                    run = Run(setting, options, report, shape, shape.write(Path(scratch) / shape.name, dtype), deadline)
                    with run.failure_kept(ROWS):
                        run.all_servers()
    except Stopped as signal:
        print(f"bench: stopped by {signal}", file=sys.stderr)
        stopped = True
    report.write()
    if options.plot:
        bars(options.plot, report.rows, f"decoding {options.tokens} tokens a request, LoRA rank {options.rank}")
    document = report.document()
    print("\n" + rates_table(report.rows) + "\n\n" + document["headline"], flush=True)
    return 0 if document["ok"] and not stopped else 1


def sized_flags(shape: Shape, options: argparse.Namespace, learner: str) -> tuple[str, ...]:
    """Of every server: room for the largest wave."""
    batch = max(*options.batches, FIDELITY_SEQUENCES)
    length = PROMPT_TOKENS + max(options.tokens, FIDELITY_TOKENS) + 16
    per_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    sizes = ("--max-model-len", str(length), "--max-num-seqs", str(batch))
    return engine_flags(sizes, int(1.1 * per_token * batch * length), learner, options.server_flags)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model, rank 8, 2 waves of 4 requests of 16 tokens")
    add("--json", type=Path, help="written after every row")
    add("--plot", type=Path, help="a PNG")
    add("--shapes", default="qwen3-4b")
    add("--rank", type=int, default=32)
    add("--batches", default="32,256", help="requests of a wave")
    add("--tokens", type=int, default=256, help="decoded by each request")
    add("--waves", type=int, default=5, help="waves that are counted, after one that is not")
    add("--learner-gpu", type=int, default=0)
    add("--server-gpu", type=int, default=1)
    add("--server-flags", default="", help="further vLLM flags for every server, in one string")
    add("--parallel-start", action="store_true", help="all servers at once, on one GPU; their waves take turns")
    add("--deadline-s", type=float, help="start no new server or wave after this many seconds")
    add("--work-dir", type=Path, help="keeps the servers' logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
