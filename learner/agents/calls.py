"""Call an agent, which may be a function or a program: within its time, and every failure as one kind of error."""

from __future__ import annotations

import asyncio
import asyncio.runners
import inspect
import io
import json
import math
import numbers
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from learner.agents import supervisor
from learner.agents.agent_session import AgentSession
from learner.tasks import import_object
from learner.utils import threads
from learner.utils.threads import start
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import InvalidRequest

Row = Mapping[str, Any]
#: Returns a reward, or None where reward functions score the conversation.
AgentFunction = Callable[[AgentSession, Row], float | Awaitable[float | None] | None]

#: How long an agent that was cancelled may take to end, and a program that got SIGTERM.
GRACE_S = 5.0
#: How long after its time an agent returns its failure at the latest: a program's supervisor has a grace period, too.
ENDED_S = 3 * GRACE_S
#: Longest row that is put into a variable: a process may get 128 KiB in one.
_MOST_IN_VARIABLE = 64 * 1024
_SHOWN, _PIECE = 2000, 2**16
#: Their frames are left out of an agent's traceback.
_NOT_THE_AGENTS = {__file__, threads.__file__, asyncio.runners.__file__, inspect.getfile(Future)}


class AgentFailed(Exception):
    """An episode that failed through its agent.

    Attributes:
        kind: the same for failures that are alike.
        details: traceback, or the end of a program's output.
    """

    def __init__(self, what: str, *, kind: str | None = None, details: str = "") -> None:
        super().__init__(what)
        self.kind, self.details = kind or what, details


class Agent(ABC):
    """Runs episodes, one for each call of `run`.

    Attributes:
        is_async: whether clients of its sessions are to be asynchronous.
        takes_reward: whether the reward may also be sent to the session.
    """

    is_async: bool
    takes_reward: bool

    @abstractmethod
    def run(self, session: AgentSession, row: Row) -> float | None:
        """Return the agent's reward. Raises `AgentFailed`."""

    def place(self) -> AbstractContextManager[Agent]:
        """Wait for room for an episode, and keep it for the block, in which the agent returned runs it.

        It comes before the session, whose time counts once it is opened. In this process there is always room.
        """
        return nullcontext(self)

    def close(self) -> None:  # noqa: B027 -- here there is nothing to end
        """End what runs elsewhere."""


class FunctionAgent(Agent):
    """Calls `agent(session, row)`, on a thread of its own; coroutines get an event loop of their own there.

    A plain function that exceeds its time cannot be ended: it is left alone, its session closed.

    Attributes:
        is_limited: whether its time is kept here; else whoever runs it ends this process.
    """

    takes_reward = False
    is_limited = True

    def __init__(self, function: AgentFunction) -> None:
        self.function = function
        call = getattr(function, "__call__", None)  # noqa: B004 -- of an object with an async __call__
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    def run(self, session: AgentSession, row: Row) -> float | None:
        """Return the agent's reward. Raises `AgentFailed`."""
        running = start(partial(self._call, session, _own(row)), "agent")
        try:
            limit_s = session.timeout_s + (GRACE_S if self.is_async else 0.0)
            returned = running.result(limit_s if self.is_limited else None)
        except BaseException as error:  # SystemExit too: it ends the agent, not the learner
            if isinstance(error, _Late) or not running.done():
                raise too_late(session) from error
            raise failure_of(error) from error
        return checked_reward(returned)

    def _call(self, session: AgentSession, row: dict[str, Any]) -> Any:
        returned = self.function(session, row)
        if not inspect.isawaitable(returned):
            return returned

        async def within_time() -> Any:
            task = asyncio.ensure_future(returned)
            done, _ = await asyncio.wait({task}, timeout=session.timeout_s)
            if not done:
                task.cancel()
                raise _Late
            return task.result()

        return asyncio.run(within_time())


def _own(value: Any) -> Any:
    """Return a copy of a row for one run: many agents go on writing in `row["prompt"]`, which other runs read, too."""
    if isinstance(value, Mapping):
        return {key: _own(inner) for key, inner in value.items()}
    return [_own(inner) for inner in value] if isinstance(value, list) else value


class _Late(TimeoutError):
    """The time of an agent is over; not a timeout of its own."""


class ProgramAgent(Agent):
    """Runs a command of the shell for each episode, in a process group of its own, which ends with this process."""

    is_async = False
    takes_reward = True

    def __init__(self, command: str) -> None:
        self.command = command

    def run(self, session: AgentSession, row: Row) -> float | None:
        """Return the reward that the program wrote; None if it wrote none. Raises `AgentFailed`."""
        with tempfile.TemporaryDirectory(prefix="lockstep-episode-", ignore_cleanup_errors=True) as folder:
            reward_file = Path(folder, "reward")
            environment = self._environment(session, row, Path(folder), reward_file)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), folder, self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # it may be the model's text: nothing is read from it
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            said = _End(process)
            code: int | None = None
            try:
                code = process.wait(session.timeout_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                _end_group(process)
            if code is None:
                raise too_late(session, said.text())
            if code != 0:
                raise AgentFailed(f"the program ended with exit code {code}", details=said.text())
            return _written_reward(reward_file)

    def _environment(self, session: AgentSession, row: Row, folder: Path, reward_file: Path) -> dict[str, str]:
        text = json.dumps(dict(row), default=str)
        row_file = folder / "row.json"
        row_file.write_text(text, encoding="utf-8")
        # The server's token opens all of it: an agent gets that of its session only.
        inherited = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        return {
            **inherited,
            **session.environment,
            "LOCKSTEP_SESSION_URL": session.url,
            "LOCKSTEP_ROW_FILE": str(row_file),
            "LOCKSTEP_REWARD_FILE": str(reward_file),
            **({"LOCKSTEP_ROW": text} if len(text.encode()) <= _MOST_IN_VARIABLE else {}),
        }


def agent_of(path: str | None, command: str | None, function: AgentFunction | None = None) -> Agent | None:
    """Return the agent at an import path, of a command, or of a function; None without any.

    Raises:
        LockstepError: it cannot be imported or called, or there are two.
    """
    named = {"agent": path or function, "agent_command": command}
    if sum(map(bool, (path, command, function))) > 1:
        found = " and ".join(name for name, value in named.items() if value)
        raise InvalidRequest(f"{found}: two agents are given; give one of them")
    if command:
        return ProgramAgent(command)
    given = import_object(path) if path else function
    if isinstance(given, type):  # calling it makes an agent, and no reward
        raise InvalidRequest(
            f"agent {path or given.__name__!r} is a class: give a function, or an object that is called"
        )
    if given is not None and not callable(given):
        raise InvalidRequest(f"agent {path or given!r} is not a function, but a {type(given).__name__}")
    return FunctionAgent(given) if given else None


def checked_reward(value: Any) -> float | None:
    """Return a reward as a float; raises `AgentFailed` for what is no finite number."""
    if value is None:
        return None
    if hasattr(value, "item") and not isinstance(value, numbers.Real):  # a tensor of one number
        with suppress(Exception):
            value = value.item()
    try:
        reward = float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:  # a whole number beyond all floats
        reward = math.inf
    if not math.isfinite(reward):
        raise AgentFailed(f"it returned {_shown(value, repr):.80}, not a reward: a finite number, or None")
    return reward


def _written_reward(file: Path) -> float | None:
    if not file.is_file():
        return None
    text = file.read_text(errors="replace").strip()
    try:
        return checked_reward(float(text))
    except (ValueError, AgentFailed):
        where = "LOCKSTEP_REWARD_FILE"
        raise AgentFailed(f"{where} holds {text!r:.80}, not a finite number", kind=where) from None


class _End:
    """Keeps the end of what a program writes to stderr, and no more: in minutes it may be more than a disk holds."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._kept = b""
        try:
            self._all_read = start(partial(self._read, cast(io.BufferedReader, process.stderr)), "agent-stderr")
        except RuntimeError:  # no more threads
            _end_group(process)
            raise

    def _read(self, pipe: io.BufferedReader) -> None:
        with pipe:
            while piece := pipe.read1(_PIECE):
                self._kept = (self._kept + piece)[-_SHOWN:]

    def text(self) -> str:
        """Return it, once all processes of the program have ended."""
        with suppress(TimeoutError):  # one that has got away may hold the pipe open
            self._all_read.result(GRACE_S)
        return self._kept.decode("utf-8", "replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left: SIGTERM where the program itself runs on, after which its supervisor ends all that it has
    started; then SIGKILL to its group.
    """
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(2 * GRACE_S)  # the program, and then the supervisor
        if process.poll() != -signal.SIGKILL:  # else the supervisor ends them, also where another has killed its parent
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def too_late(session: AgentSession, details: str = "") -> AgentFailed:
    """Return the failure of an agent whose time is over."""
    return AgentFailed(f"it did not end within {session.timeout_s:g} s (agent_timeout_s)", details=details)


def failure_of(error: BaseException) -> AgentFailed:
    """Return the failure of an episode whose agent, or whose process, has raised `error`."""
    if isinstance(error, AgentFailed):
        return error
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_code.co_filename in _NOT_THE_AGENTS:
        trace = trace.tb_next
    frames = traceback.extract_tb(trace)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    details = "".join(traceback.format_exception(type(error), error, trace))
    name = type(error).__name__
    return AgentFailed(f"{name}: {_shown(error, str)}", kind=f"{name} at {where}", details=details)


def _shown(value: object, show: Callable[[object], str]) -> str:
    """Return the text of an object that is the user's, and may have none."""
    try:
        return show(value)
    except Exception:
        return f"<{type(value).__name__}>"
