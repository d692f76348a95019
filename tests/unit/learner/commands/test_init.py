"""`learner init`: recipes that `learner up` takes as they are, from flags and from answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.cli import main
from learner.commands import init, training, up
from learner.commands.options import OptionParser

FLAGS = ["--model", "Qwen/Qwen3-0.6B", "--task", "reasoning_gym:chain_sum"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, and no terminal."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)


@pytest.mark.parametrize("where", ["own", "shared", "cpu"])
def test_recipes_are_taken_as_they_are(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "check_model_exists", lambda *_: None)  # it would ask the hub
    assert main(["init", *FLAGS, "--place", where, "--rank", "24", "--out", f"{where}.yaml"]) == 0
    flags = ["--config", f"{where}.yaml", *(["--bf16", "false", "--use_cpu", "true"] if where != "cpu" else [])]
    config, args, model = OptionParser().parse(flags)
    assert config.task == "reasoning_gym:chain_sum"
    assert (model.model_name_or_path, model.lora_r, model.lora_alpha) == ("Qwen/Qwen3-0.6B", 24, 48)
    assert (args.max_steps, args.output_dir) == (200, f"runs/{where}")
    assert config.share_gpu is (where == "shared")
    plan = up.make_plan(["--config", f"{where}.yaml"])
    assert plan.server[plan.server.index("--max-lora-rank") + 1] == "32"
    assert ("--share-gpu" in plan.server) is (where == "shared")
    assert ("--enforce-eager" in plan.server) is (where == "cpu")


@pytest.mark.parametrize(("gpus", "where"), [("", "cpu"), ("0", "shared"), ("0,1,2", "own")])
def test_the_place_follows_from_the_machine(gpus: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert main(["init", *FLAGS]) == 0
    assert init.PLACES[where] in Path("recipe.yaml").read_text()


def test_files_need_a_reward() -> None:
    assert main(["init", "--model", "m", "--task", "a.jsonl", "--prompt-column", "question"]) == 0
    config, _, _ = OptionParser().parse(["--config", "recipe.yaml", "--bf16", "false", "--use_cpu", "true"])
    assert config.prompt_column == "question"
    assert config.reward_funcs == ["learner.tasks.rewards:math_answer"]


def test_what_makes_its_prompts_has_no_column(capsys) -> None:
    assert main(["init", *FLAGS, "--prompt-column", "question"]) == 0
    assert "prompt_column" not in Path("recipe.yaml").read_text()


def test_a_task_of_the_users_is_told_the_column() -> None:
    assert main(["init", "--model", "m", "--task", "my_tasks:load", "--prompt-column", "question"]) == 0
    config, _, _ = OptionParser().parse(["--config", "recipe.yaml", "--bf16", "false", "--use_cpu", "true"])
    assert (config.prompt_column, config.reward_funcs) == ("question", None)


def test_nothing_but_a_file_is_written_over() -> None:
    os.mkfifo("pipe")
    assert main(["init", *FLAGS, "--out", "pipe"]) == 2
    assert Path("pipe").is_fifo()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the user will type, on a terminal."""
    typed: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: typed.pop(0))
    yield typed
    assert not typed


def test_questions_on_a_terminal(answers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answers += ["", "m", "my/data", "", "", "moon", "cpu", "none", "30", "", "64"]
    assert main(["init"]) == 0
    shown = capsys.readouterr().out
    assert "'moon' is not one of own, shared, cpu" in shown
    assert "'none' is not a whole number" in shown
    assert "learner up --config recipe.yaml" in shown
    config, args, model = OptionParser().parse(["--config", "recipe.yaml"])
    assert (config.task, model.model_name_or_path) == ("my/data", "m")
    assert (args.max_steps, args.max_completion_length, args.use_cpu) == (30, 64, True)


def test_flags_are_not_asked_for(answers: list[str]) -> None:
    answers += [""] * 4
    assert main(["init", *FLAGS]) == 0


def test_what_is_missing_or_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--task", "reasoning_gym:chain_sum"]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main(["init", *FLAGS, "--rank", "1000"]) == 2
    assert "--rank: rank 1000 is above" in capsys.readouterr().err
    Path("recipe.yaml").write_text("mine")
    assert main(["init", *FLAGS]) == 2
    assert "recipe.yaml exists" in capsys.readouterr().err
    assert Path("recipe.yaml").read_text() == "mine"
    assert main(["init", *FLAGS, "--force"]) == 0
    assert main(["init", *FLAGS, "--out", "recipe.yaml/other.yaml"]) == 2
    assert "cannot be written in" in capsys.readouterr().err
    Path("folder").mkdir()
    assert main(["init", *FLAGS, "--out", "folder", "--force"]) == 2
    assert "--out folder is a directory" in capsys.readouterr().err
    assert main(["init", "--model", " ", "--task", "reasoning_gym:chain_sum", "--force"]) == 2
    assert "--model: there is nothing in it" in capsys.readouterr().err


def test_the_command_is_one_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *FLAGS, "--out", "my recipe.yaml"]) == 0
    assert "learner up --config 'my recipe.yaml'\n" in capsys.readouterr().out
    assert "learner up --config 'my recipe.yaml'\n" in Path("my recipe.yaml").read_text()
