"""Recipes of `learner up`: what they say of the server, and what is refused before anything is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from learner.cli import main
from learner.commands import training, up
from learner.commands.up_recipe import SLOTS, Recipe
from rollout_server.settings import ServerSettings
from shared.errors import InvalidRequest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a model that is not looked for on the hub
    (tmp_path / "tiny" / "config.json").write_text("{}")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: tiny\ndtype: float32\nuse_cpu: true\nserver:\n  max-num-seqs: 8\n")
    return path


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models and flags pretend."""
    monkeypatch.setattr(training, "check", lambda argv: None)


def read(*argv: str) -> Recipe:
    return up.read(argv)


def test_the_server_gets_what_the_learner_needs(recipe: Path, unchecked: None) -> None:
    text = (
        "dtype: bf16\nmodel_revision: v2\nlora_r: 24\ndeterministic: true\nuse_cpu: true\n"
        "server:\n  enforce_eager: true\n  max_model_len: 64\n  compilation_config: {level: 0}\n"
    )
    recipe.write_text(f"model_name_or_path: tiny\n{text}")
    assert read("--config", str(recipe), "--server-flags", "--seed 3").server_flags() == [
        *("--max-lora-rank", "32", "--dtype", "bfloat16", "--revision", "v2", "--deterministic", "--enforce-eager"),
        *("--max-model-len", "64", "--compilation-config", '{"level": 0}', "--seed", "3"),
    ]
    recipe.write_text("model_name_or_path: tiny\n")
    command = read("--config", str(recipe), "--lora_r=8", "--lora_kwargs", '{"rank_pattern": {"q": 64}}').server_flags()
    assert command[command.index("--max-lora-rank") + 1] == "64"


@pytest.mark.parametrize(
    ("options", "server", "slots"),
    [
        ("max_staleness: 1", "", None),
        ("max_staleness: 2", "", "3"),
        ("max_staleness: 4\nin_flight: keep", "", None),
        ("max_staleness: 4", "apply: merge", None),
        ("max_staleness: 2", "slots-per-run: 5", "5"),
        ("max_staleness: 1\nnum_iterations: 2", "", "3"),
        ("max_staleness: 1\nsteps_per_generation: 8\ngradient_accumulation_steps: 4", "", "3"),
        ("max_staleness: 1\ngeneration_batch_size: 32\nper_device_train_batch_size: 8", "", "5"),
        ("max_staleness: many", "", None),
    ],
)
def test_rollouts_that_run_ahead_get_their_slots(
    recipe: Path, unchecked: None, options: str, server: str, slots: str | None
) -> None:
    recipe.write_text(f"model_name_or_path: tiny\n{options}\nserver: {{{server}}}\n")
    flags = read("--config", str(recipe)).server_flags()
    assert flags.count("--slots-per-run") == (slots is not None)
    assert slots is None or flags[flags.index("--slots-per-run") + 1] == slots


def test_the_slots_of_a_server_are_those_without_the_flag() -> None:
    assert ServerSettings().slots_per_run == SLOTS


def test_a_later_file_changes_single_flags_and_variables(recipe: Path, unchecked: None, tmp_path: Path) -> None:
    recipe.write_text("model_name_or_path: tiny\nserver: {max-num-seqs: 4, seed: 1}\nenv: {A: 1.10, B: on}\n")
    later = tmp_path / "later.yaml"
    later.write_text("server: {--max_num_seqs: 8}\nenv: {A: true}\n")
    both = read("--config", str(recipe), "--config", str(later))
    assert both.server == {"max_num_seqs": 8, "seed": 1}
    assert both.environment == {"A": "true", "B": "on"}


def test_a_model_that_sees_gets_only_its_language_model_where_the_data_has_no_images(
    tmp_path: Path, capsys, unchecked: None
) -> None:
    model, task = tmp_path / "sees", tmp_path / "text.jsonl"
    model.mkdir()
    task.write_text('{"prompt": "How many?"}\n' * 4)
    circles = "learner.tasks.examples.counting:circles"

    def server_of(task: object, *flags: str, sees: bool = True) -> list[str]:
        (model / "config.json").write_text(json.dumps({"vision_config": {}} if sees else {}))
        words = ["--model_name_or_path", str(model), "--use_cpu", "true", "--task", str(task)]
        return up.make_plan([*words, "--train_size", "2", "--eval_size", "0", *flags]).server

    assert "--language-model-only" in server_of(task)
    assert "the training data has no images: the server gets --language-model-only" in capsys.readouterr().out
    assert "--language-model-only" not in server_of(circles, "--task_args", '{"pixels": 32}')
    assert "--language-model-only" not in server_of(task, sees=False)
    capsys.readouterr()
    assert "--language-model-only" not in server_of(tmp_path / "missing.jsonl")
    assert "missing.jsonl" in (said := capsys.readouterr().out.splitlines()[1])
    assert "whether it has images cannot be told (TaskError: " in said
    own = server_of(task, "--server-flags", "--no-language-model-only")
    assert own.count("--no-language-model-only") == 1
    assert "--language-model-only" not in own
    assert capsys.readouterr().out == ""


def test_the_task_is_loaded_as_the_learner_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, unchecked: None
) -> None:
    """With its options' defaults, under the recipe's environment; and code that leaves ends nothing."""
    model, recipe = tmp_path / "sees", tmp_path / "recipe.yaml"
    model.mkdir()
    (model / "config.json").write_text('{"vision_config": {}}')
    (tmp_path / "its_own_task.py").write_text(
        "import os, sys\n"
        "from datasets import Dataset\n"
        "from learner.tasks import Task\n"
        "def make(eval_size, **_):\n"
        "    print('made', eval_size, os.environ.get('ITS_DATA'))\n"
        "    rows = Dataset.from_list([{'prompt': 'How many?'}])\n"
        "    return Task(name='own', train=rows, eval=rows, reward_funcs=[len])\n"
        "def leave(**_):\n"
        "    sys.exit('no data')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("ITS_DATA", raising=False)

    def said_of(name: str) -> tuple[bool, list[str]]:
        recipe.write_text(
            f"model_name_or_path: {model}\nuse_cpu: true\ntask: its_own_task:{name}\nenv: {{ITS_DATA: here}}\n"
        )
        flags = up.make_plan(["--config", str(recipe)]).server
        return "--language-model-only" in flags, capsys.readouterr().out.splitlines()

    text_only, said = said_of("make")
    assert text_only
    assert said[0] == f"up      | loading the task, whose images decide what is served of {model}"
    assert said[1] == "made 128 here"
    assert "ITS_DATA" not in os.environ
    text_only, said = said_of("leave")
    assert not text_only
    assert said[1:] == [
        "up      | whether it has images cannot be told (TaskError: calling 'its_own_task:leave' failed: SystemExit: "
        "no data [invalid_request]): the server gets ready for them"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model_name_or_path: tiny\nrollout_url: http://a:1", "starts the server itself"),
        ("model_name_or_path: tiny\nserver: 3", "server: write"),
        ("model_name_or_path: tiny\nserver: {8000: a}", "server: 8000 is no flag"),
        ("model_name_or_path: tiny\nserver: {max-num-seqs: 4, max_num_seqs: 5}", "max_num_seqs is there twice"),
        ("model_name_or_path: tiny\nlora_kwargs: {rank_pattern: [q]}", "adapter's rank .* cannot be told"),
        ("model_name_or_path: tiny\nlora_kwargs: '{\"r\": Infinity}'", "adapter's rank .* cannot be told"),
        ("model_name_or_path: tiny\nenv: 3", "env must hold"),
        ("model_name_or_path: tiny\ninit_adapter: nowhere", "init_adapter"),
        ("use_cpu: true", "model_name_or_path"),
    ],
)
def test_what_the_two_cannot_share_is_refused(recipe: Path, unchecked: None, text: str, words: str) -> None:
    recipe.write_text(text + "\n")
    with pytest.raises(InvalidRequest, match=words):
        read("--config", str(recipe)).server_flags()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--gpu_memory_utilization 0.6", "give --server-flags '--gpu-memory-utilization 0.6'"),
        ("--max-lora-rank=64", "give --server-flags '--max-lora-rank 64'"),
        ("--fast_inference true", "completions always come from vLLM"),
        ("--lerning_rate 1", "did you mean --learning_rate?"),
        ("--model_name_or_path ./typo", "model_name_or_path: there is no directory"),
        ("--task questions.jsonl", "task: there is no file questions.jsonl"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_started(recipe: Path, capsys, flags: str, error: str) -> None:
    assert main(["up", "--config", str(recipe), *flags.split()]) == 2
    shown = capsys.readouterr()
    assert error in shown.err
    assert shown.out == ""
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("model_name: tiny", "there is no option model_name: it is model_name_or_path here"),
        (
            "model_name_or_path: tiny\nmax_seq_length: 64",
            "max_seq_length belongs .* `max-model-len: 64` below `server:`",
        ),
        ("model_name_or_path: tiny\nenforce_eager: true", "enforce_eager belongs .* `enforce-eager: true` below"),
        ("model_name_or_path: tiny\nport: 80", "there is no option port: it belongs to the server"),
    ],
)
def test_words_of_other_tools_are_answered_in_a_file(recipe: Path, line: str, error: str) -> None:
    recipe.write_text(line)
    with pytest.raises(InvalidRequest, match=f"--config .*mine.yaml: {error}"):
        read("--config", str(recipe))


def test_words_of_other_tools_come_before_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--model_name", "tiny"]) == 2
    assert "there is no --model_name: it is --model_name_or_path here" in capsys.readouterr().err
