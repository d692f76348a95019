"""The systems under test: rollout servers, a learner that trains on them, a proxy between them, and supervisors."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM
from typing import Any, Self

import httpx

from learner.utils.ports import free_port
from tests.chaos.control import Control
from tests.chaos.devices import INSIDE, Devices
from tests.chaos.invariants import Checker
from tests.chaos.processes import REPOSITORY, Supervised, belonging, kill
from tests.chaos.recorder import FOLDER_VARIABLE, PAUSE
from tests.chaos.reference import Reference
from tests.chaos.surroundings import Clock, Disk, Network, SharedMemory, UnavailableError
from tests.integration.conftest import FLAGS as SERVER_FLAGS
from tests.integration.support.learner_process import COMMON, write_questions
from tests.integration.support.server import ENVIRONMENT, HTTP
from tests.support.arguments import arguments
from tests.support.tiny_model import make_tiny_model

RUN_ID = "chaos"
#: Deadlines, shortened so that a fault can outlast them.
GENERATE_S, PUSH_S, SERVER_PUSH_S = 10, 10, 8
START_S = 300.0
#: Prompts to train on, and how many make a batch: an epoch has a whole number of batches.
PROMPTS, BATCH = 40, 2
SAVE_STEPS = 5
LEARNER_FLAGS = arguments(
    {
        "--run_id": RUN_ID,
        "--generate_timeout_s": GENERATE_S,
        "--push_timeout_s": PUSH_S,
        "--ready_timeout_s": START_S,
        "--proof_every": 1,
        "--proof_canary": "false",
        "--save_steps": SAVE_STEPS,
        "--save_total_limit": 3,
        "--reward_workers": 1,
        "--reward_timeout_s": 5,
        "--log_completions": "true",
        "--num_completions_to_print": 0,
    }
)


class NotInjectedError(Exception):
    """The fault cannot be injected at present."""


@dataclass
class Options:
    """Options of the suite."""

    folder: Path
    seed: int
    steps: int
    servers: int = 1
    quick: bool = False
    deterministic: bool = False
    broadcast: bool = False
    devices: Devices = Devices()

    @property
    def staleness(self) -> int:
        """Return how many generation batches rollouts run ahead."""
        return 0 if self.deterministic else 1


class Training(ABC):
    """One training into which faults are injected, and what shows how far it is.

    Attributes:
        unavailable: name of what this machine does not permit -> reason.
        during: name of the present fault.
        learner: the command that trains.
        control: has seen the learner's pushes, and the receipts that have reached it.
    """

    control: Any
    checker: Checker
    learner: Supervised
    output: Path

    def __init__(self, options: Options) -> None:
        self.options, self.folder = options, options.folder
        self.suite = f"{options.folder.name}-{time.time_ns()}"
        self.unavailable: dict[str, str] = {}
        self.during = "start"
        self._open = contextlib.ExitStack()
        self._problems: list[str] = []
        self._supervised: list[Supervised] = []
        self.model = make_tiny_model(self.folder / "model", seed=0, **options.devices.model)
        self.task = write_questions(self.folder / "questions.jsonl", PROMPTS + 2)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    @abstractmethod
    def _start(self) -> None:
        """Start all, and wait until the learner has begun."""

    @abstractmethod
    def close(self) -> None:
        """End all processes; those that are left are a violation."""

    @abstractmethod
    def addresses(self) -> list[str]:
        """Return the servers' own addresses, past any proxy."""

    def hurry(self) -> None:
        """Train without pauses, since no more faults come."""
        (self.folder / PAUSE).unlink(missing_ok=True)

    def end_early(self, within: int = 10) -> None:
        """Let the training end after so many further steps: it is left, with a checkpoint, and resumed with fewer."""
        steps = self.step() + within
        if self.learner.done.is_set() or steps >= self.options.steps:
            return
        command = self.learner.command
        command[command.index("--max_steps") + 1] = str(steps)
        self.options.steps = steps
        kill([self.learner.pid], SIGTERM)

    @property
    def lease(self) -> Path:
        return self.output / "lease.json"

    def newest(self) -> tuple[tuple[int, int], bytes]:
        """Return version and bytes of the adapter pushed last."""
        for version, path in reversed(self.control.pushed().items()):
            with contextlib.suppress(FileNotFoundError):
                return version, path.read_bytes()
        raise LookupError("no adapter has been pushed yet")

    def step(self) -> int:
        """Return the last step that the learner has reported."""
        return self.checker.steps[-1][1]["step"] if self.checker.steps else 0

    def progress(self, since: float, within: float) -> float | None:
        """Return seconds from `since` to the end of a step begun after it; None if it takes longer than `within`."""
        while time.monotonic() < since + within:
            if self.learner.done.is_set():
                return time.monotonic() - since
            for seen, step in self.checker.steps[-20:]:
                if seen - step["seconds"] >= since - 0.1:
                    return seen - since
            time.sleep(0.05)
        return None

    def broadcasts(self) -> int:
        """Return how many receipts of broadcasts have reached the learner."""
        return sum(receipt.get("broadcast", False) for receipt in self.control.receipts())

    def summary(self) -> dict[str, Any]:
        """Return the learner's summary."""
        return json.loads((self.output / "train.json").read_text())

    def _supervise(
        self, name: str, command: list[str], environment: dict[str, str], *, forever: bool = False
    ) -> Supervised:
        def report(problem: str) -> None:
            if hasattr(self, "checker"):
                self.checker.violated("orphans", problem)
            else:
                self._problems.append(problem)

        process = Supervised(self.suite, name, command, environment, self.folder / f"{name}.log", report, forever)
        self._open.callback(self._end, process)
        self._supervised.append(process)
        return process.start()

    @staticmethod
    def _end(process: Supervised) -> None:
        process.stop()
        kill(process.family())


class World(Training):
    """Servers on this machine, and a learner that reaches them through a proxy.

    Attributes:
        server_list: file from which the learner reads its servers, if there are several.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.server_list = self.folder / "servers" if options.servers > 1 else None
        if not self.server_list:
            self.unavailable["several servers"] = "there is one server (--servers)"
        devices = options.devices
        if options.broadcast and not devices.on_gpu:
            self.unavailable["a GPU"] = "learner and servers compute on the CPU"
        self.memory = self._have("shared memory", lambda: SharedMemory(self.folder / "shm"))
        self.network = self.disk = None
        self.clocks: dict[str, Clock | None] = {"server": None, "learner": None}
        if not options.broadcast:  # both ends of a broadcast must be in one network
            self.network = self._have("network", lambda: Network(str(os.getpid())))
            self.disk = self._have("disk", lambda: Disk(self.folder / "disk"))
            self.clocks = {name: self._have("clock", lambda n=name: Clock(self.folder, n)) for name in self.clocks}
        self.output = (self.disk.folder if self.disk else self.folder) / "run"

    def _start(self) -> None:
        options = self.options
        self.servers = [self._server(f"server-{i}", free_port(), self.model) for i in range(options.servers)]
        self.other = self._server("another-model", free_port(), self._another_model()) if self._has_another else None
        host = self.network.host if self.network else "127.0.0.1"
        command = [sys.executable, "-m", "tests.chaos.proxy", str(self.folder), host, *map(str, self.ports)]
        proxy = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
        self._open.callback(proxy.kill)
        self.control = Control(self.folder)
        reference = Reference(self.model, self.control.pushed, options.devices.dtype)
        self.checker = Checker(
            self.addresses(),
            RUN_ID,
            reference,
            self.control.receipts,
            self.output / "metrics.jsonl",
            options.staleness,
            during=lambda: self.during,
        )
        for problem in self._problems:
            self.checker.violated("orphans", problem)
        self._wait_ready()
        self.urls = [f"http://{host}:{port}" for port in self.control("ports")]
        self.list_servers()
        urls = [f"file:{self.server_list}"] if self.server_list else self.urls
        command = [*(self.network.prefix if self.network else []), *self.training(urls, self.output)]
        self.learner = self._supervise("learner", self._in_memory(command), self._learner_environment())
        self.checker.start()
        self._open.callback(self.checker.stop)

    @property
    def ports(self) -> list[int]:
        """Return the ports of the servers themselves."""
        return [int(server.command[server.command.index("--port") + 1]) for server in self.servers]

    def addresses(self) -> list[str]:
        """Return the servers' own addresses, past any proxy."""
        return [self.url(index) for index in range(len(self.servers))]

    def url(self, index: int) -> str:
        """Return a server's own address, bypassing the proxy."""
        return f"http://127.0.0.1:{self.ports[index]}"

    def list_servers(self, but: int | None = None) -> None:
        """Write the list of servers that the learner reads, if there are several."""
        if self.server_list:
            temporary = self.server_list.with_suffix(".tmp")
            temporary.write_text("".join(f"{url}\n" for i, url in enumerate(self.urls) if i != but))
            temporary.replace(self.server_list)

    @contextlib.contextmanager
    def stopped(self, pids: list[int]) -> Iterator[list[int]]:
        """Stop processes until the end of the block, in which the list may grow by others."""
        try:
            kill(pids, SIGSTOP)
            yield pids
        finally:
            kill(pids, SIGCONT)

    def undisturbed(self) -> Path:
        """Run the same training without faults; return its folder."""
        output = self.folder / "undisturbed"
        command = [*self.training([self.url(0)], output), "--takeover", "true"]
        environment = {**os.environ, **self._learner_environment()}
        with (self.folder / "undisturbed.log").open("wb") as log:
            subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log, timeout=600, check=True)
        return output

    def close(self) -> None:
        """End all processes; those that are left are a violation."""
        for process in reversed(self._supervised):
            process.stop()
        sessions = [session for process in self._supervised for session in process.sessions]
        left = belonging(f"{self.suite}/", sessions)
        self.checker.require("orphans", not left, f"left behind at the end: {left}")
        if self.memory:
            deadline = time.monotonic() + 10
            while (segments := self.memory.left()) and time.monotonic() < deadline:
                time.sleep(0.2)
            self.checker.require("shared memory", not segments, f"left behind at the end: {segments}")

    def _have(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            made = make()
        except UnavailableError as error:
            self.unavailable[name] = str(error)
            return None
        if hasattr(made, "close"):
            self._open.callback(made.close)
        return made

    @property
    def _has_another(self) -> bool:
        options = self.options
        return not (options.quick or options.broadcast)

    def _another_model(self) -> Path:
        return make_tiny_model(self.folder / "another-model", seed=1)

    def _server(self, name: str, port: int, model: Path) -> Supervised:
        devices = self.options.devices
        command = [
            sys.executable,
            "-m",
            "rollout_server.cli",
            str(model),
            "--port",
            str(port),
            *SERVER_FLAGS,
            *arguments({"--push-timeout": SERVER_PUSH_S, "--drain-seconds": 5, "--slots-per-run": 3}),
            *arguments({"--collective-timeout": SERVER_PUSH_S}),
            *(["--deterministic"] if self.options.deterministic else []),
            *devices.server_flags,
        ]
        clock = self.clocks["server"]
        environment = ENVIRONMENT | devices.server_environment | python_path(INSIDE)
        return self._supervise(
            name, self._in_memory(command), environment | (clock.environment if clock else {}), forever=True
        )

    def _in_memory(self, command: list[str]) -> list[str]:
        """Return the command with the shared memory of this suite."""
        return [*(self.memory.prefix if self.memory else []), *command]

    def _learner_environment(self) -> dict[str, str]:
        clock, devices = self.clocks["learner"], self.options.devices
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **python_path(), **devices.learner_environment}
        if self.options.broadcast:
            own[FOLDER_VARIABLE] = str(self.folder)
        return own | (clock.environment if clock else {})

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        for server in [*self.servers, *([self.other] if self.other else [])]:
            port = server.command[server.command.index("--port") + 1]
            while not ready(f"http://127.0.0.1:{port}"):
                if time.monotonic() > deadline or server.exits:
                    raise RuntimeError(f"{server.name} does not become ready:\n{server.tail()}")
                time.sleep(0.3)

    def training(self, urls: list[str], output: Path) -> list[str]:
        """Return the learner's command."""
        options = self.options
        # Adapters that are broadcast are recorded in the learner itself, which has to import what records them.
        recorder = {"--reward_funcs": "tests.chaos.recorder:odd_with_pauses", "--reward_workers": 0}
        return [
            sys.executable,
            "-m",
            "learner.cli",
            "train",
            "--rollout_url",
            *urls,
            *arguments({"--model_name_or_path": self.model, "--task": self.task, "--output_dir": output}),
            *COMMON,
            *LEARNER_FLAGS,
            *arguments(
                {
                    "--max_steps": options.steps,
                    "--max_staleness": options.staleness,
                    "--deterministic": str(options.deterministic).lower(),
                    "--transport": "collective" if options.broadcast else "auto",
                    **(recorder if options.broadcast else {}),
                }
            ),
            *options.devices.learner_flags,
        ]


def python_path(*folders: Path) -> dict[str, str]:
    """Return $PYTHONPATH with these folders and the repository before what it has."""
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), str(REPOSITORY), *([known] if known else [])])}


def ready(url: str) -> bool:
    """Return whether a server is up and has loaded its model."""
    try:
        return HTTP.get(f"{url}/ready", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False
