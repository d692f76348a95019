"""Servers as child processes: start, wait until they answer, ask, end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from learner.utils.processes import ProcessGroup
from shared.weights import WeightVersion

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Rendezvous of processes of one machine, which may have no other network.
    "VLLM_HOST_IP": "127.0.0.1",
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}


class Server:
    """A server on a port of this machine, in a process group of its own."""

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, env: Mapping[str, str], *, ready: str = "/health"
    ) -> None:
        self.name, self.port, self.log, self.ready = name, port, log, ready
        self.url = f"http://127.0.0.1:{port}"
        self.command = list(command)
        self.started = time.monotonic()
        self.start_s: float | None = None
        self._group = ProcessGroup(self.command, env, log)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server answers 200.

        Raises:
            RuntimeError: it ended, or the time is over; with the end of its log.
        """
        deadline = self.started + timeout_s
        while self.start_s is None:
            if (status := self._group.process.poll()) is not None:
                raise RuntimeError(f"{self.name} ended with status {status}; {self.tail()}")
            try:
                if httpx.get(self.url + self.ready, timeout=5.0).status_code == 200:
                    self.start_s = time.monotonic() - self.started
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} was not ready within {timeout_s:.0f} s; {self.tail()}")
            time.sleep(0.25)

    def gpu_memory(self) -> int | None:
        """MiB that its processes hold by nvidia-smi; None where that says nothing of them."""
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        total = 0
        for entry in answer.splitlines():
            with contextlib.suppress(ValueError, OSError):  # "[N/A]", or a process of another machine's
                pid, mib = (int(cell) for cell in entry.split(","))
                # All processes of a server are in the session that it leads.
                total += mib if os.getsid(pid) == self._group.process.pid else 0
        return total or None

    @property
    def pid(self) -> int:
        """Of the process that leads the group."""
        return self._group.process.pid

    def processor_s(self) -> float:
        """Processor time of that process alone: vLLM's engine and workers are its children."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """SIGKILL for it and whatever it started, at once."""
        os.killpg(self.pid, signal.SIGKILL)

    def tail(self, characters: int = 600) -> str:
        """The last errors of the log, or its end."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        errors = [line for line in lines if "Error" in line]
        return f"log {self.log}: ...{' | '.join(errors[-3:] or lines[-3:])[-characters:]}"

    def end(self) -> None:
        """Stop it and whatever it started."""
        self._group.end()


Sampled = tuple[list[int], list[float]]  # token ids and logprobs of one sequence


@dataclass
class Way:
    """One row: a server, whom its requests ask for (None: a vLLM that knows no policies), and what is known of it."""

    row: str
    server: Server
    http: httpx.Client
    policy: WeightVersion | str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def ask(self, prompts: list[list[int]], tokens: int) -> tuple[list[Sampled], float]:
        """One request of `tokens` tokens for each prompt; what was sampled, and the seconds until the last byte."""
        sampling = {"max_tokens": tokens, "temperature": 1.0, "ignore_eos": True, "n": 1}
        if self.policy is None:
            path = "/v1/completions"
            body: dict[str, Any] = {"model": "base", "prompt": prompts, "logprobs": 0, "return_token_ids": True}
            body |= sampling
        else:
            policy = self.policy if isinstance(self.policy, str) else self.policy.model_dump()
            asked = [{"token_ids": prompt} for prompt in prompts]
            path = "/v1/generate"
            body = {"prompts": asked, "policy": policy, "return_text": False, "sampling": sampling}
        content, headers = json.dumps(body), {"content-type": "application/json"}
        started = time.perf_counter()
        answer = self.http.post(path, content=content, headers=headers)
        seconds = time.perf_counter() - started
        if answer.is_error:
            raise RuntimeError(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        sampled = self._completions(answer.json()) if self.policy is None else self._groups(answer.json())
        if [(len(ids), len(logprobs)) for ids, logprobs in sampled] != [(tokens, tokens)] * len(prompts):
            raise RuntimeError(f"{len(sampled)} sequences of {[len(ids) for ids, _ in sampled][:8]} tokens came back")
        return sampled, seconds

    def _completions(self, document: Any) -> list[Sampled]:
        choices = sorted(document["choices"], key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    def _groups(self, document: Any) -> list[Sampled]:
        completions = [group["completions"][0] for group in document["groups"]]
        version = self.policy.model_dump() if isinstance(self.policy, WeightVersion) else None
        if others := [c["spans"] for c in completions if [span["version"] for span in c["spans"]] != [version]]:
            raise RuntimeError(f"tokens are of {others[0]}, not of {self.policy}")
        return [(c["token_ids"], c["logprobs"]) for c in completions]


def environment(server_device: str | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a server on the given GPU (None: on the CPU); what the caller has set stays."""
    defaults = {**ENVIRONMENT, **(CPU_ENVIRONMENT if server_device is None else {})}
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    if server_device is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = server_device
    return {**chosen, **(extra or {})}


def engine_flags(sizes: Sequence[str], kv_cache_bytes: int, learner: str, more: str) -> tuple[str, ...]:
    """vLLM's flags for a server of given sizes.

    Args:
        kv_cache_bytes: on a GPU. Memory is given out, not profiled, for servers side by side would count each other's.
        learner: its device; a CPU's server is a CPU's too.
        more: further flags, in one string.
    """
    if learner == "cpu":
        return (*sizes, "--dtype", "float32", "--enforce-eager", *shlex.split(more))
    share = "0.1"  # that much is free at least
    memory = ("--kv-cache-memory-bytes", str(kv_cache_bytes), "--gpu-memory-utilization", share)
    return (*sizes, "--dtype", "bfloat16", *memory, *shlex.split(more))


def visible_device(index: int) -> str:
    """GPU `index` of those this process sees, as CUDA_VISIBLE_DEVICES names it for a child."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return visible[index] if visible else str(index)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
