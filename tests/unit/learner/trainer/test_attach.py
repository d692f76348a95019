"""A real TRL training loop over a fake server: pushes, versions, proofs, importance ratios, evaluation."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM

import learner
from learner.config import LearnerConfig
from learner.monitors.progress import show_progress
from learner.trainer.attach import attach, save_final_adapter
from learner.utils.cleanup import finally_do
from shared.errors import ErrorCode, LeaseMismatch, LockstepError, NoFreeRun, UnknownRun


def test_attach_is_what_the_package_exports():
    assert learner.attach is attach


def test_trains_and_pushes_every_step(make_trainer, server, client, tmp_path):
    trainer = make_trainer(lora={"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}})
    session = attach(trainer, client=client, run_id="r", proof_canary=True)
    show_progress(trainer, session)
    trainer.train()

    steps = [v.step for v in server.pushed if v.run_id == "r"]
    assert steps == [0, 1, 2, 3]
    assert "r.canary" not in server.served
    assert any(v.run_id == "r.canary" for v in server.pushed)
    summary = session.summary()
    assert summary["pushes"] == summary["steps"] == 3
    assert summary["completions"] == 3 * 8
    assert summary["completion_tokens"] >= 24
    assert summary["max_logprob_gap"] < 1e-4
    assert abs(summary["canary_slope"] - 1) < 0.01
    assert abs(session.proof.slope - 1) < 0.01
    # On-policy and the same model: TRL's importance ratios come out as 1 from the server's logprobs.
    logged = trainer.state.log_history
    ratios = [log["sampling/importance_sampling_ratio/mean"] for log in logged if "reward" in log]
    assert len(ratios) == 3
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios)
    assert all("lockstep/push_seconds" in log for log in logged if "reward" in log)
    assert all(log["lockstep/drift_delta"] < 1e-4 for log in logged if "reward" in log)
    assert summary["max_drift_kl"] < 1e-6
    assert summary["max_drift_clipped"] == 0.0
    # Rollouts of step k are requested from version k, each prompt once with n completions.
    asked = [r for r in server.generated if r.policy != "base"]
    assert [r.policy.step for r in asked] == [0, 1, 2]
    assert all(r.sampling.n == 4 and len(r.prompts) == 2 for r in asked)
    history = [json.loads(line) for line in Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert [h["step"] for h in history] == [1, 2, 3]
    assert all(h["reward"] is not None for h in history)
    assert all(h["drift"]["delta"] < 1e-4 for h in history)

    folder = save_final_adapter(trainer, tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([session.proof.sequences[0]])
    with torch.no_grad():
        logits = again(input_ids=ids).logits[0, :-1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
    expected = session.proof.last.served[: len(logprobs)]
    assert torch.allclose(logprobs.double(), torch.tensor(expected), atol=1e-4)


def test_no_two_callbacks_are_of_a_class(make_trainer, client):
    """Transformers would warn of them in every training."""
    trainer = make_trainer()
    attach(trainer, client=client, run_id="r")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert len(set(kinds)) == len(kinds)


def test_a_server_that_merges(make_trainer, server, client):
    """The canary is gone before the run's first push; a run that continues finds no base, and is proven without it."""
    server.state = server.state.model_copy(update={"apply": "merge", "max_runs": 1})
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r", proof_canary=True)
    trainer.train()
    assert abs(session.canary.slope - 1) < 0.01
    assert list(server.served) == ["r"]
    trainer = make_trainer()
    again = attach(trainer, client=client, run_id="r", proof_canary=True)
    trainer.train()
    assert again.canary is None
    assert again.proof.max_mismatch < 1e-4


def test_truncated_sampling_does_not_bias_the_ratios(make_trainer, server, client):
    trainer = make_trainer(top_p=0.9, max_steps=1)
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    assert session.metrics.mismatch.delta < 1e-4
    assert session.metrics.mismatch.clipped == 0.0


def test_mismatch_that_is_clipped(make_trainer, server, client):
    trainer = make_trainer(top_p=0.9, max_steps=1, vllm_importance_sampling_mode="token_mask")
    session = attach(trainer, client=client, run_id="r", proof_tolerance=100.0)
    generate = server._generate

    def shifted(request):
        answer = generate(request)
        for completion in answer.groups[0].completions:
            completion.logprobs = [logprob - 2.0 for logprob in completion.logprobs]
        return answer

    server._generate = shifted
    trainer.train()
    assert 0.0 < session.metrics.mismatch.clipped < 1.0
    assert session.metrics.mismatch.kl > 0.1
    logged = trainer.state.log_history[0]["lockstep/drift_clipped"]
    assert logged == pytest.approx(session.metrics.mismatch.clipped, abs=1e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "batches", [{}, {"gradient_accumulation_steps": 2}, {"steps_per_generation": 2}, {"num_iterations": 2}], ids=str
)
def test_mismatch_is_measured_where_nothing_is_corrected(make_trainer, server, client, packed, batches):
    """Of the logprobs of the loss, at the weights that the completions were requested from."""
    trainer = make_trainer(vllm_importance_sampling_correction=False, max_steps=2, learning_rate=1.0, **batches)
    session = attach(trainer, client=client, run_id="r", packed_passes=packed)
    trainer.train()
    drifts = [report.drift for report in session.metrics.reports]
    assert all(drift.delta < 1e-4 for drift in drifts)
    assert all(drift.effective_sample_size == 1.0 for drift in drifts)
    logged = [log for log in trainer.state.log_history if "lockstep/drift_delta" in log]
    assert len(logged) == (2 if len(server.generated) > 2 else 1)


def test_an_adapter_that_trl_put_into_bfloat16_trains_in_float32(make_trainer, server, client):
    """As TRL does over a quantized base. Updates far below a unit in the last place of A reach what is pushed."""
    trainer = make_trainer(learning_rate=1e-5, max_steps=2)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A where it is
            parameter.data = torch.randn_like(parameter) * 0.1
    a = [parameter for name, parameter in trainer.model.named_parameters() if "lora_A" in name]
    before = torch.cat([weight.detach().float().flatten() for weight in a])
    session = attach(trainer, client=client, run_id="r", proof_canary=False)
    trainer.train()
    session.close()
    after = torch.cat([weight.detach().flatten() for weight in a])
    assert after.dtype == torch.float32
    assert ((after - before).abs() > 0).float().mean() > 0.9
    assert session.summary()["max_update_lost"] is None


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_one_logprob_that_is_not_finite_has_ratio_1(make_trainer, server, client, mode):
    """As in a training whose server knows it: the learner's own logprob is the served one."""

    def train(broken: bool):
        server.drawn.manual_seed(0)
        server.restart()
        torch.manual_seed(0)
        trainer = make_trainer(max_steps=2, vllm_importance_sampling_mode=mode)
        session = attach(trainer, client=client, run_id=f"r{broken}", proof_canary=False)
        generate, left = type(server)._generate, [math.nan] if broken else []

        def with_one(request):
            answer = generate(server, request)
            if left and request.policy != "base":
                answer.groups[0].completions[0].logprobs[0] = left.pop()
            return answer

        server._generate = with_one
        trainer.train()
        session.close()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return session.summary(), [(log["loss"], log["grad_norm"]) for log in logs], logs[-1]

    summary, broken, logged = train(True)
    assert summary["unscored_tokens"] == logged["lockstep/unscored_tokens"] == 1
    _, whole, _ = train(False)
    for mine, other in zip(broken, whole, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_a_small_effective_sample_is_warned_of_once(make_trainer, server, client, caplog):
    trainer = make_trainer(max_steps=2)
    session = attach(trainer, client=client, run_id="r", proof_tolerance=100.0)
    generate = server._generate

    def shifted(request):
        answer = generate(request)
        for completion in [each for group in answer.groups for each in group.completions][1:]:
            completion.logprobs = [logprob - 2.0 for logprob in completion.logprobs]
        return answer

    server._generate = shifted
    trainer.train()
    assert caplog.text.count("vllm_importance_sampling_mode=token_truncate") == 1
    assert session.summary()["min_effective_sample_size"] < 0.5
    assert all("lockstep/drift_effective_sample_size" in log for log in trainer.state.log_history if "reward" in log)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"lora": {"lora_dropout": 0.05}}, "set lora_dropout=0"),
        ({"model_init_kwargs": {"attention_dropout": 0.1}}, "attention_dropout"),
        ({"lora": {"lora_dropout": 0.05}, "disable_dropout": True}, None),
        ({}, None),
    ],
    ids=str,
)
def test_dropout_is_warned_of(make_trainer, client, settings, advice):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(make_trainer(**settings), client=client)
    seen = [str(each.message) for each in caught if "random network" in str(each.message)]
    assert len(seen) == (advice is not None)
    assert all(advice in message for message in seen)


@pytest.mark.parametrize("packed", [True, False])
def test_compiling_the_whole_model_is_warned_of_where_passes_are_packed(make_trainer, client, packed):
    trainer = make_trainer()
    trainer.args.torch_compile = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(trainer, client=client, packed_passes=packed)
    assert any("torch_compile compiles packed passes again" in str(each.message) for each in caught) == packed


def test_stale_samples_without_correction_are_refused(make_trainer, client):
    trainer = make_trainer(vllm_importance_sampling_correction=False)
    with pytest.raises(LockstepError, match="vllm_importance_sampling_correction=false"):
        attach(trainer, client=client, max_staleness=1)


def test_generation_batches_reused_over_steps(make_trainer, server, client):
    trainer = make_trainer(steps_per_generation=2, num_iterations=1, max_steps=4)
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    assert [r.policy.step for r in server.generated if r.policy != "base"] == [0, 2]
    assert session.metrics.pushes == 4


def test_evaluation_has_its_own_group_size(make_trainer, server, client):
    rows = Dataset.from_list([{"prompt": "w1 w2"}, {"prompt": "w3 w4"}])
    trainer = make_trainer(
        trainer_kwargs={"eval_dataset": rows},
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        max_steps=1,
        do_eval=True,
    )
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    asked = [r for r in server.generated if r.policy != "base"]
    assert [(r.policy.step, r.sampling.n) for r in asked] == [(0, 4), (1, 2)]
    assert session.rollouts.stats.completions == 8, "evaluation is not counted"
    assert not trainer._metrics["train"]["lockstep/drift_kl"], "nor is its mismatch"
    assert any("eval_reward" in log for log in trainer.state.log_history)


def test_a_push_that_changes_nothing_stops_the_run(make_trainer, server, client):
    trainer = make_trainer()
    attach(trainer, client=client, run_id="r")
    server.ignore_pushes = True  # the first push of a run is used, later ones only acknowledged
    with pytest.raises(LockstepError, match=r"r@0\.1") as caught:
        trainer.train()
    assert caught.value.code is ErrorCode.INSTALL_FAILED


def test_canary_finds_a_wrong_scaling_at_once(make_trainer, server, client):
    trainer = make_trainer()
    attach(trainer, client=client, run_id="r", proof_tolerance=100.0, proof_canary=True)
    server.scale = 2.0
    with pytest.raises(LockstepError, match=r"canary.*factor of"):
        trainer.train()


def test_samples_that_do_not_fit_the_policy_stop_the_run(make_trainer, server, client):
    """Although everything that is scored fits: as from a decoding that uses other weights."""
    trainer = make_trainer()
    attach(trainer, client=client, run_id="r")
    generate = server._generate

    def shifted(request):
        answer = generate(request)
        for completion in [each for group in answer.groups for each in group.completions]:
            completion.logprobs = [logprob - 0.02 * (request.policy != "base") for logprob in completion.logprobs]
        return answer

    server._generate = shifted
    with pytest.raises(LockstepError, match=r"sampled tokens differ from the learner's by 0\.02"):
        trainer.train()


def test_a_server_that_comes_back_is_shown_the_canary(make_trainer, server, client):
    trainer = make_trainer(max_steps=1)
    session = attach(trainer, client=client, run_id="r", proof_canary=True)
    trainer.train()
    server.restart()
    server.scale = 0.5
    with pytest.raises(LockstepError, match=r"canary adapter r\.canary@0\.0 .* by a factor of 0\.[456]"):
        session._catch_up(session.pool.up()[0])
    assert "r.canary" not in server.served


def test_restarted_server_is_brought_up_to_date(make_trainer, server, client):
    trainer = make_trainer(max_steps=2)
    attach(trainer, client=client, run_id="r")
    generate, calls = server._generate, []

    def forget_once(request):
        calls.append(request.policy)
        if len(calls) == 3:
            server.restart()
            raise UnknownRun("no run r")
        return generate(request)

    server._generate = forget_once
    trainer.train()
    assert [v.step for v in server.pushed if v.run_id == "r"] == [0, 1, 1, 2]


def test_same_directory_is_the_same_run_with_the_next_fence(make_trainer, server, client):
    for fence in (0, 1):
        trainer = make_trainer(max_steps=1)
        session = attach(trainer, client=client)
        trainer.train()
        assert session.publisher.lease.fence == fence
    lease = Path(trainer.args.output_dir, "lease.json")
    assert lease.stat().st_mode & 0o777 == 0o600
    assert len({v.run_id for v in server.pushed if not v.run_id.endswith(".canary")}) == 1


def test_refuses_a_trainer_without_adapter_and_one_with_vllm(make_trainer, client):
    trainer = make_trainer()
    trainer.use_vllm = True
    with pytest.raises(LockstepError, match="use_vllm=False"):
        attach(trainer, client=client)
    trainer.use_vllm = False
    trainer.model = trainer.model.unload()
    with pytest.raises(LockstepError, match="full fine-tuning"):
        attach(trainer, client=client)


def test_refuses_sharding_that_it_cannot_read(make_trainer, client, monkeypatch):
    trainer = make_trainer()
    trainer.is_fsdp_enabled = True
    with pytest.raises(LockstepError, match="fsdp_version"):
        attach(trainer, client=client)
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", True)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(LockstepError, match="load_best_model_at_end"):
        attach(trainer, client=client)


def test_reading_ahead_is_refused_where_it_cannot_work(make_trainer, server, client):
    with pytest.raises(LockstepError, match="--slots-per-run 3"):
        attach(make_trainer(), client=client, max_staleness=2)
    with pytest.raises(LockstepError, match="--slots-per-run 5"):
        attach(make_trainer(steps_per_generation=4), client=client, max_staleness=1)
    attach(make_trainer(steps_per_generation=4), client=client, max_staleness=1, in_flight="keep")
    stream = Dataset.from_list([{"prompt": "w1"}] * 8).to_iterable_dataset()
    with pytest.raises(LockstepError, match="stream"):
        attach(make_trainer(trainer_kwargs={"train_dataset": stream}), client=client, max_staleness=1)
    server.state = server.state.model_copy(update={"deterministic": True})
    with pytest.raises(LockstepError, match="eval_on_start: there are no rows"):
        attach(make_trainer(eval_on_start=True), "http://127.0.0.1:9")
    with pytest.raises(LockstepError, match="full_determinism"):
        attach(make_trainer(), client=client, deterministic=True)


def test_a_stream_of_prompts(make_trainer, server, client):
    """It has no length, so its generation batches are counted as one long epoch."""
    stream = Dataset.from_list([{"prompt": f"w{i}"} for i in range(16)]).to_iterable_dataset()
    trainer = make_trainer(trainer_kwargs={"train_dataset": stream}, max_steps=2)
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    assert dict(session.rollouts.stats.staleness) == {0: 16}


def test_rollouts_run_ahead_under_a_real_trainer(make_trainer, server, client):
    """Generation batches of two steps each, two epochs; the second batch was requested when the first was taken."""
    server.state = server.state.model_copy(update={"slots_per_run": 3})
    trainer = make_trainer(steps_per_generation=2, per_device_train_batch_size=8, max_steps=12)
    session = attach(trainer, client=client, run_id="r", max_staleness=1)
    trainer.train()
    staleness = session.rollouts.stats.staleness
    assert set(staleness) == {0, 1}
    assert staleness[1] >= 48
    assert sum(staleness.values()) == 96
    assert session.rollouts.prefetcher.mismatches == 0
    assert session.rollouts.stats.regenerated == 0
    assert session.proof.max_mismatch < 1e-4
    asked = [r for r in server.generated if r.policy == "latest"]
    assert len(asked) == 6
    assert asked[-1].min_step < 10


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_second_training_goes_on_under_the_next_fence(make_trainer, server, client, max_staleness):
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r", max_staleness=max_staleness, proof_canary=True)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    pushed = [(v.fence, v.step) for v in server.pushed if v.run_id == "r"]
    assert pushed == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert sum(v.run_id == "r.canary" for v in server.pushed) == 2, "at the start, and halfway"
    assert any((weights[n] != p).any() for n, p in trainer.model.named_parameters() if n in weights)
    summary = session.summary()
    assert summary["pushes"] == 6
    assert summary["max_logprob_gap"] < 1e-4
    assert json.loads(Path(trainer.args.output_dir, "lease.json").read_text())["fence"] == 1
    assert set(summary["lags"]) <= {str(lag) for lag in range(max_staleness + 1)}


def test_attached_twice(make_trainer, client):
    trainer = make_trainer(max_steps=1)
    session = attach(trainer, client=client, run_id="r")
    with pytest.raises(LockstepError, match="attached already"):
        attach(trainer, client=client, run_id="r")
    trainer.train()
    session.close()
    with pytest.raises(LockstepError, match="attached already"):
        attach(trainer, client=client, run_id="r")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"task": "x.jsonl", "reward_funcs": ["a:b"]}, "task, reward_funcs"),
        ({"task_args": {"a": 1}}, "task_args"),
        ({"eval_dataset": "x"}, "eval_dataset"),
        ({"eval_size": 0}, "eval_size"),
        ({"train_size": 7}, "train_size"),
        ({"prompt_column": "q"}, "prompt_column"),
        ({"tools": ["x:y"]}, "tools"),
        ({"environment": "a:b"}, "environment"),
        ({"init_adapter": "x"}, "init_adapter"),
        ({"lora_kwargs": {"r": 64}}, "lora_kwargs"),
        ({"save_merged": True}, "save_merged"),
    ],
)
def test_options_that_only_the_command_reads_are_refused(make_trainer, client, options, named):
    trainer = make_trainer()
    with pytest.raises(LockstepError, match=f"^{named}: read by `learner train` only"):
        attach(trainer, client=client, run_id="r", **options)


def test_a_script_may_have_read_such_options_itself(make_trainer, client):
    config = LearnerConfig(run_id="r", task="x.jsonl", eval_size=7)
    attach(make_trainer(), client=client, config=config).close()


def test_options_count_beside_a_config(make_trainer, client):
    config = LearnerConfig(rollout_url="http://a:1", run_id="r")
    session = attach(make_trainer(), "http://b:2", config, client=client, proof_every=3)
    options = session.config
    assert (options.rollout_url, options.run_id, options.proof_every) == (["http://b:2"], "r", 3)
    session.close()


def test_what_the_trainer_shows_is_refused_before_servers_are_awaited(make_trainer, monkeypatch):
    def awaited(config):
        raise AssertionError("servers were awaited")

    monkeypatch.setattr("learner.trainer.attach.meet", awaited)
    stream = Dataset.from_list([{"prompt": "w1 w2"}]).to_iterable_dataset()
    trainer = make_trainer(trainer_kwargs={"train_dataset": stream})
    with pytest.raises(LockstepError, match="max_staleness"):
        attach(trainer, "http://127.0.0.1:9", max_staleness=1)
    with pytest.raises(LockstepError, match="full_determinism"):
        attach(make_trainer(), "http://127.0.0.1:9", deterministic=True)


def test_autocast_over_a_base_in_float32(make_trainer, client):
    """TRL's default bf16 while both sides hold float32: trained with a warning, not refused as another base."""
    trainer = make_trainer(bf16=True, max_steps=1)
    with pytest.warns(UserWarning, match="bf16=true: the learner computes in bfloat16 .* set bf16=false"):
        session = attach(trainer, client=client, run_id="r")
    trainer.train()
    assert session.proof.compute_dtype == "bfloat16"
    assert session.summary()["steps"] == 1


def test_errors_of_the_training_are_not_hidden_by_those_of_its_end(caplog):
    def fails():
        raise OSError("the disk is full")

    with pytest.raises(ValueError, match="the cause"), finally_do(fails, "closing"):
        raise ValueError("the cause")
    assert "closing failed as well: the disk is full" in caplog.text
    with pytest.raises(OSError, match="full"), finally_do(fails, "closing"):
        pass


def test_a_run_ends_when_its_training_does(make_trainer, server, client):
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r", keep_run=60)
    trainer.train()
    ended = server.finished["r"]
    assert (ended.version, ended.keep_seconds) == (session.publisher.last.version, 60)
    trainer.args.max_steps = 4
    trainer.train()  # a run in training again, until its end
    assert server.finished["r"].version == session.publisher.last.version
    assert session.publisher.last.version.fence == ended.version.fence + 1
    session.close()


def test_an_evaluation_after_the_training(make_trainer, server, client):
    """The run has given way meanwhile; it comes back for the evaluation, and is not left in training."""
    trainer = make_trainer(eval_strategy="no")
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    server.served.pop("r")
    server.finished.clear()
    trainer.evaluate(trainer.train_dataset)
    assert server.served["r"][0] == session.publisher.last.version
    assert server.finished["r"].version == session.publisher.last.version
    session.close()


def test_a_training_that_stops_early_keeps_its_place(make_trainer, server, client):
    """It may be resumed. Whoever knows better says so."""
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r")

    def stop(report):
        trainer.control.should_training_stop = True

    session.metrics.listeners.append(stop)
    trainer.train()
    session.close()
    assert trainer.state.global_step == 1
    assert not server.finished
    session.finish()
    assert server.finished["r"].version.step == 1


def test_a_server_that_does_not_hear_of_the_end_is_named(make_trainer, server, client, caplog):
    trainer = make_trainer()
    session = attach(trainer, client=client, run_id="r")
    trainer.train()
    server.served["r"] = (server.served["r"][0].model_copy(update={"fence": 9}), "")
    session.finish()
    assert "keeps its place" in caplog.messages[-1]
    assert "learner runs --rollout-url http://fake --end r --takeover" in caplog.messages[-1]
    server.restart()
    caplog.clear()
    session.finish()
    assert not caplog.messages, "a server that has restarted keeps no place"


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (NoFreeRun("no room"), "no room; end one (`learner runs --rollout-url http://fake --end RUN_ID`)"),
        (LeaseMismatch("another learner holds run r"), "give another run_id"),
    ],
)
@pytest.mark.parametrize("flags", [False, True])
def test_remedies_are_in_the_words_of_who_reads_them(make_trainer, server, client, monkeypatch, refusal, words, flags):
    def push(run_id, request):
        raise refusal

    monkeypatch.setattr("learner.utils.wording._on_command_line", flags)
    monkeypatch.setattr(server, "_push", push)
    server.state = server.state.model_copy(update={"max_runs": 1})
    trainer = make_trainer()
    attach(trainer, client=client, proof_canary=False)
    with pytest.raises(type(refusal)) as refused:
        trainer.train()
    assert (words.replace("run_id", "--run_id") if flags else words) in str(refused.value)
    assert ("--takeover true" if flags else "takeover=True") in str(refused.value)
