"""Scripts and trainers of TRL users, attached to a real server; and the recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.scripts.grpo
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_chat_template
from vllm import SamplingParams

import learner.commands.train
from learner import attach
from learner.run_dir.files import SAMPLES_FILE, read_lines
from learner.servers.client import RolloutClient
from tests.integration.support import policy as P
from tests.integration.support.forked import FORKING
from tests.integration.support.learner_process import write_questions
from tests.integration.support.server import ServerProcess
from tests.support.arguments import arguments
from tests.support.rewards import reward_odd

ONE_LINE = "    from learner import attach; attach(trainer, {url!r}, run_id='script', takeover=True)\n"
CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {i} + 4?"}]} for i in range(8)])
#: Text after an e calls the tool, so that random text does so now and then.
CALLS_ON_E = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "e",
            "close": "<|im_end|>",
            "content": "text",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "look_up", "arguments": {"word": "{content}"}}},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: The word.
    """
    return f"{len(word)} letters"


@pytest.fixture
def make_trainer(model: Path, tmp_path: Path) -> Callable[..., GRPOTrainer]:
    def make(tools: list | None = None, **settings: Any) -> GRPOTrainer:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template, tokenizer.response_template = qwen3_chat_template, CALLS_ON_E if tools else None
        args = GRPOConfig(
            **{
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "max_steps": 2,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 16,
                "learning_rate": 1e-2,
                "gradient_checkpointing": False,
                "save_strategy": "no",
                "logging_steps": 1,
                **settings,
            }
        )
        return GRPOTrainer(
            model=str(model),
            args=args,
            reward_funcs=reward_odd,
            train_dataset=CHATS,
            tools=tools,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )

    return make


@pytest.fixture(scope="module")
def tool_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template that supports tools."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(folder)
    return folder


def batches_of(trainer: GRPOTrainer) -> list[dict]:
    """Collect generation batches as they are generated."""
    generate, batches = trainer._generate_and_score_completions, []

    def generate_and_keep(inputs: list) -> dict:
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = generate_and_keep
    return batches


def test_trls_own_script_and_one_line(server: ServerProcess, model: Path, tmp_path: Path) -> None:
    """Run the installed trl/scripts/grpo.py with one more line before `trainer.train`."""
    source = Path(trl.scripts.grpo.__file__).read_text()
    before, train, after = source.partition("    trainer.train(")
    script = tmp_path / "grpo.py"
    script.write_text(before + ONE_LINE.format(url=server.url) + train + after)
    (tmp_path / "data").mkdir()
    write_questions(tmp_path / "data" / "train.jsonl")
    command = [
        sys.executable,
        str(script),
        *arguments(
            {
                "--model_name_or_path": model,
                "--dataset_name": tmp_path / "data",
                "--reward_funcs": "tests.support.rewards.reward_odd",
                "--use_peft": None,
                "--lora_r": 4,
                "--max_steps": 2,
                "--lora_target_modules": "all-linear",
                "--output_dir": tmp_path / "run",
                "--use_cpu": "true",
                "--bf16": "false",
                "--per_device_train_batch_size": 8,
                "--num_generations": 4,
                "--max_completion_length": 12,
                "--learning_rate": "1e-2",
                "--report_to": "none",
                "--gradient_checkpointing": "false",
            }
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": FORKING}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    with RolloutClient(server.url) as client:
        served = next(run.version for run in client.state().runs if run.run_id == "script")
        assert served.step == 2
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        trained = PeftModel.from_pretrained(base, tmp_path / "run").eval()
        sequence = list(range(5, 30))
        gap = (P.score(client, sequence, policy=served) - P.reference(trained, sequence)).abs().max().item()
    assert gap < 1e-4, "what the script saved is what is served"


def test_turns_of_a_tool_loop(server: ServerProcess, make_trainer: Callable[..., GRPOTrainer]) -> None:
    trainer = make_trainer(
        tools=[look_up],
        max_completion_length=64,
        max_tool_calling_iterations=3,
        generation_kwargs={"max_tokens": 12},
    )
    session = attach(trainer, server.url, run_id="tools", takeover=True)
    batches = batches_of(trainer)
    trainer.train()
    session.close()
    logged = [log for log in trainer.state.log_history if "reward" in log]
    assert all(log["tools/call_frequency"] > 0 for log in logged)
    for batch in batches:
        mask_BT = batch["completion_mask"].bool()
        sampled_BT = mask_BT & batch["tool_mask"].bool()
        turns = (sampled_BT[:, 1:] & ~sampled_BT[:, :-1]).sum(1) + 1
        assert turns.max() >= 2
        assert (mask_BT & ~sampled_BT).any()
        gap_BT = (batch["sampling_per_token_logps"] - batch["old_per_token_logps"]).abs()
        assert gap_BT[sampled_BT].max() < 1e-4, "in one forward over all turns, as they were drawn one after the other"
    assert session.rollouts.stats.completions == 16


def test_vllms_sampling_params_reach_vllm(server: ServerProcess, make_trainer: Callable[..., GRPOTrainer]) -> None:
    """min_p=1 keeps the most likely token only; a stop string ends a completion where it appears."""
    trainer = make_trainer(max_steps=1)
    asked = SamplingParams(min_p=1.0, stop=["e", "a"], include_stop_str_in_output=True, seed=3407)
    session = attach(trainer, server.url, run_id="params", takeover=True, vllm_sampling_params=asked)
    batches = batches_of(trainer)
    trainer.train()
    session.close()
    ids_BT, mask_BT = batches[0]["completion_ids"], batches[0]["completion_mask"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
    assert rows[:4] == [rows[0]] * 4
    assert rows[4:] == [rows[4]] * 4
    decode = trainer.processing_class.decode
    assert any(len(row) < 16 for row in rows)
    assert all(not set("ea") & set(decode(row[:-1])) for row in rows)


RECIPES = {
    "gsm8k": ["--task", "{gsm8k}", "--max_staleness", "0", "--gradient_accumulation_steps", "1"],
    "curriculum": ["--train_size", "64"],
    "json_schema": ["--train_size", "16"],
    "tools": [
        "--train_size",
        "16",
        "--gradient_accumulation_steps",
        "1",
        "--max_completion_length",
        "160",
        "--max_tool_calling_iterations",
        "1",
        "--vllm_importance_sampling_correction",
        "false",
        # A random model calls no tool unless its tokens are chosen for it.
        "--generation_kwargs",
        json.dumps(
            {
                "structured_outputs": {
                    "regex": r'<tool_call>\n\{"name": "guess", "arguments": \{"number": [1-9]\}\}\n</tool_call>'
                }
            }
        ),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(server: ServerProcess, tool_model: Path, tmp_path: Path, name: str) -> None:
    gsm8k = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"Ann has {i} apples. And now?", "answer": f"{i} + 2.\n#### {i + 2}"} for i in range(16)]
    gsm8k.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *arguments(
            {
                "--config": f"recipes/{name}.yaml",
                "--rollout_url": server.url,
                "--model_name_or_path": tool_model,
                "--output_dir": tmp_path / name,
                "--run_id": name,
                "--takeover": "true",
                "--max_steps": 1,
                "--use_cpu": "true",
                "--bf16": "false",
                "--dtype": "float32",
                "--per_device_train_batch_size": 8,
                "--num_generations": 4,
                "--eval_size": 4,
                "--max_completion_length": 24,
                "--lora_r": 4,
                "--gradient_checkpointing": "false",
                "--reward_workers": 1,
                "--proof_canary": "false",
            }
        ),
        *(flag.replace("{gsm8k}", str(gsm8k)) for flag in RECIPES[name]),
    ]
    summary = learner.commands.train.run(*learner.commands.train.parse(flags))
    assert summary["steps"] == summary["pushes"] == 1
    assert summary["completions"] == 8
    history = json.loads((tmp_path / name / "metrics.jsonl").read_text())
    assert history["reward"] is not None
    if name == "json_schema":
        # A random model begins with a brace only if the schema leaves it nothing else.
        (batch,) = read_lines(tmp_path / name / SAMPLES_FILE)
        samples = [sample for group in batch["groups"] for sample in group["samples"]]
        assert {sample["completion"].lstrip()[:1] for sample in samples} == {"{"}
    if name == "tools":
        assert history["reward"] >= 0.1, "every completion has guessed"
