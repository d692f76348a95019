"""A training that is cut off and started again ends with the same bytes: real TRL and transformers, a fake server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from learner.run_dir.checkpoint import STAGING, commit, last_checkpoint, load_state, save_state
from learner.run_dir.files import LOGS_FILE, read_lines
from learner.trainer.attach import attach
from learner.trainer.resume import resume_point
from shared.errors import LockstepError
from tests.support.rewards import reward_odd

#: Of a training of three steps, each evaluated.
BEST_AT_END = {
    "max_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
    "greater_is_better": True,
    "load_best_model_at_end": True,
}


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def train(make_trainer, server, client, tmp_path):
    """Trains in `name`; with `kill_at` only until the push of that step. Returns the final adapter."""
    server.state = server.state.model_copy(update={"deterministic": True})

    def run(name: str, kill_at: int | None = None, resume: str | None = None, rows=None, lora=None, **config):
        rows = rows or [{"prompt": f"w{i} w{i + 7}"} for i in range(10)]
        trainer = make_trainer(
            trainer_kwargs={"train_dataset": Dataset.from_list(rows)},
            output_dir=str(tmp_path / name),
            save_strategy="steps",
            seed=5,
            full_determinism=True,
            lora={"lora_dropout": 0.1, **(lora or {})},
            **config,
        )
        session = attach(trainer, client=client, deterministic=True)
        if kill_at is not None:
            push = session.after_step

            def push_or_die():
                if trainer.state.global_step == kill_at:
                    raise KilledError
                return push()

            session.after_step = push_or_die
        if resume or kill_at is None:
            trainer.train(resume_from_checkpoint=resume)
        else:
            with pytest.raises(KilledError):
                trainer.train()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
        return weights, session

    return run


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
)
@pytest.mark.parametrize("kill_at", [4, 8])
def test_the_same_bytes_as_without_a_kill(train, tmp_path, config, kill_at) -> None:
    """Two prompts a batch of ten: epochs end within; save_steps=3 also falls inside generation batches."""
    config = {"max_steps": 11, "save_steps": 3, **config}
    uncut, _ = train("uncut", **config)
    train("cut", kill_at=kill_at, **config)
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{kill_at // 3 * 3 - (3 if kill_at % 3 == 0 else 0)}"
    resumed, session = train("cut", resume=str(checkpoint), **config)
    assert all(torch.equal(uncut[name], resumed[name]) for name in uncut)
    assert session.metrics.pushes == 11
    assert session.publisher.lease.fence == 1


def test_a_batch_keeps_how_many_images_its_rows_have(train, tmp_path, monkeypatch) -> None:
    generate, count = GRPOTrainer._generate_and_score_completions, GRPOTrainer._compute_loss
    counted: list[list[int]] = []

    def generate_with_counts(self, inputs):
        return {**generate(self, inputs), "num_images": list(range(len(inputs)))}

    def compute_counted(self, model, inputs):
        counted.append(inputs["num_images"])
        return count(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", generate_with_counts)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_counted)
    config = {"max_steps": 6, "save_steps": 2, "steps_per_generation": 3}
    uncut, _ = train("uncut", **config)
    whole = counted[:]
    train("cut", kill_at=3, **config)
    counted.clear()
    resumed, _ = train("cut", resume=str(tmp_path / "cut" / "checkpoint-2"), **config)
    assert counted == whole[2:]
    assert all(torch.equal(uncut[name], resumed[name]) for name in uncut)


def test_checkpoints_are_atomic(train, tmp_path) -> None:
    train("run", max_steps=4, save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    (tmp_path / "run" / "checkpoint-4" / "lockstep.json").unlink()  # as something else writes them
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    (tmp_path / "run" / "checkpoint-3" / "lockstep.json").write_text("{")
    with pytest.raises(LockstepError, match="damaged"):
        load_state(tmp_path / "run" / "checkpoint-3")


def test_the_latest_history_counts(train, tmp_path) -> None:
    """Started again in the same directory and killed early: its own checkpoint, not the higher one of before."""
    train("run", max_steps=4, save_steps=2)
    train("run", kill_at=3, max_steps=4, save_steps=2)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_another_arrangement_of_batches_is_refused(train, tmp_path) -> None:
    train("run", max_steps=2, save_steps=1, steps_per_generation=2)
    with pytest.raises(LockstepError, match="steps_per_generation=1 instead of 2"):
        train("run", max_steps=4, save_steps=1, resume=str(tmp_path / "run" / "checkpoint-1"))


def test_another_adapter_is_refused_before_it_is_loaded(train, tmp_path, monkeypatch) -> None:
    """In a script, too: by name, where a rank or a layer would otherwise be found by a mismatch of sizes, or not."""
    train("run", max_steps=1, save_steps=1)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    monkeypatch.setattr(GRPOTrainer, "_load_from_checkpoint", lambda *_: pytest.fail("it was loaded"))
    for lora, words in (
        ({"r": 8}, "lora_r=8 instead of 4"),
        ({"lora_alpha": 4}, "lora_alpha=4 instead of 8"),
        ({"target_modules": ["q_proj"]}, r"lora_target_modules=q_proj \(2 layers, \w+\) instead of down_proj"),
    ):
        with pytest.raises(LockstepError, match=words):
            train("run", max_steps=2, save_steps=1, resume=checkpoint, lora=lora)
    rows = [{"prompt": f"w{i} w{i + 8}"} for i in range(10)]
    with pytest.raises(LockstepError, match=r"train_dataset=10 prompts \(\w+\) instead of 10 prompts"):
        train("run", max_steps=2, save_steps=1, resume=checkpoint, rows=rows)


def test_a_learning_rate_that_was_changed_counts(train, tmp_path) -> None:
    """Torch's optimizer and scheduler would bring the checkpoint's."""
    schedule = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "linear"}
    train("run", **schedule, learning_rate=1e-2)
    train("run", **schedule, learning_rate=2e-2, resume=str(tmp_path / "run" / "checkpoint-2"))
    logs = read_lines(tmp_path / "run" / LOGS_FILE)
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    assert rates == pytest.approx([1e-2, 0.75e-2, 1e-2, 0.5e-2])


def test_a_batch_that_a_rank_lacks_is_refused(train, tmp_path) -> None:
    train("run", max_steps=3, save_steps=1, steps_per_generation=3)
    folder = tmp_path / "run" / "checkpoint-1"
    state = load_state(folder)
    (folder / "generation_batch_0.safetensors").unlink()
    save_state(folder, replace(state, files={}))  # as where another node has written it
    with pytest.raises(LockstepError, match=r"generation_batch_0.safetensors is missing"):
        train("run", max_steps=3, save_steps=1, steps_per_generation=3, resume=str(folder))


@pytest.mark.parametrize(
    ("saved", "resumed", "named"),
    [
        ({"save_only_model": True}, {}, ["optimizer and the learning rate's schedule", "random numbers"]),
        ({}, {"ignore_data_skip": True}, ["rows of the epoch (ignore_data_skip)"]),
    ],
)
def test_what_starts_anew_is_named_and_refused_where_the_bytes_count(
    train, tmp_path, make_trainer, client, caplog, saved, resumed, named
) -> None:
    train("run", max_steps=1, save_steps=1, **saved)
    folder = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(LockstepError, match=r"deterministic: .* start anew with") as refusal:
        train("run", max_steps=2, save_steps=1, resume=str(folder), **resumed)
    rows = [{"prompt": f"w{i} w{i + 7}"} for i in range(10)]
    trainer = make_trainer(
        trainer_kwargs={"train_dataset": Dataset.from_list(rows)},
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        seed=5,
        **resumed,
    )
    session = attach(trainer, client=client)
    trainer.train(resume_from_checkpoint=str(folder))
    session.close()
    (warning,) = [record.message for record in caplog.records if "starts anew with" in record.message]
    assert all(name in warning and name in refusal.value.message for name in named)
    assert trainer.state.global_step == 2


def test_a_whole_checkpoint_starts_nothing_anew(train, tmp_path, caplog) -> None:
    train("run", max_steps=1, save_steps=1)
    train("run", max_steps=2, save_steps=1, resume=str(tmp_path / "run" / "checkpoint-1"))
    assert "starts anew" not in caplog.text


def test_a_directory_that_is_no_checkpoint_is_refused(train, tmp_path) -> None:
    train("run", max_steps=1, save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(LockstepError, match=f"no trainer_state.json, .* the last one in it is {checkpoint}"):
        resume_point(tmp_path / "other", tmp_path / "run", {})
    with pytest.raises(LockstepError, match=r"no trainer_state.json, .*; give one"):
        resume_point(tmp_path / "other", tmp_path, {})
    assert resume_point(tmp_path / "other", checkpoint, {}) == checkpoint


def test_a_metric_that_no_evaluation_has_is_named(make_trainer, client) -> None:
    rows = Dataset.from_list([{"prompt": "w1 w2"}] * 4)
    trainer = make_trainer(
        trainer_kwargs={"eval_dataset": rows}, **BEST_AT_END, save_strategy="best", metric_for_best_model="rewardd"
    )
    attach(trainer, client=client, run_id="r")
    with pytest.raises(LockstepError, match=r"metric_for_best_model: .* no such metric, but .*eval_reward,"):
        trainer.train()


def test_the_best_checkpoint_keeps_its_name(train, tmp_path, make_trainer, server, client) -> None:
    rows = Dataset.from_list([{"prompt": "w1 w2"}] * 4)
    trainer = make_trainer(
        trainer_kwargs={"eval_dataset": rows},
        **BEST_AT_END,
        save_strategy="best",
        metric_for_best_model="reward",
        do_eval=True,
    )
    attach(trainer, client=client, run_id="r")
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == Path(trainer.args.output_dir)
    assert best.is_dir()
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


def test_the_best_checkpoint_is_what_is_served_at_the_end(make_trainer, server, client) -> None:
    """Under a version of its own, which an evaluation after the training is of."""
    rows = Dataset.from_list([{"prompt": "w1 w2"}] * 4)
    trainer = make_trainer(
        trainer_kwargs={"eval_dataset": rows},
        **BEST_AT_END,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="best",
    )
    evaluate, best = trainer.evaluate, [1.0, 3.0, 2.0]
    trainer.evaluate = lambda *_, **__: evaluate() | {"eval_best": best[trainer.state.global_step - 1]}
    session = attach(trainer, client=client, run_id="r", proof_canary=False)
    trainer.train()
    kept = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    assert trainer.state.best_global_step == 2
    version = session.publisher.last.version
    assert (version.fence, version.step) == (1, 3)
    assert server.finished["r"].version == version
    name = "model.layers.0.mlp.up_proj"
    a, b = (kept[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    assert torch.allclose(server.deltas["r"][name], 2 * b @ a, atol=1e-6)
    trainer.evaluate()
    assert server.generated[-1].policy == version
    session.close()


def test_a_pretrained_adapter_with_its_reference(model_dir, tmp_path, server, client, no_workers_left) -> None:
    """transformers loads only the adapters in subdirectories of a checkpoint: with beta, TRL's reference."""

    def make(max_steps: int) -> GRPOTrainer:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        trainer = GRPOTrainer(
            model=get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), lora),
            reward_funcs=[reward_odd],
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                use_cpu=True,
                bf16=False,
                beta=0.1,
                max_steps=max_steps,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                learning_rate=1e-2,
                save_steps=1,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 7}"} for i in range(10)]),
        )
        attach(trainer, client=client, run_id="r", proof_canary=False)
        return trainer

    def weights(trainer: GRPOTrainer, adapter: str) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if f".{adapter}." in name}

    trained = make(2)
    start = weights(trained, "ref")
    trained.train()
    resumed, found = make(3), []
    resumed.add_callback(
        _AtFirstStep(lambda: found.append({kind: weights(resumed, kind) for kind in ("default", "ref")}))
    )
    resumed.train(resume_from_checkpoint=True)
    end = weights(trained, "default")
    assert any(not torch.equal(start[name.replace(".default.", ".ref.")], tensor) for name, tensor in end.items())
    assert all(torch.equal(found[0]["default"][name], tensor) for name, tensor in end.items())
    assert all(torch.equal(found[0]["ref"][name], tensor) for name, tensor in start.items())


class _AtFirstStep(TrainerCallback):
    def __init__(self, act) -> None:
        self.act = act

    def on_step_begin(self, args, state, control, **_) -> None:
        self.act()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"beta": 0.1}, r"beta=0.1: .*checkpoint-1 lies within a generation batch .* go on with beta=0.0"),
        ({"vllm_importance_sampling_correction": True}, "go on with vllm_importance_sampling_correction=False"),
    ],
)
def test_what_a_batch_under_way_does_not_hold(train, tmp_path, changed, words) -> None:
    config = {"save_steps": 1, "steps_per_generation": 2, "vllm_importance_sampling_correction": False}
    train("run", **config, max_steps=2)
    with pytest.raises(LockstepError, match=words):
        train("run", resume=str(tmp_path / "run" / "checkpoint-1"), **{**config, **changed}, max_steps=3)
    train("run", resume=str(tmp_path / "run" / "checkpoint-2"), **{**config, **changed}, max_steps=3)


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path) -> None:
    for content in ("old", "new"):
        staged = tmp_path / STAGING / "checkpoint-2"
        staged.mkdir(parents=True)
        (staged / content).write_text(content)
        commit(staged, tmp_path / "checkpoint-2")
    assert [p.name for p in (tmp_path / "checkpoint-2").iterdir()] == ["new"]
    assert not (tmp_path / STAGING).exists()
