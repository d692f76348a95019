"""Decoded tokens per second of a rollout server, its adapter applied in three ways, against a plain vLLM without LoRA.

With `--prompt-tokens 2000 --tokens 1`, say, it is reading prompts that is measured. There are rows, too, of servers
whose logprobs are nearer to the learner's, and farther: batch-invariant kernels, and a base in 8 or 4 bits.

python -m bench.decode --quick                                 # a tiny model on the CPU, minutes
python -m bench.decode --parallel-start --json decode.json --plot decode.png    # learner GPU 0, servers GPU 1
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel

from bench.common.fidelity import ADAPTER_STD, PROMPT_TOKENS, SEQUENCES, TOKENS, compute_batch_invariantly, fidelity
from bench.common.harness import Bench, Skip
from bench.common.load import COMPLETIONS, GENERATE, Sampled, completions_body, generate_body, random_prompts, sampled
from bench.common.models import Policy, Shape, optimizer_step, served_rank, write_weights
from bench.common.report import Row, grouped_picture, spread
from bench.common.servers import Server, Setting, vllm_serve
from bench.contenders.lockstep import HTTP, Lockstep, LockstepPath
from learner.servers.client import RolloutClient
from shared.weights import WeightVersion

PLAIN, ADAPTER, MERGE = "plain vLLM (no LoRA)", "lockstep --apply adapter", "lockstep --apply merge"
COLUMNS = "lockstep --apply columns"
INVARIANT, FP8, FOUR_BITS = (
    "lockstep --deterministic",
    "lockstep --quantization fp8",
    "lockstep --quantization bitsandbytes",
)
BASE, COLUMNS_BASE = "lockstep --apply adapter, base requests", "lockstep --apply columns, base requests"
#: Server -> its rows and its flags.
SERVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    PLAIN: ((PLAIN,), ()),
    ADAPTER: ((ADAPTER, BASE), ("--apply", "adapter")),
    COLUMNS: ((COLUMNS, COLUMNS_BASE), ("--apply", "columns")),
    MERGE: ((MERGE,), ("--apply", "merge")),
    INVARIANT: ((INVARIANT,), ("--apply", "columns", "--deterministic")),
    FP8: ((FP8,), ("--apply", "adapter", "--quantization", "fp8")),
    FOUR_BITS: ((FOUR_BITS,), ("--apply", "adapter", "--quantization", "bitsandbytes")),
}
#: vLLM quantizes a base as it is loaded on GPUs only.
QUANTIZED = FP8, FOUR_BITS
PUSHES, WAVE_LIMIT_S = 5, 300.0


@dataclass
class Target:
    """One row: a server, the policy that its requests name (None: a plain vLLM), and the figures known of it."""

    row: str
    server: Server
    http: httpx.Client
    policy: WeightVersion | str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, prompts: list[list[int]], tokens: int) -> tuple[list[Sampled], float]:
        """Send one request of `tokens` tokens a prompt; return what was sampled, and seconds until the last byte."""
        version = self.policy.model_dump() if isinstance(self.policy, WeightVersion) else None
        if self.policy is None:
            path, body = COMPLETIONS, completions_body(prompts, tokens)
        else:
            path, body = GENERATE, generate_body(prompts, tokens, version or self.policy)
        content = json.dumps(body)
        started = time.perf_counter()
        answer = self.http.post(path, content=content, headers={"content-type": "application/json"})
        seconds = time.perf_counter() - started
        found = sampled(path, answer.status_code, answer.content, tokens, len(prompts))
        if self.policy is not None:
            spans = [span for group in answer.json()["groups"] for one in group["completions"] for span in one["spans"]]
            if others := [span for span in spans if span["version"] != version]:
                raise RuntimeError(f"tokens are of {others[0]}, not of {self.policy}")
        return found, seconds

    def fidelity(self, model: PeftModel, vocab: int) -> dict[str, float]:
        """Compare what it serves with the learner's own logprobs."""
        adapter = self.row not in (PLAIN, BASE, COLUMNS_BASE)
        return fidelity(lambda prompts, tokens: self.ask(prompts, tokens)[0], model, vocab, adapter=adapter)


class DecodeBench(Bench):
    """Waves of requests, the servers taking turns."""

    name = "decode"
    standard = "plot shapes rank only learner-gpu server-gpu server-gpus server-flags deadline-s"
    flags = {
        "--batches": ("1,32,256", "requests of a wave"),
        "--tokens": (256, "decoded by each request"),
        "--prompt-tokens": (16, "of each request"),
        "--waves": (5, "waves that are counted, after one that is not"),
        "--parallel-start": (False, "all servers at once, on one GPU; their waves take turns"),
        "--batch-invariant": (False, "the learner, too, computes with the kernels of --deterministic servers"),
    }
    quick = "--shapes tiny --rank 8 --batches 4 --tokens 16 --waves 2"
    notes = {PLAIN: "its /v1/completions also makes the texts; ours was asked for token ids and logprobs only"}
    row_names = tuple(SERVERS)
    same = "rank", "tokens", "prompt_tokens", "batch_invariant"
    figure = "tokens_per_s"
    about = {"shape": "shape", "requests": "batch", "row": "row"}
    columns = {
        "n": "{n}",
        "tokens/s": "{tokens_per_s:.0f}",
        "of plain": "{ratio_to_plain:.1%}",
        "install ms": "{install_s[median]:1e3*.1f}",
        "GPU MiB": "{gpu_memory_mib}",
        "mean |gap|": "{fidelity[mean_abs_gap]:.2e}",
        "KL k1 / k3": "{fidelity[kl_k1]:.1e} / {fidelity[kl_k3]:.1e}",
        "one product: mean |gap| / KL k3": (
            "{fidelity[one_product_mean_abs_gap]:.2e} / {fidelity[one_product_kl_k3]:.1e}"
        ),
    }
    what = "{shape} rank {rank}, {batch} requests, {row}"
    told = "{tokens_per_s:.0f} tokens/s, {ratio_to_plain:.1%} of plain"

    def check(self) -> None:
        super().check()
        self.numbers("batches")
        self.at_least(1, "batches", "tokens", "prompt_tokens", "waves", "rank")
        if self.options.batch_invariant and not torch.cuda.is_available():
            raise ValueError("--batch-invariant: vLLM has these kernels for GPUs only")

    def run(self) -> None:
        kept = compute_batch_invariantly() if self.options.batch_invariant else None
        for shape in self.shapes:
            abouts = [about for name in self.options.only for about in self._abouts(shape, name)]
            # The weights are gigabytes: they go with the shape.
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder, self.failure_kept(*abouts):
                self.one_shape(shape, Path(folder) / shape.name)
        del kept

    def one_shape(self, shape: Shape, folder: Path) -> None:
        """Measure all servers of a shape."""
        policy = Policy(shape.write(folder, self.dtype), self.device, self.dtype)
        write_weights(policy, shape, folder, self.dtype)
        setting, rank = self.sized(shape), served_rank(self.options.rank)
        with policy.adapter(self.options.rank, "float32") as model:
            chosen = self.options.only
            for names in [list(chosen)] if self.options.parallel_start else [[name] for name in chosen]:
                starts = {name: functools.partial(start, name, setting, folder, rank) for name in names}
                targets: list[Target] = []
                with (
                    self.servers(starts, functools.partial(self._abouts, shape)) as servers,
                    contextlib.ExitStack() as stack,
                ):
                    for name, server in servers.items():
                        with self.failure_kept(*self._abouts(shape, name)):
                            found = open_targets(name, server, model, stack)
                            for target in found:
                                target.figures["fidelity"] = target.fidelity(model, shape.vocab)
                            targets += found
                    for batch in self.options.batches if targets else ():
                        self.waves(shape, targets, batch)

    def waves(self, shape: Shape, targets: Sequence[Target], batch: int) -> None:
        """Measure the rows of a batch, the servers taking turns."""

        def wave(target: Target, number: int) -> float:
            prompts = random_prompts(batch, shape.vocab, self.options.prompt_tokens, seed=number)
            return target.ask(prompts, self.options.tokens)[1]

        about = functools.partial(self._about, shape, batch=batch)

        def figures(i: int, waves: Sequence[list[float]]) -> Row:
            target, seconds = targets[i], waves[i]
            measured = {self.key(row): row["waves_s"] for row in self.measured()}
            plain = seconds if target.row == PLAIN else measured.get(self.key(about(PLAIN)), [])
            ratios = [plain_s / s for plain_s, s in zip(plain, seconds, strict=False)]
            return {
                "n": len(seconds),
                "tokens_per_s": spread([batch * self.options.tokens / s for s in seconds]),
                "waves_s": [round(s, 6) for s in seconds],
                **({"ratio_to_plain": spread(ratios)} if ratios else {}),
                **target.figures,
                "gpu_memory_mib": target.server.gpu_memory(),
            }

        self.take_turns(targets, self.options.waves, wave, lambda target: about(target.row), figures)

    def sized(self, shape: Shape) -> Setting:
        """Return where servers run that have room for the largest wave."""
        batch = max(*self.options.batches, SEQUENCES)
        length = max(PROMPT_TOKENS + TOKENS, self.options.prompt_tokens + self.options.tokens) + 16
        return self.setting(length, batch, 1.1 * shape.kv_bytes * batch * length)

    def _abouts(self, shape: Shape, name: str) -> list[Row]:
        return [self._about(shape, row, batch) for batch in self.options.batches for row in SERVERS[name][0]]

    def _about(self, shape: Shape, row: str, batch: int) -> Row:
        side_by_side = {"servers_side_by_side": self.options.parallel_start}
        return self.about_row(row, shape=shape.name, batch=batch, **side_by_side)

    def plot(self, path: Path, done: Sequence[Row]) -> None:
        title = f"decoding {self.options.tokens} tokens a request, LoRA rank {self.options.rank}"
        label, place = "decoded tokens per second", "{}\n{} requests"
        grouped_picture(path, done, self.figure, ("shape", "batch"), place, title, label, bars=True)


def start(name: str, setting: Setting, folder: Path, max_rank: int) -> Server:
    """Start a server; it need not be ready. Raises `Skip` where it cannot run."""
    if name in QUANTIZED and setting.device == "cpu":
        raise Skip("vLLM quantizes bases on GPUs only")
    work = setting.work / name.replace(" ", "-")
    work.mkdir(parents=True, exist_ok=True)
    setting = replace(setting, work=work, engine_flags=(*setting.engine_flags, *SERVERS[name][1]))
    if name != PLAIN:
        return Lockstep(setting).start(folder, max_rank)
    return setting.start("vllm serve", vllm_serve(folder), f"{folder.name}.log", "--served-model-name", "base")


def open_targets(name: str, server: Server, model: PeftModel, stack: contextlib.ExitStack) -> list[Target]:
    """Return the rows of a server; push an adapter to ours, and time its installs."""
    # A connection for each request: one kept over the others' waves may be closed by then.
    unkept = httpx.Limits(max_keepalive_connections=0)
    http = stack.enter_context(httpx.Client(base_url=server.url, timeout=WAVE_LIMIT_S, limits=unkept))
    if name == PLAIN:
        return [Target(PLAIN, server, http)]
    path = LockstepPath(stack.enter_context(RolloutClient(server.url)), model, HTTP)
    stack.callback(path.publisher.close)
    installs = []
    for step in range(1 + PUSHES):
        optimizer_step(model, ADAPTER_STD)
        installs.append(path.push(step).parts["install"])
    figures = {"install_s": spread(installs[1:])}
    rows = SERVERS[name][0]
    policies = {row: "base" if row in (BASE, COLUMNS_BASE) else path.version for row in rows}
    return [Target(row, server, http, policy, dict(figures)) for row, policy in policies.items()]


if __name__ == "__main__":
    sys.exit(DecodeBench().main())
