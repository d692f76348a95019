"""`learner eval`: ask policies, and the base, the questions of a task over HTTP and score the answers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.adapters.stored import StoredAdapter, open_adapter
from learner.compare import document, lines, mean_and_stderr
from learner.flags import either_spelling
from learner.servers.client import RolloutClient
from learner.servers.credentials import read_token
from learner.temporary_run import temporary_run
from learner.utils.processes import Stopped, stop_on_signals
from shared.errors import InvalidRequest
from shared.rollouts import GenerateRequest, PolicySelector, Prompt, RolloutGroup
from shared.sampling import SamplingParams

if TYPE_CHECKING:
    from learner.tasks import Task

QUESTIONS_PER_REQUEST = 64
#: Policies that a server has by itself; all others are adapters on disk.
SERVED = ("base", "latest")


@dataclass(frozen=True)
class EvalRow:
    """One completion of one question; `rewards` by name of their function, None where it did not apply."""

    question: int
    prompt: Any
    completion: str
    finish_reason: str
    tokens: int
    rewards: dict[str, float | None]
    reward: float


@dataclass(frozen=True)
class EvalResult:
    """`reward` is the mean over questions of the weighted rewards, `stderr` its standard error."""

    task: str
    policy: str
    versions: list[str]
    questions: int
    reward: float
    stderr: float
    rewards: dict[str, float | None]
    completion_tokens: int
    rows: list[EvalRow]


def evaluate(
    client: RolloutClient,
    task: Task,
    *,
    policy: PolicySelector = "latest",
    run_id: str | None = None,
    n_questions: int | None = None,
    sampling: SamplingParams | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalResult:
    """Score `policy` on the first `n_questions` of `task.eval`, all by default.

    Greedy unless `sampling` says otherwise. Chat messages are templated by the server.
    `progress` is called with (questions done, all questions).

    Raises:
        LockstepError: what the server answers; `invalid_request` if the task holds nothing out.
    """
    rows = [task.eval[i] for i in range(min(n_questions or len(task.eval), len(task.eval)))]
    if not rows:
        raise InvalidRequest(f"task {task.name} has no evaluation questions; see --eval-size")
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=256)
    results: list[EvalRow] = []
    versions: dict[str, None] = {}
    for start in range(0, len(rows), QUESTIONS_PER_REQUEST):
        chunk = rows[start : start + QUESTIONS_PER_REQUEST]
        request = GenerateRequest(
            prompts=[_prompt(row["prompt"]) for row in chunk],
            sampling=sampling,
            policy=policy,
            run_id=None if policy == "base" else run_id,
            return_text=True,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        groups = client.generate(request).groups
        versions |= {str(s.version or "base"): None for g in groups for c in g.completions for s in c.spans}
        results += _score(task, start, chunk, groups)
        progress(start + len(chunk), len(rows))
    return _result(task, policy, list(versions), results)


def main(argv: Sequence[str]) -> int:
    """The command. Answers the exit code."""
    options = make_parser().parse_args(argv)
    task_args = _json_option(options.task_args, "--task-args")
    chat_kwargs = _json_option(options.chat_template_kwargs, "--chat-template-kwargs")
    policies = {name: None if name in SERVED else open_adapter(name) for name in options.policy}
    from learner.tasks import load_task

    task = load_task(
        options.task,
        task_args=task_args,
        eval_size=options.eval_size,
        train_size=options.train_size,
        seed=options.seed,
        reward_specs=options.reward_funcs,
        reward_weights=options.reward_weights,
        prompt_column=options.prompt_column,
        eval_dataset=options.eval_dataset,
    )
    if not task.reward_funcs:
        raise InvalidRequest(
            f"{task.name} has no reward functions to score answers with (an environment's reward needs its tools, and "
            "TRL, to be run): name some with --reward-funcs, or another task"
        )
    try:
        sampling = SamplingParams(
            n=options.n, temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens
        )
    except ValueError as error:
        raise InvalidRequest(str(error).replace("\n", " ")) from error

    def ask(client: RolloutClient, name: str, stored: StoredAdapter | None) -> EvalResult:
        with _serving(client, name, stored, options.run_id) as (policy, run_id):
            result = evaluate(
                client,
                task,
                policy=policy,
                run_id=run_id,
                n_questions=options.limit,
                sampling=sampling,
                chat_template_kwargs=chat_kwargs,
                progress=_show,
            )
        return replace(result, policy=name)

    token = read_token(options.token_file)
    try:
        with stop_on_signals(), RolloutClient(options.rollout_url, token, ca_file=options.ca_file) as client:
            client.wait_ready(options.ready_timeout_s)
            results = [ask(client, name, stored) for name, stored in policies.items()]
    except Stopped as stopped:  # on the way up here a temporary run has been ended
        raise KeyboardInterrupt from stopped
    print(f"{task.name}, {results[0].questions} questions, mean reward with 95% intervals")
    print("\n".join(lines(results)))
    if options.json:
        Path(options.json).write_text(json.dumps(document(results), indent=2, default=str))
    return 0


@contextlib.contextmanager
def _serving(
    client: RolloutClient, name: str, stored: StoredAdapter | None, run_id: str | None
) -> Iterator[tuple[PolicySelector, str | None]]:
    """What to ask for, and the run, to be answered by a policy of the command line."""
    if stored is None:
        yield ("base" if name == "base" else "latest"), run_id
        return
    with temporary_run(client, stored) as version:
        yield version, version.run_id


def _prompt(prompt: str | list[dict[str, Any]]) -> Prompt:
    return Prompt(text=prompt) if isinstance(prompt, str) else Prompt(messages=prompt)


def _score(task: Task, start: int, rows: list[dict[str, Any]], groups: list[RolloutGroup]) -> Iterator[EvalRow]:
    """Call the reward functions as TRL does: a list for each column, one entry for each completion."""
    flat = [(i, rows[i], c) for i, group in enumerate(groups) for c in group.completions]
    chat = not isinstance(rows[0]["prompt"], str)
    texts = [completion.text or "" for _, _, completion in flat]
    columns = {key: [row[key] for _, row, _ in flat] for key in rows[0] if key not in ("prompt", "completion")}
    arguments = {
        "prompts": [row["prompt"] for _, row, _ in flat],
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "completion_ids": [completion.token_ids for _, _, completion in flat],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
        **columns,
    }
    scores = {_name(function): _call(function, arguments) for function in task.reward_funcs}
    weights = task.reward_weights or [1.0] * len(scores)
    for position, (i, row, completion) in enumerate(flat):
        rewards = {name: values[position] for name, values in scores.items()}
        total = sum(w * r for w, r in zip(weights, rewards.values(), strict=True) if r is not None)
        yield EvalRow(
            start + i,
            row["prompt"],
            texts[position],
            completion.finish_reason,
            len(completion.token_ids),
            rewards,
            total,
        )


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> list[float | None]:
    values = function(**arguments)
    if inspect.isawaitable(values):
        values = asyncio.run(_awaited(values))
    if len(values) != len(arguments["prompts"]):
        raise InvalidRequest(
            f"reward function {_name(function)} returned {len(values)} rewards for "
            f"{len(arguments['prompts'])} completions"
        )
    return [None if value is None else float(value) for value in values]


async def _awaited(values: Any) -> Any:
    return await values


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _result(task: Task, policy: PolicySelector, versions: list[str], rows: list[EvalRow]) -> EvalResult:
    by_question: dict[int, list[float]] = {}
    for row in rows:
        by_question.setdefault(row.question, []).append(row.reward)
    means = [sum(values) / len(values) for values in by_question.values()]
    mean, stderr = mean_and_stderr(means)
    scored: dict[str, list[float]] = {name: [] for name in rows[0].rewards}
    for row in rows:
        for name, value in row.rewards.items():
            if value is not None:
                scored[name].append(value)
    return EvalResult(
        task=task.name,
        policy=str(policy),
        versions=versions,
        questions=len(means),
        reward=mean,
        stderr=stderr,
        rewards={name: sum(v) / len(v) if v else None for name, v in scored.items()},
        completion_tokens=sum(row.tokens for row in rows),
        rows=rows,
    )


def make_parser() -> argparse.ArgumentParser:
    """Flags of `learner eval`."""
    parser = argparse.ArgumentParser(prog="learner eval", description=__doc__, allow_abbrev=False)
    add = either_spelling(parser)
    add("--rollout-url", required=True, help="URL of the rollout server")
    add("--task", required=True, help="reasoning_gym:NAME, a JSONL file, a hub dataset, or module:object")
    add("--task-args", help="parameters of the task, as JSON")
    add("--eval-dataset", help="another task or file to evaluate on")
    add("--prompt-column", default="prompt", help="column that holds the prompt")
    add("--reward-funcs", nargs="+", help="reward functions by import path, module:function")
    add("--reward-weights", nargs="+", type=float, help="one weight for each reward function")
    add("--eval-size", type=int, default=128, help="questions held out; as in training (default %(default)s)")
    add("--train-size", type=int, help="training questions; as in training, where the split depends on it")
    add("--seed", type=int, default=42, help="of the split; as in training (default %(default)s)")
    add("--limit", type=int, help="ask only the first so many questions")
    add(
        "--policy",
        nargs="+",
        default=["latest"],
        metavar="POLICY",
        help="base, latest, or a stored adapter: a run's "
        "output_dir, a checkpoint, a PEFT directory, served in a run of its own meanwhile. Several are compared with "
        "the first (default latest)",
    )
    add("--run-id", help="which run, where the server serves several")
    add("--n", type=int, default=1, help="completions per question (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="default %(default)s: greedy")
    add("--top-p", type=float, default=1.0, help="default %(default)s")
    add("--max-tokens", type=int, default=256, help="per completion (default %(default)s)")
    add("--chat-template-kwargs", help="for the server's chat template, as JSON")
    add("--json", help="write results, differences, and every question and answer to this file")
    add("--token-file", help="bearer token for the server (default: $LOCKSTEP_TOKEN)")
    add("--ca-file", help="certificate (PEM) of the CA that the server's certificate is from")
    add(
        "--ready-timeout-s",
        type=float,
        default=60.0,
        help="wait so long for the server (default %(default)s)",
    )
    return parser


def _json_option(value: str | None, flag: str) -> dict[str, Any]:
    try:
        document = json.loads(value) if value else {}
    except ValueError as error:
        raise InvalidRequest(f"{flag} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"{flag} must be a JSON object")
    return document


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} questions", end="\n" if done == total else "", file=sys.stderr, flush=True)
