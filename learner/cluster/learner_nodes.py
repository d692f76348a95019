"""The learner of a job, on one node or on several: its commands begin together, end together, and go on together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from learner.cluster.hosted import Command, place
from learner.cluster.member import Member

LEARNER = "learner"
#: Stand in the commands for where the first of them listens for the others.
FIRST_HOST, FIRST_PORT = place("first_host"), place("first_port")
#: For the others to end by themselves once one has: after its work, or a failure, which may be the result of theirs.
_TOGETHER_S, _FAIL_S = 60.0, 5.0
_MOST_REASONS = 3


class LearnerNodes:
    """The commands of the learner, one on each of its nodes.

    Whichever ends otherwise than with status 0 takes the others along, which could only wait for it. If it has gone
    with its node and there is something to go on from, all begin anew.

    Args:
        commands: of the nodes; the first saves, and listens for the others if there are any.
        group: a placement group, whose first bundles are theirs.
        begin: starts a member; `drop` gives its place back.
        room: has a result once there is room for all of them.
        can_resume: whether a learner whose node is gone may be started on another.
        say: takes a line of the job's.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        group: Any,
        begin: Callable[[Member], None],
        drop: Callable[[Member], None],
        room: Callable[[], Future[None]],
        can_resume: Callable[[], bool],
        say: Callable[[str], object],
    ) -> None:
        self._commands, self._group, self._start, self._drop = commands, group, begin, drop
        self._room, self._can_resume, self._say = room, can_resume, say
        self._awaited: Future[None] | None = None
        self.members: list[Member] = []
        self._told: list[Member] = []  # to end, by this
        self._due = math.inf

    def begin(self) -> None:
        """Start the first command; the others follow when it is known where."""
        self._begin(place("host"), place("port"))

    def follow(self, member: Member) -> None:
        """Start the other commands as soon as the first runs; called after every report of one of them."""
        report = member.report
        while len(self.members) < len(self._commands) and report.starts and not report.ended:
            self._begin(report.node, str(report.port))

    def outcome(self) -> tuple[int, str] | None:
        """Return the exit status of the training and what went wrong, once all have ended for good; else None."""
        if self._awaited and self._awaited.done():
            self._awaited.result()
            self._awaited = None
            self.begin()
        # One that was told to end before it had a place would end, unstarted, once it had one.
        over = [m for m in self.members if m.gone or m.report.ended or (m in self._told and not m.report.life)]
        if not over:
            return None
        failed = [member for member in over if member not in self._told and (member.gone or member.report.status)]
        if left := [member for member in self.members if member not in over]:
            now = time.monotonic()
            self._due = min(self._due, now + (_FAIL_S if failed else _TOGETHER_S))
            if now >= self._due:
                for member in left:
                    if member not in self._told:
                        self._told.append(member)
                        member.end()
            return None
        lost = [member for member in over if member.gone and member.report.life]
        if lost and self._can_resume():
            fates = dict.fromkeys(member.fate for member in [*lost, *failed])
            self._say(f"{'; '.join(list(fates)[:_MOST_REASONS])}; the learner goes on where there is room")
            for member in self.members:
                self._drop(member)
            self.members, self._told, self._due = [], [], math.inf
            # The first would wait for the others, which it does for ten minutes only.
            self._awaited = self._room()
            return None
        if not failed:
            return 0, ""
        status = next((member.report.status for member in failed if member.report.status), 1)
        return max(status, 1), "; ".join(member.fate for member in failed[:_MOST_REASONS])

    def _begin(self, host: str, port: str) -> None:
        number = len(self.members)
        command, places = self._commands[number], {FIRST_HOST: host, FIRST_PORT: port}
        command = replace(command, arguments=tuple(places.get(word, word) for word in command.arguments))
        name = f"{LEARNER}-{number + 1}" if number else LEARNER
        self.members.append(Member(name, command, self._group, number, restarts=0))
        self._start(self.members[-1])
