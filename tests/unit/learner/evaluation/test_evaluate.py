"""Scores of a policy: reward functions are called as TRL calls them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from learner.evaluation.evaluate import evaluate
from learner.evaluation.results import EvalResult
from learner.rewards.calls import RewardError
from learner.servers.client import RolloutClient
from learner.tasks import Task
from learner.tasks.columns import exact_dataset
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


async def later(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return odd(completion_ids)


class Awaitable:
    """Can be awaited, and is no coroutine."""

    def __init__(self, completion_ids: list[list[int]], **_: Any) -> None:
        self.rewards = odd(completion_ids)

    def __await__(self) -> Generator[Any, None, list[float]]:
        yield from ()
        return self.rewards


def _task(*functions: Any) -> Task:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}"} for i in range(8)])
    return Task(name="toy", train=rows, eval=rows, reward_funcs=list(functions))


def test_any_awaitable_is_awaited(server) -> None:
    client = RolloutClient("http://fake", transport=server.transport)
    result = evaluate(client, _task(odd, later, Awaitable), policy="base", sampling=SamplingParams(max_tokens=4))
    assert result.rewards["odd"] is not None
    assert result.rewards == dict.fromkeys(["odd", "later", "Awaitable"], result.rewards["odd"])
    assert result.reward == pytest.approx(3 * result.rewards["odd"])


def test_a_task_without_evaluation_questions(server) -> None:
    client = RolloutClient("http://fake", transport=server.transport)
    with pytest.raises(InvalidRequest, match="task toy has no evaluation questions"):
        evaluate(client, replace(_task(odd), eval=None), policy="base")


def test_every_completion_needs_a_reward(server) -> None:
    def short(**_: Any) -> list[float]:
        return [1.0]

    client = RolloutClient("http://fake", transport=server.transport)
    with pytest.raises(InvalidRequest, match="'short' returned 1 rewards for 8 completions"):
        evaluate(client, _task(short), policy="base", sampling=SamplingParams(max_tokens=4))


def test_reward_functions_get_prompts_with_their_images(server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without one, too, get `images`, as in training."""
    picture = Image.new("RGB", (8, 8), "red")
    ask = [{"role": "user", "content": "How many?"}]
    features = Features(prompt=List({"role": Value("string"), "content": Value("string")}), image=ImageFeature())
    rows = Dataset.from_dict({"prompt": [ask, ask], "image": [picture, None]}, features)
    seen: dict[str, Any] = {}

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [1.0] * len(arguments["prompts"])

    monkeypatch.setattr(server, "_logprobs", lambda sequence, *_: [0.0] * len(sequence))
    client = RolloutClient("http://fake", transport=server.transport)
    task = Task(name="toy", train=rows, eval=rows, reward_funcs=[reward])
    result = evaluate(client, task, policy="base", sampling=SamplingParams(max_tokens=4))
    text = {"type": "text", "text": "How many?"}
    assert [prompt[0]["content"][-1] for prompt in seen["prompts"]] == [text, text]
    assert seen["prompts"][0][0]["content"][0]["image"].tobytes() == picture.tobytes()
    assert [len(images) for images in seen["images"]] == [1, 0]
    assert result.rows[0].prompt == [{"role": "user", "content": [{"type": "image"}, text]}]
    assert result.rows[1].prompt == ask, "a result keeps text as the row has it"
    asked = [prompt.messages[0]["content"] for prompt in server.generated[-1].prompts]
    assert asked == [[{"type": "image"}, text], [text]], "in parts, as TRL has it for a processor"


@pytest.mark.parametrize("image", [None, Image.new("RGB", (8, 8), "red")])
@pytest.mark.parametrize("kept", [True, False])
def test_none_that_is_meant_is_asked(server, monkeypatch: pytest.MonkeyPatch, kept: bool, image: Any) -> None:
    """As in training: the null of a JSONL file is, and not the None that Arrow gives to a message for others' keys."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"unit": None, "x": 1}}}
    part = {"type": "text", "text": "And now?", "image": None}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": [part]}]
    if image:
        chat[1]["content"] = [{"type": "image"}, part]
    rows = exact_dataset({"prompt": [chat]}, "rows") if kept else Dataset.from_list([{"prompt": chat}])
    if image:
        rows = concatenate_datasets(
            [rows, Dataset.from_dict({"image": [image]}, Features(image=ImageFeature()))], axis=1
        )
    monkeypatch.setattr(server, "_logprobs", lambda sequence, *_: [0.0] * len(sequence))
    client = RolloutClient("http://fake", transport=server.transport)
    task = Task(name="toy", train=rows, eval=rows, reward_funcs=[odd])
    evaluate(client, task, policy="base", sampling=SamplingParams(max_tokens=4))
    (asked,) = (prompt.messages for prompt in server.generated[-1].prompts)
    assert asked[0]["tool_calls"][0]["function"]["arguments"] == ({"unit": None, "x": 1} if kept else {"x": 1})
    assert ("image" in asked[1]["content"][-1]) == (kept and image is None), (
        "templates that see would take it for one's"
    )


def test_an_image_that_cannot_be_sent_is_refused_by_question(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_logprobs", lambda sequence, *_: [0.0] * len(sequence))
    pictures = [Image.new("RGB" if i != 70 else "L", (8, 8)) for i in range(72)]
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w1"}]] * 72, "image": pictures})
    task = Task(name="toy", train=rows, eval=rows, reward_funcs=[odd])
    client = RolloutClient("http://fake", transport=server.transport)
    with pytest.raises(InvalidRequest, match=r"^question 71: an image of a prompt is L, "):
        evaluate(client, task, policy="base", sampling=SamplingParams(max_tokens=4))


def test_a_task_of_text_is_not_searched_for_images(server, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    monkeypatch.setattr("learner.evaluation.evaluate.has_images", searched.append)
    evaluated(server, odd)
    assert searched == []


def evaluated(server, *functions: Any, n_questions: int | None = None) -> EvalResult:
    client = RolloutClient("http://fake", transport=server.transport)
    sampling = SamplingParams(max_tokens=4)
    return evaluate(client, _task(*functions), policy="base", sampling=sampling, n_questions=n_questions)


def test_a_completion_without_a_reward_is_left_out_as_in_training(server) -> None:
    def only_first_half(prompts: list[str], **_: Any) -> list[float | None]:
        return [1.0 if i < 4 else None for i in range(len(prompts))]

    result = evaluated(server, only_first_half)
    assert result.reward == 1.0
    assert result.questions == 4
    assert result.unscored == 4
    assert [row.reward for row in result.rows] == [1.0] * 4 + [None] * 4
    one_applies = evaluated(server, only_first_half, lambda prompts, **_: [0.5] * len(prompts))
    assert one_applies.reward == pytest.approx(1.0)
    assert one_applies.unscored == 0, "one reward is enough, as in training"


def test_no_reward_at_all_is_an_error(server) -> None:
    with pytest.raises(RewardError, match="toy: no completion has a reward"):
        evaluated(server, lambda prompts, **_: [None] * len(prompts))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (float("nan"), "returned nan for question 3"),
        (float("inf"), "returned inf for question 3"),
        (1e39, "returned 1e.39 for question 3"),
        ("1.0", "returned '1.0' for question 3"),
    ],
)
def test_what_is_no_reward_is_an_error_as_in_training(server, returned: Any, words: str) -> None:
    def judge(prompts: list[str], **_: Any) -> list[Any]:
        return [returned if prompt == "w2 w11" else 0.0 for prompt in prompts]

    with pytest.raises(RewardError, match=rf"the reward 'judge' {words} \(prompt: 'w2 w11'\)"):
        evaluated(server, judge)


def test_a_reward_that_raises_is_one_line(server) -> None:
    def judge(**_: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"^the reward 'judge' raised KeyError: 'answer' \(in judge") as refused:
        evaluated(server, judge)
    assert isinstance(refused.value.__cause__, KeyError)


def test_two_rewards_of_one_name_both_count(server) -> None:
    def odd(prompts: list[str], **_: Any) -> list[float]:
        return [10.0] * len(prompts)

    result = evaluated(server, globals()["odd"], odd)
    assert result.rewards.keys() == {"odd", "odd_2"}
    assert result.rewards["odd_2"] == 10.0
    assert result.reward == pytest.approx(10.0 + (result.rewards["odd"] or 0.0))


def test_a_column_does_not_take_the_place_of_what_the_model_said(server) -> None:
    def short(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids) <= 4) for ids in completion_ids]

    task = _task(short)
    rows = task.eval.add_column("completion_ids", [[1] * 9] * 8)
    client = RolloutClient("http://fake", transport=server.transport)
    result = evaluate(client, replace(task, eval=rows), policy="base", sampling=SamplingParams(max_tokens=4))
    assert result.reward == 1.0
