"""Which completions the page has: whole groups, within bounds."""

from __future__ import annotations

import itertools
import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from learner.monitors.samples import (
    BATCH_CHARACTERS,
    BATCHES,
    COMPLETION_CHARACTERS,
    EVALUATION,
    GROUP_SIZE,
    IMAGE_CHARACTERS,
    IMAGES,
    TRAINING,
    Group,
    Samples,
    choose,
    make_group,
)


def _group(prompt: str, rewards: list[float | None], text: str = "x", **columns: Any) -> Group:
    numbers = [{"reward": r, "rewards": {"f": r}, "advantage": 0.0, "tokens": len(text)} for r in rewards]
    return make_group(prompt, {"prompt": prompt, **columns}, [text] * len(rewards), numbers)


def test_a_group_keeps_the_columns_of_its_row() -> None:
    group = _group("p", [1.0], answer=42, solution="S", nothing=None, nested={"a": [1]}, long="y" * 9999)
    assert list(group.columns) == ["answer", "solution", "nested", "long"]
    assert group.columns["answer"] == "42"
    assert group.columns["nested"] == '{"a": [1]}'
    assert len(group.columns["long"]) < 500


def test_prompts_are_the_same_if_their_whole_text_is() -> None:
    middle = ["a" * 2000 + letter + "a" * 2000 for letter in "bc"]
    first, second = (_group(prompt, [1.0]) for prompt in middle)
    assert first.prompt == second.prompt
    assert first.key != second.key
    assert first.key == _group(middle[0], [0.0]).key


def _seen(*pictures: Image.Image, **columns: Any) -> Group:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": "How many?"}]}]
    numbers = [{"reward": 1.0, "rewards": {}, "advantage": 0.0}]
    return make_group(prompt, columns, ["x"], numbers)


def test_images_of_a_prompt_are_shown_small() -> None:
    red, large = Image.new("RGB", (30, 20), "red"), Image.effect_noise((2000, 1000), 90).convert("RGB")
    group = _seen(red, large, image=red, answer="3")
    assert list(group.columns) == ["answer"]
    files = [Image.open(BytesIO(b64decode(url.removeprefix("data:image/jpeg;base64,")))) for url in group.images]
    assert [file.size for file in files] == [(30, 20), (96, 48)]
    assert max(map(len, group.images)) <= IMAGE_CHARACTERS
    assert len(_seen(*[large] * 20).images) == IMAGES
    assert red.size == (30, 20)


def test_prompts_with_other_images_are_others() -> None:
    red, blue = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
    assert _seen(red).key == _seen(red.copy()).key
    assert _seen(red).key != _seen(blue).key


def test_turns_of_an_agent_are_kept_with_what_was_sampled() -> None:
    long = "x" * (2 * COMPLETION_CHARACTERS)
    turns = [(True, "12 + 29"), (False, "The calculator says 41."), (True, long)]
    messages = [{"role": "assistant" if sampled else "tool", "content": text} for sampled, text in turns]
    numbers = {"reward": 1.0, "rewards": {}, "advantage": 0.0, "turns": turns, "calls": 2, "trajectories": 1}
    (sample,) = make_group("12 + 29 =", {}, [messages], [numbers]).samples
    assert sample.turns is not None
    assert sample.turns[:2] == turns[:2]
    assert len(sample.turns[2][1]) < COMPLETION_CHARACTERS
    assert sample.calls == 2


def test_a_huge_group_keeps_its_best_and_worst() -> None:
    rewards: list[float | None] = [0.5] * 500
    rewards[300], rewards[400] = 1.0, None
    rewards[450] = 0.0
    group = _group("p", rewards, "y" * 5000)
    assert (group.size, len(group.samples)) == (500, GROUP_SIZE)
    assert {1.0, 0.0} <= {sample.reward for sample in group.samples}
    assert sum(len(sample.completion) for sample in group.samples) < 1.2 * BATCH_CHARACTERS


def test_a_batch_of_short_texts_is_kept_whole() -> None:
    groups = [_group(f"p{i}", [0.0, 1.0] * 5) for i in range(10)]
    assert choose(groups) == groups


def test_of_a_long_batch_those_that_tell_most() -> None:
    groups = [_group(f"p{i}", [0.4, 0.6], "y" * 2500) for i in range(40)]
    groups[7] = _group("p7", [1.0, 0.9], "y" * 2500)
    groups[8] = _group("p8", [0.0, 0.1], "y" * 2500)
    groups[9] = _group("p9", [0.5, 0.5], "y" * 2500)
    groups[10] = _group("p10", [0.4, 0.6], "y" * 2900)
    kept = [group.prompt for group in choose(groups, [groups[39].key])]
    assert len(kept) < 10
    assert {"p0", "p7", "p8", "p9", "p10", "p39"} <= set(kept)


def test_one_group_is_always_kept() -> None:
    assert len(choose([_group("p", [1.0] * 60, "y" * 9000)])) == 1
    assert choose([]) == []


def test_the_file_has_a_bound(tmp_path: Path) -> None:
    """10,000 steps of 100 completions, of which the newest are longest."""
    samples = Samples(tmp_path / "completions.jsonl")
    groups = [_group(f"p{i}", [0.0, 1.0] * 5, "z" * 380) for i in range(10)]
    for step in range(1, 301):
        samples.add(step, TRAINING, groups)
        if step % 5 == 0:
            samples.add(step, EVALUATION, groups[:1])
    samples.write()
    kept = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    training = [batch["step"] for batch in kept if batch["kind"] == TRAINING]
    assert len(training) == BATCHES[TRAINING]
    assert training[0] == 1
    assert training[-8:] == list(range(293, 301))
    assert max(b - a for a, b in itertools.pairwise(training)) <= 24
    assert len([batch for batch in kept if batch["kind"] == EVALUATION]) == BATCHES[EVALUATION]
    assert (tmp_path / "completions.jsonl").stat().st_size < 5e6


def test_lines_of_an_older_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text('{"step": 1, "samples": []}\n')
    samples = Samples(path)
    samples.begin(5)
    assert samples.batches == []
