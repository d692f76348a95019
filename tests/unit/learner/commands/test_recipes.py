"""The recipes, and the example tasks they use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

import learner.commands.train
from learner.commands.config_file import read_config_file
from learner.commands.training import read_options
from learner.tasks import load_task
from learner.tasks.base import TaskError
from learner.tasks.examples.extraction import fields_right
from learner.tasks.examples.guessing import Guessing
from learner.tasks.prompts import question_key
from learner.trainer.checks import check_corrected, check_grpo, check_slots
from rollout_server.settings import ServerSettings

RECIPES = sorted((Path(__file__).parents[4] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_options_that_exist(path, tmp_path):
    flags = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    given = read_options(flags)
    assert "task" in given
    assert not {"env", "server"} & set(given)
    # No push waits for a slot of the server that `learner up` starts.
    slots = (read_config_file(path).get("server") or {}).get("slots_per_run", ServerSettings().slots_per_run)
    config, args, model_args = learner.commands.train.parse(flags)
    check_grpo(args)
    check_corrected(args, config)
    check_slots(args, SimpleNamespace(slots_per_run=slots, apply="columns"), config)
    assert model_args.lora_dropout == 0.0, "the server applies none"
    if ":" in config.require_task() and "/" not in config.require_task():
        task = load_task(config.task, task_args=config.task_args, eval_size=8, train_size=64)
        assert len(task.train)
        assert len(task.eval)


def test_a_curriculum_gets_harder_and_scores_by_level():
    given = {"name": "chain_sum", "levels": 3, "partial_credit": False}
    task = load_task("learner.tasks.examples.curriculum:levels", task_args=given, eval_size=9, train_size=60)
    levels = task.train["gym_level"][:]
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2}
    assert len(task.eval) == 9
    assert max(len(a) for a in task.train["answer"][:10]) < max(len(a) for a in task.train["answer"][-10:])
    asked = {question_key(prompt) for prompt in task.eval["prompt"]}
    assert not asked & {question_key(prompt) for prompt in task.train["prompt"]}
    score = cloudpickle.loads(cloudpickle.dumps(task.reward_funcs[0]))
    rows = {name: task.train[name][:] for name in ("gym_item", "gym_level")}
    assert score(prompts=task.train["prompt"][:], completions=task.train["answer"][:], **rows) == [1.0] * len(levels)
    wrong = ["no number"] * len(levels)
    assert sum(score(prompts=wrong, completions=wrong, **rows)) == 0.0
    with pytest.raises(TaskError, match="levels"):
        load_task("learner.tasks.examples.curriculum:levels", task_args={"name": "chain_sum"})
    for few in ("eval_size", "train_size"):
        with pytest.raises(TaskError, match=f"{few} 2 is too few questions for 3 levels"):
            load_task("learner.tasks.examples.curriculum:levels", task_args=given, **{few: 2})


def test_fields_of_a_json_answer():
    gold = json.dumps({"name": "Ada", "age": 20, "city": "Oslo"})
    said = [gold, '{"age": 20, "name": "Bo"}', "[1]", "Ada is 20", [{"role": "assistant", "content": gold}]]
    assert fields_right(completions=said, answer=[gold] * 5) == [1.0, pytest.approx(1 / 3), 0.0, 0.0, 1.0]


def test_guessing():
    game = Guessing()
    game.reset(secret=30, prompt=[])
    assert game.get_reward() == 0.0
    assert [game.guess(number) for number in (50, 20)] == ["lower", "higher"]
    assert game.get_reward() == 0.1
    assert game.guess(30) == "right"
    assert game.get_reward() == pytest.approx(0.8)
    game.reset(secret=1)
    assert game.guess(1) == "right"
    assert game.get_reward() == 1.0
    with pytest.raises(TaskError, match="reward"):
        load_task("learner.tasks.examples.guessing:numbers", reward_specs=["x:y"])
