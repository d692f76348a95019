"""The command line: lazy imports, TRL's options, one-line errors."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from learner.cli import COMMANDS, main
from learner.commands import status
from learner.commands.train import parse
from shared.errors import BaseMismatch, EngineDead, LockstepError, NotReady, RankTooHigh, UnsupportedAdapter


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("command", "flag"), [("eval", "--policy"), ("status", "--run-dir"), ("export", "--merge")])
def test_needs_no_torch(command, flag):
    blocked = "import sys; sys.modules['torch'] = sys.modules['vllm'] = sys.modules['trl'] = None\n"
    answer = run(blocked + f"from learner.cli import main; sys.exit(main(['{command}', '--help']))")
    assert answer.returncode == 0, answer.stderr
    assert flag in answer.stdout, answer.stderr
    answer = run(blocked + "from learner.cli import main; sys.exit(main(['--help']))")
    assert answer.returncode == 0
    assert "train" in answer.stdout


def test_a_users_mistake_is_one_line(capsys):
    assert main([]) == 2
    assert main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    eval_flags = ["eval", "--rollout-url", "http://127.0.0.1:9", "--task", "x"]
    assert main([*eval_flags, "--task-args", "{"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("learner eval: --task-args is not valid JSON")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_options_says_what_it_needs_or_does_without(capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # of `init`, which asks where it can
    code, said = main([command]), capsys.readouterr()
    if command == "doctor":
        assert "give --rollout_url to have it looked at" in said.out
    else:
        assert code == 2
        assert said.err.splitlines()[-1].startswith(f"learner {command}: ")


@pytest.mark.parametrize(
    ("kind", "code"), [(UnsupportedAdapter, 2), (RankTooHigh, 2), (BaseMismatch, 2), (NotReady, 1), (EngineDead, 1)]
)
def test_the_exit_code_is_2_where_another_try_would_not_help(monkeypatch, kind, code):
    def refuse(argv):
        raise kind("the reason")

    monkeypatch.setattr(status, "main", refuse)
    assert main(["status"]) == code


@pytest.mark.parametrize("flags", ["--use_dora true", "--use_peft false", "--lora_modules_to_save lm_head"])
def test_an_adapter_that_cannot_be_served_is_a_wrong_option(capsys, model_dir, tmp_path, flags):
    needed = ["--rollout_url", "http://127.0.0.1:9", "--model_name_or_path", str(model_dir), "--task", "t"]
    cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    assert main(["train", *needed, *cpu, *flags.split()]) == 2
    assert "[unsupported_adapter]" in capsys.readouterr().err


def test_of_train_too_nothing_else_is_on_stderr_and_vllm_is_not_imported():
    program = "import sys; from learner.cli import main; print(main(), *{'trl', 'vllm'} & set(sys.modules))"
    command = [sys.executable, "-c", program, "train", "--lora_r", "8.0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stderr == "learner train: --lora_r: '8.0' is not a whole number [invalid_request]\n"
    assert answer.stdout.splitlines()[-1] == "2 trl"


def test_config_file_and_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "rollout_url: http://a:1\ntask: t\ntask_args: {min: 1}\nlora_kwargs: {rank_pattern: {q_proj: 4}}\n"
        "lora_r: 8\nlearning_rate: 2.0e-4\nuse_cpu: true\nbf16: false\ngeneration_kwargs: {stop: [x]}\n"
    )
    config, args, model_args = parse([f"--config={file}", "--lora_alpha", "32", "--rollout-url", "http://b:2"])
    assert config.rollout_url == ["http://b:2"]
    assert config.task_args == {"min": 1}
    assert config.lora_kwargs == {"rank_pattern": {"q_proj": 4}}
    assert args.learning_rate == 2e-4
    assert model_args.use_peft
    assert model_args.lora_r == 8
    assert model_args.lora_alpha == 32
    assert args.generation_kwargs == {"stop": ["x"]}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--config", "/nonexistent.yaml"], "nonexistent"),
        (["--task_args", "{", "--use_cpu", "true", "--bf16", "false"], "task_args is not valid JSON"),
        (["--task_args", "[1]", "--use_cpu", "true", "--bf16", "false"], "JSON object"),
        (["--run_id", "a/b", "--use_cpu", "true", "--bf16", "false"], "run_id"),
        (["--num_generations", "7", "--use_cpu", "true", "--bf16", "false"], "num_generations"),
    ],
)
def test_wrong_options(flags, word):
    with pytest.raises(LockstepError, match=word):
        parse(flags)


def test_unknown_keys_of_a_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("lerning_rate: 1\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(LockstepError, match="lerning_rate"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_several_servers():
    cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "x"]
    several = ["http://a:1", "http://b:2", "http://c:3"]
    for flags in (["--rollout_url", *several], ["--rollout-url=http://a:1", "--rollout_url", *several[1:]]):
        config, _, _ = parse([*flags, *cpu])
        assert config.require_urls() == several
    for urls in (several, ["dns+http://a:1"]):
        config, _, _ = parse(["--rollout_url", *urls, "--deterministic", "true", *cpu])
        with pytest.raises(LockstepError, match=r"one (--)?rollout_url"):
            config.require_urls()


def test_eval_of_a_task_whose_environment_has_the_reward(capsys):
    assert (
        main(["eval", "--rollout-url", "http://127.0.0.1:1", "--task", "learner.tasks.examples.guessing:numbers"]) == 2
    )
    assert "--reward-funcs" in capsys.readouterr().err
