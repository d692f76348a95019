"""Evaluate a policy through an agent: run it on a task's evaluation questions, in sessions of a rollout server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from learner.agents.calls import Agent, AgentFailed
from learner.agents.episodes import ATTEMPTS, NO_CALL, AgentError, run_once, session_seconds
from learner.evaluation.evaluate import questions_of, result_of
from learner.evaluation.prompts import shown
from learner.evaluation.results import EvalResult, EvalRow
from learner.servers.client import RolloutClient
from learner.servers.pool import RECOVERABLE
from learner.utils.threads import side_by_side
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import PolicySelector
from shared.sampling import SamplingParams
from shared.sessions import SessionRecord, SessionRequest, Trajectory

if TYPE_CHECKING:
    from learner.tasks import Task

#: Errors of a session that another one need not have.
_LOST = RECOVERABLE | {ErrorCode.UNKNOWN_SESSION, ErrorCode.SESSION_ENDED}
_PAUSE_S = 1.0
#: Name of the agent's reward in results.
AGENT = "agent"


def evaluate_agent(
    client: RolloutClient,
    task: Task,
    agent: Agent,
    *,
    policy: PolicySelector = "latest",
    run_id: str | None = None,
    n_questions: int | None = None,
    sampling: SamplingParams,
    concurrency: int = 32,
    timeout_s: float = 600.0,
    max_calls: int = 256,
    max_tokens: int = 2**17,
    patience_s: float = 60.0,
    ca_file: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Score `policy` by the rewards that `agent` returns for the first `n_questions` of `task.eval`, all by default.

    An episode that fails is run again; one that fails every time has no reward, and is left out. One that is lost with
    its server is run again, too, and has not failed.

    Args:
        sampling: of every call; `n` episodes are run for each question.
        max_calls, max_tokens: of an episode, as in `SessionRequest`.
        patience_s: how long a server that was lost is waited for, in seconds.
        progress: called with (questions begun, all questions).

    Raises:
        AgentError: an agent returns None: its text would have to be scored, and only the trainer does that.
        LockstepError: errors of the server; `invalid_request` if there are no questions.
    """
    rows = questions_of(task, n_questions)
    request = SessionRequest(
        policy=policy,
        run_id=None if policy == "base" else run_id,
        sampling=sampling.model_copy(update={"n": 1}),
        max_calls=max_calls,
        max_tokens=max_tokens,
        max_seconds=session_seconds(timeout_s),
        accept_reward=agent.takes_reward,
        follow=policy == "latest",  # so that no session holds a slot that pushes of a training wait for
    )
    client.close_session(client.open_session(request).session_id)  # what is not served is not waited for
    versions: dict[str, None] = {}
    done, lock, returning = 0, threading.Lock(), threading.Lock()

    def run_in_time(row: dict[str, Any]) -> tuple[SessionRecord, float | None]:
        left_s = patience_s
        while True:
            try:
                return run_once(agent, client, request, row, timeout_s=timeout_s, ca_file=ca_file)
            except LockstepError as error:
                if error.code not in _LOST or left_s <= 0:
                    raise
            since = time.monotonic()
            with returning:  # one waits for all
                time.sleep(min(_PAUSE_S, left_s))
                client.wait_ready(left_s)
            left_s -= time.monotonic() - since

    def run(question: int) -> EvalRow:
        nonlocal done
        for attempt in range(1, ATTEMPTS + 1):
            try:
                record, reward = run_in_time(rows[question])
                sampled = sum(len(t.logprobs) for t in record.trajectories)
                if not sampled:
                    raise AgentFailed(NO_CALL)
                if reward is None:
                    raise AgentError(
                        "the agent returned no reward: learner eval needs one that returns it, reward functions score "
                        "conversations in training only"
                    )
                text = _conversation(client, record)
                break
            except AgentFailed as failure:
                if attempt == ATTEMPTS:
                    record, reward, sampled, text = None, None, 0, f"(failed: {failure})"
        with lock:
            done += 1
            for trajectory in record.trajectories if record else ():
                versions.update({str(span.version or "base"): None for span in trajectory.spans})
            progress(done // sampling.n, len(rows))
        finish = _last(record).finish_reasons[-1] if record else "abort"
        return EvalRow(question, shown(rows[question]["prompt"]), text, finish, sampled, {AGENT: reward}, reward)

    calls = [partial(run, question) for question in range(len(rows)) for _ in range(sampling.n)]
    results = side_by_side(calls, concurrency, "episodes")
    return result_of(task, policy, list(versions), results)


def _conversation(client: RolloutClient, record: SessionRecord) -> str:
    """Return the text of the trajectory that ends with the last call, special tokens included."""
    return client.detokenize(_last(record).token_ids)


def _last(record: SessionRecord) -> Trajectory:
    return max(record.trajectories, key=lambda trajectory: max(trajectory.calls, default=-1))
