"""A job on a Ray cluster: rollout servers and a learner, placed, followed, and ended together."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from learner.cluster.actors import host
from learner.cluster.connection import NAMESPACE, last_line
from learner.cluster.directory import make_directory
from learner.cluster.hosted import Command, Report
from learner.cluster.learner_nodes import LearnerNodes
from learner.cluster.member import Member
from learner.cluster.resources import Needs, Node, Resources, check_room, describe, nodes, on_node
from learner.utils.threads import start
from shared.messages import one_line
from shared.placement import PLACEMENT_VARIABLE

#: Times that servers may end without ever having been ready, before all is given up; after wrong options: once.
_ATTEMPTS = 3
_WRONG_OPTIONS = 2
_REPORT_S, _ANSWER_S, _RETRY_S, _SAY_S, _GRACE_S = 5.0, 60.0, 1.0, 15.0, 15.0


@dataclass(frozen=True)
class ClusterJob:
    """What runs: `servers` of them at least and at most, and one learner.

    Attributes:
        name: of the directory that lists the servers.
        learner: its commands, one for each of its nodes (`LearnerNodes`).
        server_needs, learner_needs: resources, in Ray's names. A server whose workers Ray places runs beside the first.
        home: the node of the learner, or of its first command; None: any.
        can_resume: whether a learner whose node is gone may be started on another.
    """

    name: str
    server: Command
    servers: tuple[int, int]
    server_needs: Needs
    learner: Sequence[Command]
    learner_needs: Needs
    home: Node | None = None
    can_resume: Callable[[], bool] = lambda: False


class RunningJob:
    """A job from its start to its end.

    Args:
        ray: connected.
        show: takes a member's name and a line of its.
        say: takes a line of the job's own.
    """

    def __init__(
        self, ray: Any, job: ClusterJob, show: Callable[[str, str], object], say: Callable[[str], object]
    ) -> None:
        self._ray, self._job, self._show, self._say = ray, job, show, say
        self._servers: list[Member] = []
        self._learner: LearnerNodes | None = None
        self._groups: list[Any] = []
        self._events: queue.SimpleQueue[tuple[Member, Report | Exception]] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._directory: Any = None

    def run(self) -> tuple[int, str]:
        """Place and start all, and follow it until the learner ends; return its exit status, and what went wrong.

        Raises:
            InvalidRequest: the cluster is too small. Nothing has been started then.
        """
        job, found, (least, most) = self._job, nodes(self._ray), self._job.servers
        check_room(found, job.server_needs, least, job.learner_needs)
        own = [job.learner_needs.bundle] * job.learner_needs.bundles
        if job.home:
            own[0] = on_node(own[0], job.home)
        if job.server_needs.parts:  # vLLM takes a placement group for that of one engine
            group = self._reserve(own, "PACK")
            self._wait_for_room([group], least)  # first: the others would take what it waits for
            places = [(self._reserve_server(number), 0) for number in range(least)]
            self._wait_for_room([reserved for reserved, _ in places], least)
        else:
            group = self._reserve([*own, *[job.server_needs.bundle] * least], "SPREAD")
            places = [(group, len(own) + number) for number in range(least)]
            self._wait_for_room([group], least)
        # It is lost with its node, so that must not be one of a server alone.
        self._directory = make_directory(self._ray, job.name, job.home.node_id if job.home else _head(found))
        for number, (reserved, bundle) in enumerate(places):
            self._begin_server(self._server(number, reserved, bundle))
        room = partial(start, partial(_wait, [group]), "learner-room")
        self._learner = LearnerNodes(job.learner, group, self._begin, self._drop, room, job.can_resume, self._say)
        self._learner.begin()
        for number in range(least, most):
            member = self._server(number, self._reserve_server(number), 0)
            start(partial(self._begin_with_room, member), f"room-{number}")
        while True:
            if (outcome := self._next(0.5) or self._learner.outcome()) is not None:
                return outcome

    def end(self, hurry: threading.Event) -> None:
        """End the learner, then the servers, and give back what was reserved.

        Args:
            hurry: once it is set they get no more time to end by themselves.
        """
        self._ending.set()
        self._end(self._learner.members if self._learner else [], hurry)
        self._end(self._servers, hurry)
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            for group in self._groups:
                self._ray.util.remove_placement_group(group)
            if self._directory is not None:
                self._ray.kill(self._directory)

    def _reserve(self, bundles: list[Resources], strategy: str, name: str = "") -> Any:
        group = self._ray.util.placement_group([dict(bundle) for bundle in bundles], strategy=strategy, name=name)
        self._groups.append(group)
        return group

    def _reserve_server(self, number: int) -> Any:
        needs = self._job.server_needs
        return self._reserve([needs.bundle] * needs.bundles, "PACK", self._group_name(number))

    def _group_name(self, number: int) -> str:
        return f"{self._job.name}-{number + 1}"

    def _server(self, number: int, group: Any, bundle: int) -> Member:
        name, command = f"server-{number + 1}", self._job.server
        if not self._job.server_needs.parts:
            return Member(name, command, group, bundle, -1)
        placed = {PLACEMENT_VARIABLE: f"{NAMESPACE}/{self._group_name(number)}"}
        command = replace(command, environment={**command.environment, **placed})
        return Member(name, command, group, bundle, -1, leaves=("GPU",))  # for the first worker

    def _wait_for_room(self, groups: Sequence[Any], servers: int) -> None:
        room, due = start(partial(_wait, groups), "room"), time.monotonic() + _SAY_S
        while not room.done():
            time.sleep(0.1)
            if time.monotonic() > due:
                needs, learner = self._job.server_needs, self._job.learner_needs
                free = describe(self._ray.available_resources())
                self._say(f"waiting for room for {servers} x {needs}, and {learner} for the learner; free are {free}")
                due += _SAY_S
        room.result()

    def _begin_with_room(self, member: Member) -> None:
        """Start a server as soon as the cluster has room for it."""
        try:
            _wait([member.group])
            if not self._ending.is_set():
                self._begin_server(member)
        except Exception as error:  # of Ray, of any kind: the others go on
            self._say(f"{member.name} is not started: {one_line(error)}")

    def _begin_server(self, member: Member) -> None:
        self._host(member)
        self._servers.append(member)
        self._watch(member)

    def _begin(self, member: Member) -> None:
        self._host(member)
        self._watch(member)

    def _host(self, member: Member) -> None:
        member.actor = host(
            self._ray,
            member.command,
            member.name,
            self._job.name,
            group=member.group,
            bundle=member.bundle,
            restarts=member.restarts,
            leaves=member.leaves,
        )

    def _watch(self, member: Member) -> None:
        threading.Thread(target=self._follow, args=(member,), name=f"follow-{member.name}", daemon=True).start()

    def _drop(self, member: Member) -> None:
        """Give back what a member has that has ended: its actor would hold it on."""
        with contextlib.suppress(Exception):
            self._ray.kill(member.actor)

    def _follow(self, member: Member) -> None:
        """Ask a member how it stands, again and again, until it is over."""
        errors, last, is_lost = self._ray.exceptions, Report("", ""), False
        while True:
            try:
                asked = member.actor.report.remote(last.life, last.changes, last.seen, _REPORT_S)
                last = self._ray.get(asked, timeout=_ANSWER_S)
            except errors.GetTimeoutError:
                continue
            except Exception as error:
                if isinstance(error, errors.ActorDiedError) or self._ending.is_set():
                    member.done.set()  # first: it tells who takes the error that none comes after it
                    self._events.put((member, error))
                    return
                if not is_lost:
                    self._events.put((member, error))
                is_lost = True
                time.sleep(_RETRY_S)
                continue
            is_lost = False
            self._events.put((member, last))
            if last.over:
                member.done.set()
                return

    def _next(self, wait_s: float) -> tuple[int, str] | None:
        """Take the next event, if there is one; return the job's exit status and what went wrong once it has ended."""
        try:
            member, event = self._events.get(timeout=wait_s)
        except queue.Empty:
            return None
        return self._failed(member, event) if isinstance(event, Exception) else self._reported(member, event)

    def _reported(self, member: Member, report: Report) -> tuple[int, str] | None:
        for line in report.lines:
            self._show(member.name, line)
        before, member.report = member.report, report
        if before.life and before.life != report.life:
            self._say(f"{member.name} begins anew on {report.node}")
            before = Report("", "")
        elif member.lost:
            self._say(f"{member.name} is heard of again on {report.node}")
        member.lost = False
        if report.ready and not before.ready:
            member.was_ready = True
            self._say(f"{member.name} is ready on {report.node}: {report.url}")
        if self._ending.is_set():
            return None
        if member not in self._servers:
            if self._learner and member in self._learner.members:  # not one of before
                self._learner.follow(member)
            return None
        if report.ended == before.ended:
            return None
        if self._is_hopeless():
            return 1, member.fate
        self._say(f"{member.fate}; it is started again in {report.pause_s:.0f} s")
        return None

    def _is_hopeless(self) -> bool:
        """Return whether no server has ever been ready, and each has been tried often enough."""
        return not any(member.was_ready for member in self._servers) and all(
            member.report.ended >= (1 if member.report.status == _WRONG_OPTIONS else _ATTEMPTS)
            for member in self._servers
        )

    def _failed(self, member: Member, error: Exception) -> tuple[int, str] | None:
        if self._ending.is_set():
            return None
        if not member.done.is_set():  # Ray starts it again
            member.lost = True
            node = member.report.node
            anew = "; it begins anew where there is room" if member.restarts else ""
            self._say(f"{member.name}: its node is gone ({node}), or out of reach{anew}")
            return None
        member.gone = last_line(error)
        if member not in self._servers:
            return None
        if all(server.done.is_set() for server in self._servers):
            return 1, member.fate
        self._say(member.fate)
        return None

    def _end(self, members: list[Member], hurry: threading.Event) -> None:
        patience = max((member.command.patience_s for member in members), default=0.0)
        deadline, hurried = time.monotonic() + patience + _GRACE_S, False
        for member in members:
            member.end()
        while not all(member.done.is_set() for member in members) and time.monotonic() < deadline:
            if hurry.is_set() and not hurried:
                hurried, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
                for member in members:
                    member.end(0.0)
            self._next(0.1)
        while not self._events.empty():
            self._next(0.0)
        for member in members:
            self._drop(member)


def _wait(groups: Sequence[Any]) -> None:
    for group in groups:
        while not group.wait(_ANSWER_S):
            pass


def _head(found: list[Node]) -> str | None:
    return next((node.node_id for node in found if "node:__internal_head__" in node.has), None)
