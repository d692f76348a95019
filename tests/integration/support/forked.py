"""Processes of our commands that begin with their imports done: forked from one that has done them for all.

vLLM and TRL take ten seconds of a core to import, and these tests start dozens of processes. Each is as separate as one
started with `python -m`: its own session, environment, log and exit status. vLLM's engines and workers are forked from
the server, too, as is vLLM's way by default; on a CPU it spawns them.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import setproctitle

REPOSITORY = Path(__file__).parents[3]
#: For $PYTHONPATH: where a server that another command starts finds that it should fork its engine, too.
FORKING = f"{Path(__file__).parent / 'forking'}:{REPOSITORY}"
#: In which the imports are done; one thread, since threads are not forked.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
#: What is imported: the large parts of both commands, of vLLM's worker and of its routes, and a script of the tests.
MODULES = [
    "tests.integration.support.no_collections",
    "vllm.entrypoints.launchers.app",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
    "vllm._aiter_ops",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.qwen3",
    "torch.distributed.tensor.experimental",
    "rollout_server.lifecycle",
    "learner.commands.train",
    "tests.integration.support.train_on_ranks",
]

_CONTEXT = multiprocessing.get_context("forkserver")


def _end_others() -> None:
    """End the fork server that another test has started, without these imports.

    By a signal: it would wait for all who hold the end of its pipe, and a process that a test left may hold it.
    """
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


class ForkedProcess:
    """`python -m MODULE ARGUMENTS` in a session of its own, with the methods of subprocess.Popen that tests use."""

    _have_imported = False

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with pytest.MonkeyPatch.context() as patch:  # of the process that does the imports, if it is still to start
            for name, value in {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}.items():
                patch.setenv(name, value)
            if not ForkedProcess._have_imported:
                _end_others()
            _CONTEXT.set_forkserver_preload(MODULES)
            forkserver.ensure_running()
            ForkedProcess._have_imported = True
        told = (module, list(map(str, arguments)), str(log), dict(environment))
        self._process = _CONTEXT.Process(target=_run, args=told, name="MainProcess")
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid
        while self.poll() is None and not self._leads_its_group():  # from then on a signal to its group reaches it
            time.sleep(0.001)

    def _leads_its_group(self) -> bool:
        try:
            return os.getpgid(self.pid) == self.pid
        except ProcessLookupError:
            return True

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    gc.freeze()  # or every full collection would walk over what the imports left behind, and copy it
    gc.enable()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.close(output)
    setproctitle.setproctitle(" ".join([sys.executable, "-m", module, *arguments]))  # before its place is moved
    os.environ.clear()
    os.environ.update(environment)
    assert set(MODULES) <= set(sys.modules), "a name in MODULES has changed"
    sys.argv[1:] = arguments
    fork_instead_of_spawn()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def fork_instead_of_spawn() -> None:
    """Let this process fork what it would spawn: what is spawned imports everything again."""
    context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: context("fork" if method == "spawn" else method)
    os.register_at_fork(after_in_child=_begin_in_child)


def _begin_in_child() -> None:
    # A signal that a child gets must not be taken for one of this process by its event loop.
    signal.set_wakeup_fd(-1)
    # An engine's worker compiles its sampler, even with --enforce-eager; a server in `test_server_process` does, too.
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.config.disable = True
