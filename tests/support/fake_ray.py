"""Ray as our own logic sees it: nodes, placement groups and named actors, all within this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from learner.cluster.actors import HostedActor
from learner.cluster.hosted import Command, Report


class RayError(Exception): ...


class GetTimeoutError(RayError): ...


class ActorUnavailableError(RayError): ...


class ActorDiedError(RayError): ...


class RayTaskError(RayError): ...


class FakeRay:
    """The parts of the module `ray` that the room of clusters calls; a reference is a function.

    Attributes:
        hosted: actors of commands, by name, in the order of their starts; a test puts what they report.
        has: resources of each node, by address; the first is that of this process.
        placed: the scheduling strategies of named actors.
        ended: names of those that were told to end.
        script: what actors report from their start on, by name.
        workers: actors without a name that are no hosted commands; `options` has what each was started with.
        before: called with actor, method and arguments before each of their calls; a test raises there what Ray would.
        groups: bundles of the placement groups that there are; `reserved`: of all there were, with strategy and name.
        has_room: set while placement groups have room; `waits`: how often one of them was found to have none.
        stored: what was put into the object store.
        connected: whether this process is.
    """

    def __init__(self, **has: dict[str, float]) -> None:
        self.has = {name.replace("_", "."): resources for name, resources in has.items()}
        self.hosted: dict[str, list[Any]] = {}
        self.named: dict[str, Any] = {}
        self.placed: dict[str, Any] = {}
        self.killed: list[Any] = []
        self.ended: list[str] = []
        self.script: dict[str, list[Report | Exception]] = {}
        self.groups: list[list[dict[str, float]]] = []
        self.reserved: list[tuple[list[dict[str, float]], str, str]] = []
        self.workers: list[Actor] = []
        self.options: list[dict[str, Any]] = []
        self.before: Callable[[Any, str, tuple[Any, ...]], None] = lambda actor, method, args: None
        self.has_room, self.waits = threading.Event(), 0
        self.has_room.set()
        self.stored: list[Any] = []
        self.connected = True
        self.exceptions = SimpleNamespace(
            RayError=RayError,
            RayTaskError=RayTaskError,
            GetTimeoutError=GetTimeoutError,
            ActorUnavailableError=ActorUnavailableError,
            ActorDiedError=ActorDiedError,
        )
        strategies = SimpleNamespace(
            NodeAffinitySchedulingStrategy=lambda node_id, soft: ("soft" if soft else "hard", node_id),
            PlacementGroupSchedulingStrategy=lambda **kwargs: None,
        )
        self.util = SimpleNamespace(
            scheduling_strategies=strategies,
            placement_group=self._placement_group,
            remove_placement_group=lambda group: self.groups.remove(group.bundle_specs),
            list_named_actors=lambda all_namespaces: [{"name": name, "namespace": "lockstep"} for name in self.named],
        )

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"node-{address}", "NodeManagerAddress": address, "Resources": resources, "Alive": True}
            for address, resources in self.has.items()
        ]

    def available_resources(self) -> dict[str, float]:
        return {}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: f"node-{next(iter(self.has))}")

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        try:
            return reference()
        except GetTimeoutError:
            time.sleep(min(timeout or 0.0, 0.01))
            raise

    def put(self, value: Any) -> Any:
        self.stored.append(value)
        return value

    def is_initialized(self) -> bool:
        return self.connected

    def get_actor(self, name: str, namespace: str) -> Any:
        if name not in self.named:
            raise ValueError(name)
        return self.named[name]

    def shutdown(self) -> None: ...

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._maker(kind, options)))

    def _maker(self, kind: type, options: dict[str, Any]) -> Any:
        def make(*args: Any) -> Any:
            if "name" in options:
                self.named[options["name"]] = actor = Actor(kind(*args))
                self.placed[options["name"]] = options.get("scheduling_strategy")
                return actor
            if kind is not HostedActor:
                self.options.append(options)
                self.workers.append(Actor(kind(*args), lambda *call: self.before(*call)))
                return self.workers[-1]
            command, name, _ = args
            hosted = self.hosted.setdefault(name, [])
            hosted.append(Scripted(name, command, options, self.ended))
            for report in self.script.get(name, ()):
                hosted[-1].reports.put(report)
            return Actor(hosted[-1])

        return make

    def _placement_group(self, bundles: list[dict[str, float]], strategy: str, name: str = "") -> Any:
        self.groups.append(bundles)
        self.reserved.append((bundles, strategy, name))
        return SimpleNamespace(bundle_specs=bundles, wait=self._wait_for_room)

    def _wait_for_room(self, timeout: float) -> bool:
        self.waits += not self.has_room.is_set()
        return self.has_room.wait(min(timeout, 0.05))


class Actor:
    """An actor: its methods have `remote`, which returns a reference."""

    def __init__(self, of: Any, before: Callable[[Any, str, tuple[Any, ...]], None] | None = None) -> None:
        self._of, self._before = of, before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._of, name)
        if name == "report":
            return SimpleNamespace(remote=lambda *args: lambda: method(*args))

        def call(*args: Any) -> Callable[[], Any]:
            outcome: Future[Any] = Future()
            try:
                if self._before:
                    self._before(self, name, args)
                outcome.set_result(method(*args))
            except Exception as error:  # raised to who asks for it
                outcome.set_exception(error)
            return outcome.result

        return SimpleNamespace(remote=call)


class Scripted:
    """A hosted command that reports what a test puts into `reports`: a report, or an error to raise."""

    def __init__(self, name: str, command: Command, options: dict[str, Any], ended: list[str]) -> None:
        self.name, self.command, self.options, self._ended = name, command, options, ended
        self.reports: queue.SimpleQueue[Report | Exception] = queue.SimpleQueue()

    def end(self, patience_s: float | None = None) -> None:
        self._ended.append(self.name)
        self.reports.put(Report("life", "", status=0, ended=1, over=True))

    def report(self, life: str, changes: int, seen: int, wait_s: float) -> Report:
        report = self.reports.get()
        if isinstance(report, Exception):
            raise report
        return report
