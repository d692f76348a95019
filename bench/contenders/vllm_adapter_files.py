"""Peer: plain `vllm serve`, the adapter through a local directory and `/v1/load_lora_adapter`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from peft import PeftModel

from bench.common.load import COMPLETIONS, completions_body
from bench.common.report import timed
from bench.common.servers import Server, Setting, vllm_serve
from bench.contenders import Contender, Moved, SyncPath

IN_PLACE, NEW_NAME = "adapter file, in place", "adapter file, new name"
SHARED_MEMORY = Path("/dev/shm")


class FilePath(SyncPath):
    """PEFT's `save_pretrained`, a load by path, a completion by the adapter's name.

    In place, one name and directory are loaded again and again with `load_inplace`. Otherwise each push has a name
    and a directory of its own, and the previous one is unloaded and removed after the first token.
    """

    def __init__(self, url: str, model: PeftModel, folder: Path, in_place: bool) -> None:
        self.model, self.folder, self.in_place = model, folder, in_place
        self.http = httpx.Client(base_url=url, timeout=300.0)
        self.name: str | None = None
        self.old: str | None = None

    def push(self, step: int) -> Moved:
        name = "policy" if self.in_place else f"policy-{step}"
        folder = self.folder / name
        _, write_s = timed(lambda: self.model.save_pretrained(str(folder)))
        body: dict[str, Any] = {"lora_name": name, "lora_path": str(folder)}
        if self.in_place:
            body["load_inplace"] = True
        _, load_s = timed(lambda: self._post("/v1/load_lora_adapter", body))
        self.old = self.name if self.name != name else None
        self.name = name
        return Moved((folder / "adapter_model.safetensors").stat().st_size, {"write": write_s, "load": load_s})

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        body = completions_body(prompt, 1) | {"model": self.name, "temperature": 0.0, "logprobs": 1}
        choice = self._post(COMPLETIONS, body).json()["choices"][0]
        return choice["token_ids"][0], choice["logprobs"]["token_logprobs"][0]

    def settle(self) -> None:
        if self.old is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": self.old})
            shutil.rmtree(self.folder / self.old)
            self.old = None

    def close(self) -> None:
        """Unload the adapter, so that the next path finds its place free."""
        if self.name is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": self.name})
        self.http.close()

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = self.http.post(path, json=body)
        if answer.is_error:
            raise RuntimeError(f"{path} answered {answer.status_code}: {answer.text[:300]}")
        return answer


def serve_adapters(setting: Setting, folder: Path, log: str, *flags: str, **env: str) -> Server:
    """Start `vllm serve` that loads adapters from files when it is told to."""
    env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    words = vllm_serve(folder)
    return setting.start("vllm serve", words, log, "--enable-lora", *flags, ready="/health", port=0, **env)


class VllmAdapterFiles(Contender):
    """The contender `vllm serve` with runtime LoRA loading."""

    rows = (IN_PLACE, NEW_NAME)
    notes = {
        IN_PLACE: "learner and server share a file system (tmpfs where there is one); vLLM reads the file again when "
        "it is used (vLLM issue 41482), and its prefix cache may answer from the weights before",
        NEW_NAME: "learner and server share a file system (tmpfs where there is one); two adapters in host memory",
    }

    def start(self, folder: Path, max_rank: int) -> Server:
        flags = f"--served-model-name base --max-loras 1 --max-cpu-loras 2 --max-lora-rank {max_rank}"
        return serve_adapters(self.setting, folder, f"{folder.name}-file-{max_rank}.log", *flags.split())

    @contextlib.contextmanager
    def path(self, row: str, server: Server, model: PeftModel) -> Iterator[FilePath]:
        shared = str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="bench-", dir=shared) as folder:
            path = FilePath(server.url, model, Path(folder), in_place=row == IN_PLACE)
            try:
                yield path
            finally:
                with contextlib.suppress(RuntimeError, httpx.HTTPError):
                    path.close()
