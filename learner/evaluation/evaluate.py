"""Evaluate a policy: complete a task's evaluation questions over HTTP and score the completions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from learner.evaluation.prompts import image_memory, prompt_of, rewarded_row, seen_prompt, shown
from learner.evaluation.results import EvalResult, EvalRow, question_means
from learner.evaluation.statistics import mean_and_stderr
from learner.rewards.calls import RewardError, call_reward, reward_names
from learner.servers.client import RolloutClient
from learner.tasks.columns import decoded, has_images, is_filled, may_have_images, own_keys
from shared.errors import InvalidRequest
from shared.rollouts import GenerateRequest, PolicySelector, Prompt, RolloutGroup
from shared.sampling import SamplingParams
from shared.weights import ServerState

if TYPE_CHECKING:
    from learner.tasks import Task

#: Of a request: questions, and bytes of their images, in base64, unless one has more.
_QUESTIONS_PER_REQUEST, _IMAGE_BYTES = 64, 8 * 2**20


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

    As in training, a completion for which every reward is None is left out.

    Args:
        sampling: greedy by default. Chat messages are templated by the server.
        progress: called with (questions done, all questions).

    Raises:
        LockstepError: `invalid_request` if there are no questions or rewards, or a reward function fails; errors of the
            server.
    """
    questions = questions_of(task, n_questions)
    sees = any(may_have_images(each) and has_images(each) for each in (task.train, task.eval))
    own = partial(own_keys, filled=is_filled(task.eval.features["prompt"]), images=sees)
    rows = [{**row, "prompt": own(row["prompt"])} for row in questions]
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=256)
    state = client.state() if sees else None
    results: list[EvalRow] = []
    versions: dict[str, None] = {}
    start = 0
    while start < len(rows):
        prompts = _of_one_request(rows[start : start + _QUESTIONS_PER_REQUEST], start, state)
        chunk = rows[start : start + len(prompts)]
        request = GenerateRequest(
            prompts=prompts,
            sampling=sampling,
            policy=policy,
            run_id=None if policy == "base" else run_id,
            return_text=True,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        groups = client.generate(request).groups
        versions |= {str(s.version or "base"): None for g in groups for c in g.completions for s in c.spans}
        asked = [shown(seen_prompt(row) if sees else row["prompt"]) for row in chunk]
        rewarded = list(map(rewarded_row, chunk)) if sees else questions[start : start + len(chunk)]
        results += _score(task, start, rewarded, asked, groups)
        start += len(chunk)
        progress(start, len(rows))
    return result_of(task, policy, list(versions), results)


def _of_one_request(rows: Sequence[dict[str, Any]], start: int, state: ServerState | None) -> list[Prompt]:
    """Return the prompts of the first rows, as many as have few bytes of images; of one at least.

    Raises as `prompt_of`, with the number of the question.

    Args:
        start: questions before the first row.
        state: the server's, whose memory for images counts, too; None: there are no images.
    """
    prompts, size, memory = list[Prompt](), 0, 0
    for question, row in enumerate(rows, start + 1):
        try:
            prompt = prompt_of(row, sees=state is not None)
        except InvalidRequest as error:
            raise InvalidRequest(f"question {question}: {error.message}") from error
        if state:
            size += sum(len(image.data) for image in prompt.images or ())
            memory += image_memory(row, state)
            if prompts and (size > _IMAGE_BYTES or 0 < state.max_image_memory < memory):
                break
        prompts.append(prompt)
    return prompts


def questions_of(task: Task, count: int | None) -> list[dict[str, Any]]:
    """Return the first `count` evaluation questions, all by default.

    Raises:
        LockstepError: `invalid_request` if there are none, or an image cannot be decoded.
    """
    rows = list(islice(decoded(task.eval or (), f"task {task.name}, evaluation"), count))
    if not rows:
        raise InvalidRequest(f"task {task.name} has no evaluation questions; see --eval-size and --limit")
    return rows


def _score(
    task: Task, start: int, rows: list[dict[str, Any]], asked: list[Any], groups: list[RolloutGroup]
) -> Iterator[EvalRow]:
    """Call the reward functions as in training: one list per column, one entry per completion.

    Args:
        rows: as reward functions get them; asked: their prompts, as results keep them.
    """
    flat = [(i, rows[i], c) for i, group in enumerate(groups) for c in group.completions]
    chat = not isinstance(rows[0]["prompt"], str)
    texts = [completion.text or "" for _, _, completion in flat]
    columns = {key: [row[key] for _, row, _ in flat] for key in rows[0] if key not in ("prompt", "completion")}
    arguments = columns | {
        "prompts": [row["prompt"] for _, row, _ in flat],
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "completion_ids": [completion.token_ids for _, _, completion in flat],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }

    def row_name(row: int) -> str:
        return f"question {start + flat[row][0] + 1}"

    functions = zip(reward_names(task.reward_funcs), task.reward_funcs, strict=True)
    scores = {name: call_reward(name, function, arguments, row_name) for name, function in functions}
    weights = task.reward_weights or [1.0] * len(scores)
    for position, (i, _, completion) in enumerate(flat):
        rewards = {name: values[position] for name, values in scores.items()}
        scored = [weight * r for weight, r in zip(weights, rewards.values(), strict=True) if r is not None]
        total, tokens = sum(scored) if scored else None, len(completion.token_ids)
        yield EvalRow(start + i, asked[i], texts[position], completion.finish_reason, tokens, rewards, total)


def result_of(task: Task, policy: PolicySelector, versions: list[str], rows: list[EvalRow]) -> EvalResult:
    """Return the result of an evaluation; raises `RewardError` if no completion has a reward."""
    means = list(question_means(rows).values())
    if not means:
        raise RewardError(f"task {task.name}: no completion has a reward, every reward function returned None for all")
    mean, stderr = mean_and_stderr(means)
    rewards: dict[str, float | None] = {}
    for name in rows[0].rewards:
        scored = [value for row in rows if (value := row.rewards[name]) is not None]
        rewards[name] = sum(scored) / len(scored) if scored else None
    return EvalResult(
        task=task.name,
        policy=str(policy),
        versions=versions,
        questions=len(means),
        reward=mean,
        stderr=stderr,
        rewards=rewards,
        completion_tokens=sum(row.tokens for row in rows),
        rows=rows,
    )
