"""`learner train` before TRL is imported: its help, and words that it does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from learner.cli import main
from learner.commands import training
from learner.commands.options import OptionParser
from learner.foreign_options import RENAMED, sampling_fields
from learner.trainer.unsloth import with_vllm_params
from shared.errors import InvalidRequest

WORDS = [
    ("--fast_inference", "completions always come from vLLM"),
    ("--fast-inference true", "there is no --fast-inference: completions always"),
    ("--gpu_memory_utilization 0.6", "belongs to the server: rollout-server MODEL --gpu-memory-utilization 0.6"),
    ("--max_lora_rank=64", "rollout-server MODEL --max-lora-rank 64; the rank that is trained is --lora_r"),
    ("--max_seq_length 2048", "rollout-server MODEL --max-model-len 2048, for prompt and completion"),
    ("--full_finetuning true", "only a LoRA adapter is trained"),
    ("--vllm_sampling_params max_tokens=512", "write --max_completion_length 512"),
    ("--max_prompt_length 256", "prompts are never cut"),
    ("--load_in_fp8", "--load_in_4bit"),
    ("--enforce-eager", "rollout-server MODEL --enforce-eager"),
    ("--unsloth_num_chunks -1", "--max_tokens_per_pass does"),
    ("--dataset_name trl-lib/DeepMath-103K", "there is no --dataset_name: it is --task here"),
    ("--dataset_config main", "it is part of --task: NAME:CONFIG"),
    ("--dataset_train_split train", "it is part of --task: NAME:CONFIG@SPLIT"),
    ("--warmup_ratio 0.1", "give --warmup_steps: below 1 it is a share of all steps"),
    ("--vllm_enable_sleep_mode true", "use share_gpu here, and rollout-server --share-gpu"),
    ("--finetune_mlp_modules true", "only the language model"),
    ("--token hf_x", "set $HF_TOKEN"),
    ("--r 16", "it is --lora_r here"),
    ("--torch_dtype bfloat16", "it is --dtype here"),
    ("-x", "there is no -x"),
    ("--random_state 3407", "it is --seed here"),
    ("--vllm_mode colocate", "--vllm_mode colocate has no effect here: leave it out"),
    ("--use_vllm false", "completions always come from a rollout server's vLLM"),
    ("--vllm_gpu_memory_utilization 0.3", "give --gpu-memory-utilization to rollout-server"),
    ("--vllm_server_port 8001", "has no effect here: use rollout_url"),
    ("--lerning_rate 1e-5", "there is no --lerning_rate: did you mean --learning_rate?"),
    ("--max-stalenes 1", "did you mean --max-staleness?"),
    ("--nothing_of_the_kind", "there is no --nothing_of_the_kind [invalid_request]"),
]
LIGHT = """
import sys
import json
from learner.commands import training
from shared.errors import LockstepError
training.help_text()
for argv in json.loads(sys.argv[1]):
    try:
        training.check(argv.split())
    except LockstepError as error:
        print(error)
    else:
        print(argv, "is known")
large = {"torch", "transformers", "peft", "trl", "vllm", "datasets"}.intersection(sys.modules)
assert not large, large
"""


@pytest.mark.parametrize(("words", "answer"), WORDS)
def test_words_of_other_tools_and_typos(capsys, words, answer):
    assert main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert answer in error


def test_they_are_answered_without_anything_large():
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps([w for w, _ in WORDS])], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == len(WORDS)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("gpu_memory_utilization: 0.6", "rollout-server MODEL --gpu-memory-utilization 0.6"),
        ("fast_inference: true", "there is no option fast_inference: completions always"),
        ("vllm_mode: colocate", "vllm_mode colocate has no effect here"),
        ("vllm_sampling_params: {max_tokens: 512, min_p: 0.1}", "`max_completion_length: 512`, `min_p: 0.1`"),
        ("vllm_sampling_params: max_tokens=512, min_p = 0.1", "`max_completion_length: 512`, `min_p: 0.1`"),
        ("lerning_rate: 1", "did you mean learning_rate?"),
    ],
)
def test_the_same_words_in_a_recipe(capsys, tmp_path, line, answer):
    (tmp_path / "run.yaml").write_text(line)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"--config {tmp_path}/run.yaml: " in error
    assert answer in error


def test_a_model_that_is_not_there_is_found_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "learner.commands.train", None)  # which cannot be imported then
    assert main(["train", "--model_name_or_path", str(tmp_path / "typo")]) == 2
    assert "model_name_or_path: there is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--task questions.jsonl.gz", "task: there is no file questions.jsonl.gz in "),
        ("--eval_dataset held/out.csv", "eval_dataset: there is no file held/out.csv in "),
        ("--reward_funcs mine:length typo:length", "reward_funcs: there is no module typo for typo:length in "),
        ("--agent typo:act", "agent: there is no module typo"),
    ],
)
def test_files_of_the_users_that_are_not_there_are_found_at_once(capsys, tmp_path, monkeypatch, flags, error):
    monkeypatch.setitem(sys.modules, "learner.commands.train", None)  # which cannot be imported then
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    assert main(["train", *flags.split()]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--task org/name:config@test", "--task reasoning_gym:chain_sum", "--reward_funcs score", "--task mine:make"],
)
def test_what_may_be_there_is_not_refused(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    training.check(flags.split())


def test_the_names_are_those_of_the_parser():
    parsed = set(OptionParser()._options)
    assert training.options().keys() == parsed


def test_defaults_read_from_the_source_are_those_of_the_parser():
    parser = OptionParser()
    read = {name: option.default for name, option in training.options().items()}
    for name in ("max_steps", "learning_rate", "lora_r", "num_generations", "max_completion_length", "vllm_mode"):
        assert read[name] == parser.get_default(name), name


def test_the_right_names_exist():
    assert set(RENAMED.values()) - training.options().keys() == set()
    assert RENAMED.keys() & training.options().keys() == set()


def test_help_shows_ten_options_with_text_and_all_others_by_name(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  --") and "  " in line.strip()] == [
        f"--{name}" for name in training.FIRST
    ]
    words = text.split()
    assert [name for name in training.options() if f"--{name}" not in words] == []


def test_help_all_explains_every_option(capsys):
    assert main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    assert "--max_staleness" in text
    assert "Generation batches that rollouts may run ahead" in text


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512, min_p = 0.1",
        "SamplingParams(max_tokens=512,\n min_p=0.1)",
        "vllm.SamplingParams(min_p=0.1, max_tokens=512)",
        '{"max_tokens": 512, "min_p": 0.1}',
    ],
)
def test_sampling_parameters_as_text(grpo, text):
    assert sampling_fields(text) == {"max_tokens": 512, "min_p": 0.1}
    changed = with_vllm_params(grpo(max_completion_length=512), text)
    assert changed.generation_kwargs == {"min_p": 0.1}


@pytest.mark.parametrize(
    "text",
    [
        *("max_tokens", "max_tokens=", "512, 0.1", "max_tokens=open('x')", "**fields", "n=1)+(2", "n=1)(n=2", "n=1).x"),
        *("{1}", "{[]: 1}", "{1: 2}", "n=" + "(" * 500, "n=" + "-" * 20_000 + "1"),
    ],
)
def test_text_that_is_no_sampling_parameters(text):
    with pytest.raises(InvalidRequest, match=r"write its fields as max_tokens=512, min_p=0\.1"):
        sampling_fields(text)
