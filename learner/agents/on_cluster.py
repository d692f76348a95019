"""Agents whose episodes run on the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle

from learner.agents.agent_session import AgentSession
from learner.agents.calls import ENDED_S, GRACE_S, Agent, AgentFailed, FunctionAgent, Row, failure_of, too_late
from learner.cluster.resources import Resources
from learner.cluster.secret_files import SecretFile
from learner.cluster.workers import WorkerDied, WorkerPool, pools_on_cluster
from learner.servers.credentials import ssl_context
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import InvalidRequest

#: An episode mostly waits for the model, so several share a core.
_CPUS = 0.25
#: In an actor: the agent, and the CA's certificate where it has one.
_here: dict[str, Any] = {}


class AgentOnCluster(Agent):
    """Runs each episode of an agent in an actor, as many at a time as there are actors.

    An actor that exceeds an episode's time, or whose process ends, costs that episode only: it is replaced.
    """

    def __init__(self, agent: Agent, pool: WorkerPool) -> None:
        self.is_async, self.takes_reward, self._pool = agent.is_async, agent.takes_reward, pool
        self._spare_s = _spare_s(agent)

    @contextlib.contextmanager
    def place(self) -> Iterator[Agent]:
        """See `Agent`.

        Raises:
            InvalidRequest: no actor can be started, on any node.
            NotReady: none has run for minutes, or all were ended.
        """
        with self._pool.reserve("an episode") as call:
            yield _Placed(self, self._spare_s, call)

    def run(self, session: AgentSession, row: Row) -> float | None:
        """See `Agent`; waits for a place."""
        with self.place() as agent:
            return agent.run(session, row)

    def close(self) -> None:
        """End all actors, whatever they are doing."""
        self._pool.close()


class _Placed(Agent):
    """An agent in one actor, which `call` calls, see `WorkerPool.reserve`."""

    def __init__(self, agent: Agent, spare_s: float, call: Callable[..., Any]) -> None:
        self.is_async, self.takes_reward = agent.is_async, agent.takes_reward
        self._spare_s, self._call = spare_s, call

    def run(self, session: AgentSession, row: Row) -> float | None:
        episode = cloudpickle.dumps((session, dict(row)))  # here, where it is an error of this episode
        try:
            returned = self._call(_run, (episode,), session.timeout_s + self._spare_s)
        except TimeoutError as error:
            raise too_late(session) from error
        except WorkerDied as died:
            what = "its process on the Ray cluster ended, by itself or with its node"
            raise AgentFailed(f"{what}: {died}", kind="worker") from died
        if isinstance(returned, AgentFailed):
            raise returned
        return returned


def agents_on_cluster(agent: Agent | None, needs: Resources, ca_file: str | None) -> Callable[[int], AgentOnCluster]:
    """Return what starts actors, as many as it is told, that run an agent on the Ray cluster.

    Args:
        needs: resources of each actor, in Ray's names; by default a quarter of a core.
        ca_file: CA of the servers' certificates, which goes there with the agent.

    Raises:
        InvalidRequest: there is no agent, or it cannot be sent to other processes; see also `pools_on_cluster`.
    """
    if agent is None:
        raise InvalidRequest("agent_backend ray: there is no agent to run there; give agent or agent_command")
    try:
        pickled = cloudpickle.dumps(agent)
    except Exception as error:  # of what the agent holds, of any kind
        raise InvalidRequest(
            f"agent_backend ray: the agent cannot be sent to other processes ({error}): define it at the top level of "
            "a module, without locks, sockets or clients in it"
        ) from error
    ssl_context(ca_file)  # raises where the file cannot be read
    ca = Path(ca_file).read_bytes() if ca_file else None
    make, folder = pools_on_cluster("agent", {"CPU": _CPUS, **needs}, "an agent"), os.getcwd()
    return lambda count: AgentOnCluster(agent, make(count, _prepare, (pickled, ca, folder)))


def _spare_s(agent: Agent) -> float:
    """Return how long after its time an episode may end by itself, before it is ended with its actor."""
    if isinstance(agent, FunctionAgent):
        return GRACE_S if agent.is_async else 0.0  # coroutines are cancelled first
    return ENDED_S


def _prepare(pickled: bytes, ca: bytes | None, folder: str) -> None:
    """Load the agent in an actor, which goes to the learner's folder if the node has it."""
    if os.path.isdir(folder):
        os.chdir(folder)
    os.environ.pop(TOKEN_VARIABLE, None)  # of the shell that Ray was started in
    agent = cloudpickle.loads(pickled)
    if isinstance(agent, FunctionAgent):
        agent.is_limited = False  # what it leaves running would slow the next episodes down
    _here.update(agent=agent, ca_file=SecretFile(ca, "lockstep-ca") if ca else None)


def _run(episode: bytes) -> float | AgentFailed | None:
    """Run an episode in an actor; return its failure, since what is raised comes back as an error of Ray's."""
    session, row = cloudpickle.loads(episode)
    if _here["ca_file"]:
        session = dataclasses.replace(session, ca_file=_here["ca_file"].path)
    try:
        return _here["agent"].run(session, row)
    except Exception as error:
        failure = failure_of(error)
        return AgentFailed(str(failure), kind=failure.kind, details=failure.details)  # without traceback and cause
