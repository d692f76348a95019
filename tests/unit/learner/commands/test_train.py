"""`learner train` from its flags to its adapter, and `learner eval`, against the fake server."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import learner.commands.eval
import learner.commands.train
import learner.trainer.attach
from learner.servers.client import RolloutClient
from learner.tasks import Task
from shared.errors import LockstepError
from tests.support.rewards import answers_seven, reward_odd

TASK = f"{__name__}:task"


def task(**_):
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}", "answer": i} for i in range(12)])
    return Task(
        name="toy",
        train=rows.select(range(8)),
        eval=rows.select(range(8, 12)),
        reward_funcs=[reward_odd, answers_seven],
    )


@pytest.fixture
def flags(model_dir, server, monkeypatch, tmp_path):
    """Flags of a short run; both commands talk to the fake server."""

    def connect(url, token=None, **kwargs):
        return RolloutClient(url, token, transport=server.transport, **kwargs)

    monkeypatch.setattr(learner.trainer.attach, "RolloutClient", connect)
    monkeypatch.setattr(learner.commands.eval, "RolloutClient", connect)
    options = {
        "rollout-url": "http://fake",
        "task": TASK,
        "model_name_or_path": model_dir,
        "use_cpu": "true",
        "bf16": "false",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*flags, "--reward_weights", "1.0", "0.5"]


def run(flags, *more):
    return learner.commands.train.run(*learner.commands.train.parse([*flags, *more]))


def test_train_warm_start_and_resume(flags, server, tmp_path, capsys):
    lora = ["--use_rslora", "--lora_kwargs", '{"rank_pattern": {"q_proj": 8}}']
    summary = run(flags, *lora)
    assert summary["steps"] == summary["pushes"] == 2
    assert summary["completions"] == 16
    assert summary["push_seconds_median"] > 0
    assert summary["train_seconds"] > 0
    assert "step 2/2  reward" in capsys.readouterr().out
    adapter = tmp_path / "out" / "adapter"
    saved = LoraConfig.from_pretrained(adapter)
    assert saved.use_rslora
    assert saved.rank_pattern == {"q_proj": 8}

    at = flags.index("--lora_r")
    warm = run(flags[:at] + flags[at + 4 :], "--init_adapter", str(adapter), "--output_dir", str(tmp_path / "warm"))
    assert warm["max_logprob_gap"] < 1e-4

    before = len(server.pushed)
    resumed = run(flags, *lora, "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert [(v.fence, v.step) for v in server.pushed[before:]] == [(1, 2), (1, 3)]
    assert resumed["run_id"] == summary["run_id"]
    assert resumed["pushes"] == resumed["steps"] == 3
    assert resumed["completions"] == 24
    history = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [1, 2, 3]


def test_a_merged_model_at_the_end(flags, model_dir, tmp_path):
    for steps in ("1", "2"):  # the second goes on, and replaces the first one's model
        run(flags, "--save_merged", "true", "--max_steps", steps)
    out = tmp_path / "out"
    merged = load_file(out / "merged" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert tensor.dtype is torch.bfloat16
        torch.testing.assert_close(tensor.float(), trained[name], rtol=2**-8, atol=1e-6)
    card = (out / "merged" / "README.md").read_text()
    assert "| optimizer steps | 2 |" in card
    assert "| task | toy |" in card
    assert "trl 1.16.0" in card


def test_a_finished_training_is_not_trained_further(flags, server, tmp_path):
    first = run(flags, "--max_steps", "3")
    pushed = len(server.pushed)
    again = run(flags, "--max_steps", "3")
    assert len(server.pushed) == pushed
    assert all(again[name] == first[name] for name in ("steps", "pushes", "completions"))
    assert run(flags, "--max_steps", "4")["steps"] == 4


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--use_peft", "false"], "full fine-tuning"),
        (["--use_dora", "true"], "use_dora"),
        (["--lora_modules_to_save", "lm_head"], "modules_to_save"),
        (["--lora_r", "32"], "--max-lora-rank 32"),
        (["--lora_kwargs", '{"rank_patern": {}}'], "rank_patern"),
        (["--lora_kwargs", '{"init_lora_weights": "pissa"}'], "pissa"),
        (["--init_adapter", "/nowhere"], "lora_r"),
        (["--max_completion_length", "127"], "--max-model-len"),
        (["--vllm_server_host", "x"], "rollout_url"),
        (["--cache_implementation", "static"], "cache_implementation"),
        (["--load_in_4bit", "true"], "four-bit-base"),
        (["--tools", "no.such:tool"], "no module 'no'"),
    ],
)
def test_refusals_of_the_command(flags, more, word):
    with pytest.raises(LockstepError, match=word):
        run(flags, *more)


def test_another_base_is_refused(flags, server, monkeypatch):
    base = server.state.base.model_copy(update={"weights": "f" * 32})
    server.state = server.state.model_copy(update={"base": base})
    with pytest.raises(LockstepError, match="base weights differ"):
        run(flags)
    assert run(flags, "--allow_base_mismatch", "true")["steps"] == 2


def test_eval_command(flags, server, tmp_path, capsys):
    out = tmp_path / "eval.json"
    flags = ["--rollout-url", "http://fake", "--task", TASK, "--policy", "base", "--max_tokens", "4", "--limit", "3"]
    assert learner.commands.eval.main([*flags, "--json", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["questions"] == 3
    assert result["versions"] == ["base"]
    assert len(result["rows"]) == 3
    assert result["rewards"]["answers_seven"] == 1.0
    request = server.generated[-1]
    assert request.sampling.temperature == 0.0
    assert request.sampling.max_tokens == 4
    assert request.prompts[0].text == "w8 w17"
    assert f"base  {result['reward']:.3f} [" in capsys.readouterr().out
