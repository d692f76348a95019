"""The system under test on a Ray cluster: `learner up --cluster`, while nodes die and others take their places."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.invariants import Checker
from tests.chaos.processes import MARK, belonging
from tests.chaos.recorder import FOLDER_VARIABLE, PAUSE, RECEIPTS
from tests.chaos.recording import Pushes
from tests.chaos.reference import Reference
from tests.chaos.world import LEARNER_FLAGS, RUN_ID, SERVER_PUSH_S, Options, Training
from tests.integration.conftest import FLAGS as SERVER_FLAGS
from tests.integration.support.forked import FORKING
from tests.integration.support.learner_process import COMMON
from tests.integration.support.server import ENVIRONMENT
from tests.support.arguments import arguments
from tests.support.ray_cluster import RayCluster, RayNode

LEARNER = "learner"
OURS = ("rollout_server.cli", "learner.cli")
#: Of a step while nodes die, in which servers that start have the cores.
PAUSE_S = 2.0
START_S, _LEAVE_S, _POLL_S = 900.0, 60.0, 0.2
_SAID = re.compile(
    r"up +\| (?P<name>server-\d+|learner)(?: on (?P<from>\S+))?"
    r"(?: is ready on (?P<node>[\d.]+): (?P<url>\S+)|(?P<back> is heard of again)"
    r"|(?P<gone>: its node is gone| begins anew| ended with| is gone))"
)


class Members:
    """Servers and learner of the job, as `learner up` says that they stand.

    Attributes:
        urls: every address that a server has had, in the order in which they came.
        up: servers that are ready, and the addresses of their nodes.
        learners_lost: times that the learner was gone with its node.
    """

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.up: dict[str, str] = {}
        self.learners_lost = 0
        self._before: dict[str, str] = {}

    def take(self, line: str) -> None:
        """Take a line."""
        if not (said := _SAID.match(line)):
            return
        name = said["name"]
        if said["url"]:
            self.up[name] = said["node"]
            if said["url"] not in self.urls:
                self.urls.append(said["url"])
        elif said["back"] and name in self._before:
            self.up[name] = self._before.pop(name)
        elif said["gone"]:
            self.learners_lost += name == LEARNER and said["gone"] == " is gone"
            if name in self.up:
                self._before[name] = self.up.pop(name)


class Recorded:
    """What the learner has recorded, see `tests.chaos.recorder`."""

    def __init__(self, folder: Path, urls: list[str]) -> None:
        self.pushed = Pushes(folder).stored
        self._file, self._urls, self._read = folder / RECEIPTS, urls, 0
        self._receipts: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._file.touch()

    def receipts(self) -> list[dict[str, Any]]:
        """Return every receipt that has reached the learner, from servers that are known to be ready."""
        with self._lock, self._file.open("rb") as stream:
            stream.seek(self._read)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._receipts.append(json.loads(line))
            known = {url: index for index, url in enumerate(self._urls)}
            return [{**row, "server": known[row["url"]]} for row in self._receipts if row["url"] in known]


class ClusterWorld(Training):
    """A head, on which nothing of ours runs but `learner up`, and a node for each server and for the learner.

    Attributes:
        resumed_from: the newest checkpoint when the learner was lost last.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.output = self.folder / "run"
        self.members = Members()
        self.control = Recorded(self.folder, self.members.urls)
        self.resumed_from: Path | None = None
        self._stopping = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="follow-up", daemon=True)

    def _start(self) -> None:
        count, token = self.options.servers, secrets.token_hex(16)
        self.cluster = self._open.enter_context(RayCluster({MARK: f"{self.suite}/nodes/1/"}))
        self.cluster.add(0).wait_ready()
        for node in [self.cluster.add(1) for _ in range(count + 1)]:
            node.wait_ready()
        (self.folder / "token").write_text(token)
        (self.folder / "token").chmod(0o600)
        (self.folder / PAUSE).write_text(str(PAUSE_S))
        self.checker = Checker(
            [],
            RUN_ID,
            Reference(self.model, self.control.pushed),
            self.control.receipts,
            self.output / "metrics.jsonl",
            self.options.staleness,
            during=lambda: self.during,
            token=token,
        )
        self.learner = self._supervise("up", self._command(), {})
        self.checker.start()
        self._open.callback(self.checker.stop)
        self._follower.start()
        self._open.callback(self._stopping.set)
        if not self.until(self.is_whole, START_S):
            raise RuntimeError(f"the servers do not become ready:\n{self.learner.tail()}")

    def _command(self) -> list[str]:
        own = {FOLDER_VARIABLE: str(self.folder), "PYTHONPATH": FORKING}
        recipe = self.folder / "chaos.yaml"
        recipe.write_text(yaml.safe_dump({"env": {**ENVIRONMENT, **own}}))
        server_flags = arguments({"--push-timeout": SERVER_PUSH_S, "--drain-seconds": 5, "--slots-per-run": 3})
        flags = {
            "--config": recipe,
            "--cluster": self.cluster.address,
            "--servers": self.options.servers,
            "--model_name_or_path": self.model,
            "--task": self.task,
            "--token_file": self.folder / "token",
            "--output_dir": self.output,
        }
        trained = {
            "--reward_funcs": "tests.chaos.recorder:odd_with_pauses",
            "--reward_workers": 0,  # in the learner itself, which has to import it
            "--run_page": "false",
            "--max_steps": self.options.steps,
            "--max_staleness": self.options.staleness,
        }
        return [
            *(sys.executable, "-m", "learner.cli", "up", *arguments(flags)),
            *("--server-flags", shlex.join([*SERVER_FLAGS, *server_flags])),
            *(*COMMON, *LEARNER_FLAGS, *arguments(trained)),
        ]

    def addresses(self) -> list[str]:
        """Return every address that a server has had."""
        return list(self.members.urls)

    def is_whole(self) -> bool:
        """Return whether all servers are ready."""
        return len(self.members.up) == self.options.servers

    def nodes(self) -> list[RayNode]:
        """Return the nodes that are alive, but for the head."""
        return [node for node in self.cluster.nodes[1:] if node.process.poll() is None]

    def until(self, condition: Callable[[], object], within: float) -> bool:
        """Wait until a condition holds; return False if it does not `within` seconds, or once the job has ended."""
        deadline = time.monotonic() + within
        while not condition():
            if time.monotonic() > deadline or self.learner.done.is_set():
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """End the job and the cluster; processes that are left are a violation, and so is a job that had to be begun
        again.
        """
        self.learner.stop()
        running = [process for node in self.nodes() for process in node.running(*OURS)]
        self.require_ended(running, "at the end")
        failed = [(status, words) for _, status, words in self.learner.exits if status]
        self.checker.require("one job", not failed, f"`learner up` has ended with {failed}")
        self.cluster.close()
        left = belonging(f"{self.suite}/", self.learner.sessions)
        self.checker.require("orphans", not left, f"left behind at the end: {left}")

    def require_ended(self, processes: list[psutil.Process], when: str) -> None:
        """Check that processes end, soon."""
        left = psutil.wait_procs(processes, timeout=_LEAVE_S)[1]
        self.checker.require("orphans", not left, f"left behind {when}: {left}")

    def _follow(self) -> None:
        """Take what `learner up` says; every new server is checked from then on."""
        seen, watched = 0, 0
        while not self._stopping.wait(_POLL_S):
            with self.learner.log.open("rb") as log:
                log.seek(seen)
                for line in log:
                    if not line.endswith(b"\n"):
                        break
                    seen += len(line)
                    self.members.take(line.decode(errors="replace"))
            for url in self.members.urls[watched:]:
                self.checker.watch(url)
                watched += 1
