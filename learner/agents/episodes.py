"""Episodes: run the agent once for each row of a batch, side by side, over all rollout servers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from learner.agents.agent_session import AgentSession
from learner.agents.calls import Agent, AgentFailed, failure_of
from learner.agents.trajectories import Episode, episode_of, left_out
from learner.rollouts.completions import AllowedVersion, sampled_length
from learner.rollouts.dispatch import STEP_WAIT_S
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from learner.servers.router import GroupRequest, Router
from learner.utils.threads import side_by_side
from shared.errors import Draining, InvalidRequest, LockstepError, UnknownRun, UnknownSession
from shared.sampling import SamplingParams
from shared.sessions import SessionRecord, SessionRequest

logger = logging.getLogger("lockstep.agents")

#: How often an episode is run, if its agent fails.
ATTEMPTS = 3
#: How much longer than its agent a session may live, in seconds.
_SPARE_S = 60.0
_MOST_SECONDS = 86400.0


#: Said of an agent that leaves nothing to train on.
NO_CALL = "it made no call that sampled a token: do its requests go to session.base_url?"


#: Said of an agent that leaves its reward to nobody.
NO_REWARD = (
    "the agent returned None, which leaves its reward to reward functions, and there are none: let it return a number "
    "(a program writes one to LOCKSTEP_REWARD_FILE), or give reward_funcs"
)


class AgentError(InvalidRequest):
    """No episode of a batch was left: the agent fails every time; the message has its last failure."""


def check_some_are_left(failures: Sequence[str | None]) -> None:
    """Raise `AgentError` if every episode of a batch, over all ranks, has failed; None: it has not."""
    if not all(failures):
        return
    if NO_REWARD in failures:
        raise AgentError(f"none of {len(failures)} episodes has a reward: {NO_REWARD}")
    raise AgentError(
        f"the agent failed in every one of {len(failures)} episodes, each run {ATTEMPTS} times: {failures[-1]}"
    )


def session_seconds(timeout_s: float) -> float:
    """Return how long the session of an agent with this timeout may live."""
    return min(timeout_s + _SPARE_S, _MOST_SECONDS)


def run_once(
    agent: Agent,
    client: RolloutClient,
    request: SessionRequest,
    row: Mapping[str, Any],
    *,
    timeout_s: float,
    ca_file: str | None = None,
) -> tuple[SessionRecord, float | None]:
    """Run an agent in a session of its own; return what it recorded, and the agent's reward.

    Raises:
        AgentFailed: through the agent.
        LockstepError: through the server, which was lost, or leaves.
    """
    opened = client.open_session(request)
    session = AgentSession.of(opened, client.url, ca_file=ca_file, timeout_s=timeout_s, is_async=agent.is_async)
    failure, reward = None, None
    try:
        reward = agent.run(session, row)
    except Exception as error:
        failure = failure_of(error)
    try:
        record = client.close_session(opened.session_id)
    except UnknownSession as error:
        raise UnknownRun(f"{client.url} has lost a session: {error.message}") from error  # it has restarted
    if record.ended in ("run_ended", "superseded"):
        why = "its run has ended there" if record.ended == "run_ended" else "a push needed its slot"
        raise UnknownRun(f"{client.url} has ended a session, because {why}")
    if failure:
        if client.state().draining:  # calls are refused
            raise Draining(f"{client.url} is about to leave")
        if limit := {"max_calls": request.max_calls, "max_tokens": request.max_tokens}.get(record.ended or ""):
            which = f"agent_{record.ended}"
            raise AgentFailed(
                f"it had used up {which} {limit}: raise it, or let the agent stop earlier ({failure})",
                kind=which,
                details=failure.details,
            ) from failure
        raise failure
    return record, record.reward if reward is None and agent.takes_reward else reward


@dataclass
class EpisodeCounts:
    """Counts over the training, on this rank.

    Attributes:
        run: episodes that were begun.
        failed: runs that failed through their agent; most of them were run again.
        left_out: episodes whose agent failed every time.
        lost: runs that were lost with their server, and run again.
    """

    run: int = 0
    failed: int = 0
    left_out: int = 0
    lost: int = 0


@dataclass
class Episodes:
    """Runs episodes.

    Args:
        agent: what is run.
        pool: the rollout servers.
        sampling: the trainer's, of every call.
        concurrency: episodes that run at a time, over all batches.
        timeout_s: how long an agent may take.
        max_calls, max_tokens: of an episode, as in `SessionRequest`.
        before: called before the first episode of a batch.
    """

    agent: Agent
    pool: ServerPool
    sampling: SamplingParams
    concurrency: int = 32
    timeout_s: float = 600.0
    max_calls: int = 256
    max_tokens: int = 2**17
    ca_file: str | None = None
    before: Callable[[], None] = lambda: None
    counts: EpisodeCounts = field(default_factory=EpisodeCounts, init=False)

    def __post_init__(self) -> None:
        self.router = Router(self.sampling.max_tokens)
        self._slots = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()
        self._kinds: Counter[str] = Counter()
        self._closed = False

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        requests: Sequence[GroupRequest],
        allowed: Callable[[], AllowedVersion],
    ) -> list[Episode]:
        """Return an episode for each row of `requests`, in row order.

        Args:
            rows: dataset rows of the batch; `requests` name those to run.
            allowed: evaluated for every episode that begins.

        Raises:
            LockstepError: a record does not fit together, or no server is up.
        """
        self.before()
        calls = [
            partial(self._in_turn, rows[request.first_row + i], request.token_ids, allowed)
            for request in sorted(requests, key=lambda request: request.first_row)
            for i in range(request.n)
        ]
        return side_by_side(calls, self.concurrency, "episodes")

    def _in_turn(self, row: Mapping[str, Any], token_ids: list[int], allowed: Callable[[], AllowedVersion]) -> Episode:
        with self._slots:
            return self._episode(row, token_ids, allowed)

    def totals(self) -> dict[str, int]:
        """Return the counts, as the training's summary names them."""
        counts = self.counts
        return {
            "agent_episodes": counts.run,
            "agent_failed_runs": counts.failed,
            "agent_left_out": counts.left_out,
            "agent_lost_runs": counts.lost,
        }

    def close(self) -> None:
        """End what agents run elsewhere; it is not said of their episodes that they failed."""
        self._closed = True
        self.agent.close()

    def _episode(self, row: Mapping[str, Any], token_ids: list[int], allowed: Callable[[], AllowedVersion]) -> Episode:
        self._count("run")
        failures, failing_since = 0, None
        while True:
            with self.agent.place() as agent:
                version = allowed()
                replica, cost = self._begin(token_ids)
                incarnation, tokens = replica.incarnation, 0
                try:
                    episode = self._attempt(agent, replica, row, version)
                    tokens = sampled_length(episode)
                    replica.failures = 0
                    return episode
                except AgentFailed as failure:
                    failures, failing_since = failures + 1, None
                    self._say(failure, failures)
                    if failures == ATTEMPTS:
                        self._count("left_out")
                        filler = next(iter(self.sampling.stop_token_ids), token_ids[-1])
                        return left_out(token_ids, filler, version, str(failure))
                except LockstepError as error:
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() > failing_since + self.pool.patience_s:
                        raise
                    self.pool.lost_or_raise(replica, error, incarnation)
                    self._count("lost")
                finally:
                    replica.load.end(cost, tokens)
                    if tokens:
                        self.router.saw([tokens])
                        self.pool.on_tokens(replica, tokens)

    def _begin(self, token_ids: list[int]) -> tuple[Replica, float]:
        """Choose the server that will finish first; return it and the cost that its load now holds."""
        replicas = self.pool.available()
        with self._lock:
            request = GroupRequest(0, token_ids, 1)
            ((replica, _),) = self.router.split([request], replicas)
            cost = self.router.cost(request)
            replica.load.begin(cost)
        return replica, cost

    def _attempt(self, agent: Agent, replica: Replica, row: Mapping[str, Any], allowed: AllowedVersion) -> Episode:
        """Run the agent once. Raises as `run_once`."""
        client, request = replica.client, self._request(allowed)
        record, reward = run_once(agent, client, request, row, timeout_s=self.timeout_s, ca_file=self.ca_file)
        episode = episode_of(record, allowed, reward)
        if episode is None:
            raise AgentFailed(NO_CALL)
        return episode

    def _request(self, allowed: AllowedVersion) -> SessionRequest:
        follows = {} if allowed.exact else {"min_step": allowed.version.step, "wait_s": STEP_WAIT_S}
        return SessionRequest(
            run_id=allowed.version.run_id,
            policy=allowed.version if allowed.exact else "latest",
            follow=not allowed.exact,
            sampling=self.sampling,
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
            max_seconds=session_seconds(self.timeout_s),
            accept_reward=self.agent.takes_reward,
            **follows,
        )

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self.counts, name, getattr(self.counts, name) + 1)

    def _say(self, failure: AgentFailed, failures: int) -> None:
        with self._lock:
            self.counts.failed += 1
            self._kinds[failure.kind] += 1
            said_before = self._kinds[failure.kind] > 1
        if said_before or self._closed:
            return
        then = "run again" if failures < ATTEMPTS else "left out of its group"
        details = f"\n{failure.details.rstrip()}" if failure.details else ""
        logger.warning("an episode failed, and is %s (said once for each kind): %s%s", then, failure, details)
