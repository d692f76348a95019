"""Runs inside vLLM's worker processes: checks adapter tensors, writes them into a slot and reads them back.

vLLM mixes `AdapterWorker` into its worker class; the methods are called by `collective_rpc`, between engine steps.
They only begin and poll: the writing itself happens on a thread (and CUDA stream) of its own while decoding goes on.
Answers are plain dicts, because an exception that crosses `collective_rpc` loses its type.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import traceback
from typing import Any

import torch

from rollout_server import compat
from shared.adapter_file import LORA_A, LORA_B
from shared.errors import ErrorCode

# vLLM imports this module in each worker process before it loads the model.
compat.speed_up_cpu_lora()


class AdapterWorker:
    """Mixed into vLLM's worker. Every name carries the prefix, so that it never meets one of vLLM's."""

    def lockstep_register(self, slot_ids: list[int], rank: int, server_pid: int) -> dict[str, Any]:
        """Pin an empty adapter into each slot; called once, after vLLM's own warm-up (which removes all adapters)."""
        from rollout_server import slot_layout

        threading.Thread(target=_end_with, args=(server_pid,), name="lockstep-parent", daemon=True).start()
        compat.keep_seeds_alive_on_cpu(self)
        for slot_id in slot_ids:
            compat.pin_empty_adapter(self, slot_id, rank)
        self._lockstep_fill: _Fill | None = None
        return slot_layout.describe(self)

    def lockstep_check(self, modules: dict[str, list[int]]) -> dict[str, Any]:
        """Would an adapter with these modules fit? `modules`: PEFT name -> [rank, in_features, out_features]."""
        from rollout_server import slot_layout

        return slot_layout.check(self, modules)

    def lockstep_fill(self, slot_id: int, path: str, ticket: int) -> dict[str, Any]:
        """Begin to write the adapter in the safetensors file `path` into `slot_id`."""
        fill = self._lockstep_fill
        if fill is not None and fill.is_alive():
            return _failure(ErrorCode.INSTALL_FAILED, f"fill {fill.ticket} is still being written on this worker")
        self._lockstep_fill = _Fill(self, slot_id, path, ticket)
        self._lockstep_fill.start()
        return {"ok": True}

    def lockstep_poll(self, ticket: int, wait_s: float) -> dict[str, Any]:
        """What became of a fill; `done` is False while it is being written."""
        fill = self._lockstep_fill
        if fill is None or fill.ticket != ticket:
            return {"done": True, **_failure(ErrorCode.INSTALL_FAILED, f"this worker knows no fill {ticket}")}
        fill.join(wait_s)
        return {"done": False} if fill.is_alive() else {"done": True, **fill.result}


class _Fill(threading.Thread):
    """Writes one adapter into one slot that no running request reads."""

    def __init__(self, worker: Any, slot_id: int, path: str, ticket: int) -> None:
        super().__init__(name=f"lockstep-fill-{ticket}", daemon=True)
        self.worker, self.slot_id, self.path, self.ticket = worker, slot_id, path, ticket
        self.result: dict[str, Any] = {}

    def run(self) -> None:
        try:
            device = self.worker.device
            if device.type == "cuda":
                torch.cuda.set_device(device)
                stream = torch.cuda.Stream(device)
                with torch.cuda.stream(stream), torch.inference_mode():
                    self.result = self._write()
                stream.synchronize()
            else:
                with torch.inference_mode():
                    self.result = self._write()
        except Exception as error:
            traceback.print_exc()
            self.result = _failure(ErrorCode.INSTALL_FAILED, f"{type(error).__name__}: {error}")

    def _write(self) -> dict[str, Any]:
        from safetensors import safe_open

        from rollout_server import slot_layout

        with safe_open(self.path, framework="pt") as blob:
            tensors = {name: blob.get_tensor(name) for name in blob.keys()}  # noqa: SIM118
        not_finite = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if not_finite:
            return _failure(
                ErrorCode.NOT_FINITE,
                f"{len(not_finite)} tensors hold NaN or infinity, the first is {min(not_finite)}; "
                "the optimizer step that made them diverged",
            )
        pairs = {
            name.removesuffix(LORA_A): (tensor, tensors[name.removesuffix(LORA_A) + LORA_B])
            for name, tensor in tensors.items()
            if name.endswith(LORA_A)
        }
        return slot_layout.write(self.worker, self.slot_id, pairs)


def _end_with(server_pid: int) -> None:
    """End this engine when the HTTP server's process has gone without stopping it (kill -9, say).

    vLLM's own watch covers workers of a dead engine, but an engine whose server died would hold its GPU for ever.
    """
    try:
        server = os.pidfd_open(server_pid)
    except (OSError, AttributeError):  # on another host, or no Linux: vLLM's own means have to do
        return
    select.select([server], [], [])
    engine = os.getppid()
    if engine not in (1, server_pid):
        os.kill(engine, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _failure(code: ErrorCode, message: str) -> dict[str, Any]:
    return {"ok": False, "code": code.value, "message": message}
