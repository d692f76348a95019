"""`learner train` from its flags to its adapter, and `learner eval`, against the fake server."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import learner.commands.eval
import learner.commands.train
import learner.trainer.attach
from learner.adapters.stored import find_adapter
from learner.cli import main
from learner.servers.client import RolloutClient
from learner.session import Session
from learner.tasks import Task
from shared.errors import ErrorCode, LockstepError
from tests.support.rewards import answers_seven, reward_odd
from tests.support.tiny_model import make_tiny_tokenizer

TASK = f"{__name__}:task"
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def task(reward_weights=None):
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 9}", "answer": i} for i in range(12)])
    return Task(
        name="toy",
        train=rows.select(range(8)),
        eval=rows.select(range(8, 12)),
        reward_funcs=[reward_odd, answers_seven],
        reward_weights=reward_weights,
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
    lora = ["--use_rslora", "--lora_kwargs", '{"rank_pattern": {"q_proj": 8}}', "--model_revision", "v2"]
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
    assert saved.revision == "v2"
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # output_dir itself is PEFT's, as TRL's is
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()

    at = flags.index("--lora_r")
    given = ["--init_adapter", str(adapter), "--output_dir", str(tmp_path / "warm"), "--model_revision", "v3"]
    warm = run(flags[:at] + flags[at + 4 :], *given)
    assert warm["max_logprob_gap"] < 1e-4
    assert LoraConfig.from_pretrained(tmp_path / "warm" / "adapter").revision == "v3"
    assert learner.commands.train.check_options(*learner.commands.train.parse(flags)).revision is None

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
        # Rounded stochastically: to either neighbor.
        torch.testing.assert_close(tensor.float(), trained[name], rtol=2**-7, atol=1e-6)
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


def test_an_evaluation_on_start_is_of_the_held_out_rows(flags, server, tmp_path):
    flags = [*flags, "--eval_on_start", "true", "--per_device_eval_batch_size", "4"]
    run(flags, "--max_steps", "1", "--reward_workers", "0")
    logs = (tmp_path / "out" / "logs.jsonl").read_text() if (tmp_path / "out" / "logs.jsonl").is_file() else ""
    assert '"eval_reward"' in logs


def test_nor_one_of_a_part_of_an_epoch(flags):
    at = flags.index("--max_steps")
    part = [*flags[:at], *flags[at + 2 :], "--num_train_epochs", "0.5"]
    assert run(part)["steps"] == run(part)["steps"] == 2


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OTHER_SETTINGS = {
    "lora_r=8 instead of 4": ["--lora_r", "8"],
    "lora_alpha=64 instead of 32": ["--lora_alpha", "64"],
    "use_rslora=true instead of false": ["--use_rslora", "true"],
    'rank_pattern={"q_proj": 8} instead of {}': ["--lora_kwargs", '{"rank_pattern": {"q_proj": 8}}'],
    'alpha_pattern={"q_proj": 3} instead of {}': ["--lora_kwargs", '{"alpha_pattern": {"q_proj": 3}}'],
    "up_proj v_proj (12 layers, ": ["--lora_kwargs", '{"exclude_modules": ["q_proj"]}'],
    "lora_target_modules=q_proj v_proj (4 layers, ": ["--lora_target_modules", "q_proj", "v_proj"],
    "num_generations=8 instead of 4": ["--num_generations", "8"],
    "steps_per_generation=2 instead of 1": ["--steps_per_generation", "2"],
    "seed=7 instead of 42": ["--seed", "7"],
    "weight_decay=0.1 instead of 0.0": ["--weight_decay", "0.1"],
    "optim=sgd instead of adamw_torch": ["--optim", "sgd"],
    'task_args={"more": 1} instead of {}': ["--task_args", '{"more": 1}'],
    f"task={TASK}_of_others instead of {TASK};": ["--task", f"{TASK}_of_others"],
    "init_adapter=weights": ["--init_adapter", "ADAPTER"],
    "model_name_or_path=weights": ["--model_name_or_path", "OTHER_MODEL"],
}


def task_of_others(reward_weights=None):
    made = task(reward_weights)
    return dataclasses.replace(made, train=made.train.map(lambda row: {"prompt": row["prompt"] + " w3"}))


@pytest.mark.parametrize("steps", ["2", "4"], ids=["finished", "goes on"])
def test_an_output_dir_is_not_reused_with_other_settings(flags, server, tmp_path, model_dir, steps):
    run(flags)
    out = tmp_path / "out"
    before, pushed = contents(out / "adapter"), len(server.pushed)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors")
    for message, more in OTHER_SETTINGS.items():
        base = list(flags)
        if "ADAPTER" in more:
            at = base.index("--lora_r")
            base[at : at + 4] = []
        more = [{"ADAPTER": str(out / "adapter"), "OTHER_MODEL": str(other)}.get(word, word) for word in more]
        with pytest.raises(LockstepError) as refusal:
            run(base, *more, "--max_steps", steps)
        assert message in refusal.value.message
        assert refusal.value.code is ErrorCode.INVALID_REQUEST
        assert f"{out / 'checkpoint-2'} was trained with other settings" in refusal.value.message
    assert contents(out / "adapter") == before
    assert len(server.pushed) == pushed
    may_change = ["--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-4", "--lora_dropout", "0.1"]
    may_change += ["--lora_target_modules", *ALL_LAYERS]
    assert run(flags, *may_change, "--max_steps", steps)["steps"] == int(steps)
    assert (contents(out / "adapter") == before) == (steps == "2")


def test_a_finished_adapter_without_checkpoints_is_not_overwritten_either(flags, tmp_path):
    flags += ["--save_strategy", "no", "--max_steps", "1"]
    run(flags)
    before = contents(tmp_path / "out" / "adapter")
    for more in (["--lora_alpha", "64"], ["--lora_target_modules", "q_proj", "v_proj"]):
        with pytest.raises(LockstepError, match=r"adapter was trained with other settings"):
            run(flags, *more)
    assert contents(tmp_path / "out" / "adapter") == before
    run(flags, "--lora_alpha", "64", "--resume_from_checkpoint", "false")
    assert LoraConfig.from_pretrained(tmp_path / "out" / "adapter").lora_alpha == 64


def test_damaged_checkpoints(flags, tmp_path, caplog):
    """An old one blocks neither a start nor an export, nor does a new one; a named one is the only one looked at."""
    run(flags)
    out = tmp_path / "out"
    (out / "checkpoint-1" / "lockstep.json").write_text("{")
    assert run(flags, "--max_steps", "3")["steps"] == 3
    assert str(out / "checkpoint-1") in caplog.text
    (out / "checkpoint-3" / "optimizer.pt").write_bytes(b"cut")
    shutil.rmtree(out / "adapter")
    assert find_adapter(out) == out / "checkpoint-2"
    assert run(flags, "--max_steps", "3")["steps"] == 3
    caplog.clear()
    shutil.copytree(out / "checkpoint-2", tmp_path / "copy")
    assert run(flags, "--max_steps", "4", "--resume_from_checkpoint", str(tmp_path / "copy"))["steps"] == 4
    assert "checkpoint-1" not in caplog.text
    for word, more in (("no such directory", "nowhere"), ("damaged", str(out / "checkpoint-1"))):
        with pytest.raises(LockstepError, match=word):
            run(flags, "--resume_from_checkpoint", more)
    for step in (2, 3, 4):
        (out / f"checkpoint-{step}" / "lockstep.json").write_text("")
    for more in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(LockstepError, match=r"no checkpoint in .* is whole"):
            run(flags, *more)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--use_peft", "false"], "full fine-tuning"),
        (["--use_dora", "true"], "use_dora"),
        (["--lora_modules_to_save", "lm_head"], "modules_to_save"),
        (["--lora_r", "32"], "--max-lora-rank 32"),
        (["--lora_kwargs", '{"rank_patern": {}}'], "rank_patern"),
        (["--lora_kwargs", '{"init_lora_weights": "pissa"}'], "pissa"),
        (["--lora_kwargs", '{"init_lora_weights": "eva"}'], "init_adapter"),
        (["--lora_kwargs", '{"r": 8}'], r"lora_kwargs\.r: its flag"),
        (["--init_adapter", "/nowhere"], "lora_r"),
        (["--init_adapter", "/nowhere", "--use_dora", "true"], "use_dora"),
        (["--init_adapter", "/nowhere", "--lora_modules_to_save", "lm_head"], "lora_modules_to_save"),
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


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--per_device_train_batch_size", "64"], "8 prompts, and one generation batch takes 16"),
        (["--max_completion_length", "128"], "--max-model-len"),
        (["--max_staleness", "4"], "--slots-per-run 5"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(flags, more, word, monkeypatch):
    monkeypatch.setattr(learner.commands.train, "_trainer", None)
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


def test_text_of_a_model_that_sees_has_its_processors_template(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    text = learner.commands.train.text_tokenizer(str(tmp_path), None, False)
    assert text.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "P"


def test_sigterm_saves_the_step_and_the_same_command_goes_on(flags, server, capsys, monkeypatch):
    push, ends = Session.after_step, {2}

    def push_and_end(session):
        if session.trainer.step in ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return push(session)

    monkeypatch.setattr(Session, "after_step", push_and_end)
    command = ["train", *flags, "--save_strategy", "no", "--max_steps", "4"]
    assert main(command) == 143
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("learner train: stopped by SIGTERM: step 2 of 4 is saved in ")
    assert last.endswith("checkpoint-2; the same command goes on from there")
    ends.clear()
    assert main(command) == 0
    assert [version.step for version in server.pushed[-3:]] == [2, 3, 4]
    assert "4 steps" in capsys.readouterr().out
