"""The command lines that the examples show are whole: only the model, the server's URL and the output are replaced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from learner.commands import up
from learner.commands.train import parse
from learner.config import LearnerConfig
from learner.tasks import load_task

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(EXAMPLES)  # as $PYTHONPATH does in the lines


def commands(file: str, command: str) -> list[list[str]]:
    """Return the words behind `command` of each such line of an example, which may go on behind a backslash."""
    text = re.sub(r"\\\n#?", " ", (EXAMPLES / file).read_text())
    return [shlex.split(words, comments=True) for words in re.findall(rf"{command} (--.*)", text)]


def trained(words: list[str], model: Path, out: Path) -> LearnerConfig:
    """Return the options of `learner train` on a machine without a GPU."""
    config, _, _ = parse([*words, *replaced(model, out), "--use_cpu", "true", "--bf16", "false"])
    return config


def replaced(model: Path, out: Path) -> list[str]:
    return ["--model_name_or_path", str(model), "--output_dir", str(out)]


def test_the_agents_of_the_read_me(in_repository: None, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    lines = commands("agents/README.md", "learner up")
    agents = []
    for number, words in enumerate(lines):
        plan = up.make_plan([*words, *replaced(model, tmp_path / str(number))])
        config, _, _ = parse(plan.learner[plan.learner.index("train") + 1 :])
        agents.append((config.agent, config.agent_command))
    assert agents == [
        ("examples.agents.calculator:agent", None),
        ("examples.agents.reviewer:agent", None),
        (None, "sh examples/agents/ask.sh"),
    ]


def test_the_agent_that_is_a_program(in_repository: None, tmp_path: Path) -> None:
    (words,) = commands("agents/ask.sh", "learner train")
    config = trained(words, tmp_path, tmp_path / "run")
    assert (config.agent, config.agent_command) == (None, "sh examples/agents/ask.sh")


def test_a_reward_of_your_own(in_repository: None, tmp_path: Path) -> None:
    (words,) = commands("own_reward.py", "learner train")
    config = trained(words, tmp_path, tmp_path / "run")
    task = load_task(config.require_task(), eval_size=config.eval_size, reward_specs=config.reward_funcs)
    assert (len(task.eval), len(task.train)) == (8, 56)
