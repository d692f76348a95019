"""Signals, and servers that stay away: a checkpoint is saved, and the training goes on from it to the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from learner.rewards.calls import RewardError
from learner.run_dir.checkpoint import last_checkpoint
from learner.trainer import leaving
from learner.trainer.attach import attach
from learner.trainer.leaving import _Leave
from learner.utils.processes import Stopped, each_signal, raise_stopped
from shared.errors import NotFinite, NotReady


@pytest.fixture
def attached(make_trainer, server, client, tmp_path):
    """Builds a training of 5 steps in `name`; `at(step, act)` is called before the push of that step."""
    server.state = server.state.model_copy(update={"deterministic": True})
    sessions = []

    def make(name="run", at=None, **config):
        rows = Dataset.from_list([{"prompt": f"w{i} w{i + 7}"} for i in range(10)])
        trainer = make_trainer(
            trainer_kwargs={"train_dataset": rows, "eval_dataset": rows.select(range(4))},
            output_dir=str(tmp_path / name),
            seed=5,
            full_determinism=True,
            lora={"lora_dropout": 0.1},
            **{"max_steps": 5, **config},
        )
        options = {} if config.get("max_staleness") else {"deterministic": True}
        session = attach(trainer, client=client, **options)
        sessions.append(session)
        push = session.after_step

        def act_and_push():
            if at and trainer.state.global_step == at[0]:
                at[1]()
            return push()

        session.after_step = act_and_push
        return trainer, session

    yield make
    for session in sessions:  # those of a training that has failed would go on serving their runs
        session.close()


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "config"), [(signal.SIGUSR1, {}), (signal.SIGTERM, {"steps_per_generation": 2, "num_iterations": 2})]
)
def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(attached, tmp_path, capfd, number, config):
    whole, _ = attached("whole", **config)
    whole.train()
    before = signal.getsignal(number)
    cut, session = attached("cut", at=(2, lambda: os.kill(os.getpid(), number)), **config)
    cut.train()
    assert cut.state.global_step == 2
    assert session.interrupted == number.name
    card = (tmp_path / "cut" / "README.md").read_text()
    assert "fine-tuned version of `" in card
    assert "[None]" not in card
    assert signal.getsignal(number) == before
    assert f"{number.name}: the training ends after step" in capfd.readouterr().err
    resumed, _ = attached("cut", **config)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "cut")))
    end = weights(whole)
    assert all(torch.equal(end[name], tensor) for name, tensor in weights(resumed).items())


def test_ctrl_c_saves_the_step_and_does_not_let_a_script_go_on(attached, tmp_path, capfd):
    trainer, session = attached(at=(2, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match=r"step 2 of 5 is saved in .*checkpoint-2: resume from it"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert "SIGINT: the training ends after step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    session.close()
    again, _ = attached(at=(5, lambda: signal.raise_signal(signal.SIGINT)))
    again.train()  # in the last step there is nothing to leave
    assert again.state.global_step == 5


def test_a_second_ctrl_c_ends_the_training_at_once(attached, tmp_path, monkeypatch):
    monkeypatch.setattr(leaving, "_ONE_REQUEST_S", 0.0)

    def impatient():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer, _ = attached(at=(2, impatient))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trainer.train()
    assert last_checkpoint(tmp_path / "run") is None


def test_with_rollouts_ahead(make_trainer, client):
    trainer = make_trainer(max_steps=6)
    session = attach(trainer, client=client, max_staleness=1)
    session.metrics.listeners.append(lambda report: terminate() if report.step == 2 else None)
    trainer.train()
    assert last_checkpoint(trainer.args.output_dir).name == f"checkpoint-{trainer.state.global_step}"
    assert trainer.state.global_step in (2, 3)


def test_during_an_evaluation_it_is_saved_after_it(attached, tmp_path):
    trainer, _ = attached(eval_strategy="steps", eval_steps=2, eval_on_start=False)
    evaluation = trainer.evaluation_loop

    def terminated_evaluation(*args, **kwargs):
        terminate()
        return evaluation(*args, **kwargs)

    trainer.evaluation_loop = terminated_evaluation
    trainer.train()
    assert trainer.state.global_step == 2
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_during_the_last_step_the_training_just_ends(attached, tmp_path):
    trainer, _ = attached(at=(5, terminate))
    trainer.train()
    assert trainer.state.global_step == 5
    assert last_checkpoint(tmp_path / "run") is None  # save_strategy is no


def test_before_the_first_step_there_is_nothing_to_finish(attached):
    trainer, session = attached()
    session.begin = terminate
    with each_signal(raise_stopped, signal.SIGTERM), pytest.raises(Stopped, match="SIGTERM"):
        trainer.train()


def test_a_handler_of_the_program_stays(attached):
    seen = []
    with each_signal(lambda number, frame: seen.append(number), signal.SIGTERM):
        trainer, _ = attached(at=(2, terminate))
        trainer.train()
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 5


def test_a_second_signal_ends_the_process_at_once():
    def listen(said):
        accelerator, state = SimpleNamespace(is_main_process=True), SimpleNamespace(global_step=1)
        trainer = SimpleNamespace(accelerator=accelerator, state=state, _step=1)
        leave = _Leave(trainer, SimpleNamespace(interrupted=None, pool=SimpleNamespace(leaving=None)))
        with leave.listening():
            leave.on_step_begin(None, None, None)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            said.send("goes on")  # two at once are one request
            leaving._ONE_REQUEST_S = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            said.send("still here")

    # Forked: an interpreter of its own would import TRL for ten seconds.
    forks = multiprocessing.get_context("fork")
    heard, said = forks.Pipe(duplex=False)
    process = forks.Process(target=listen, args=(said,))
    process.start()
    said.close()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    assert heard.recv() == "goes on"
    with pytest.raises(EOFError):
        heard.recv()


def test_servers_that_stay_away_leave_a_checkpoint(attached, tmp_path):
    whole, _ = attached("whole")
    whole.train()

    def away():
        raise NotReady("no rollout server is up")

    cut, _ = attached("cut", at=(3, away))
    with pytest.raises(NotReady, match=r"is up; the last checkpoint is .*checkpoint-3: resume from it"):
        cut.train()
    resumed, _ = attached("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    end = weights(whole)
    assert all(torch.equal(end[name], tensor) for name, tensor in weights(resumed).items())


def test_rollouts_that_do_not_come_leave_a_checkpoint_of_the_last_step(attached, tmp_path):
    whole, _ = attached("whole")
    whole.train()
    cut, session = attached("cut")
    generate = session.rollouts.dispatcher.dispatch

    def dispatch(*args, **kwargs):
        if cut.state.global_step == 2:
            raise NotReady("no rollout server is up")
        return generate(*args, **kwargs)

    session.rollouts.dispatcher.dispatch = dispatch
    with pytest.raises(NotReady, match="checkpoint-2"):
        cut.train()
    resumed, _ = attached("cut")
    resumed.train(resume_from_checkpoint=True)
    end = weights(whole)
    assert all(torch.equal(end[name], tensor) for name, tensor in weights(resumed).items())


@pytest.mark.parametrize("during", ["a step", "a step after an evaluation", "an evaluation"])
def test_a_reward_that_fails_leaves_a_checkpoint_of_the_last_step(attached, tmp_path, during):
    options = {} if during == "a step" else {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    whole, _ = attached("whole", **options)
    whole.train()
    cut, _ = attached("cut", **options)
    (reward,) = cut.reward_funcs

    def failing(**arguments):
        if cut.state.global_step == 3 and cut.model.training == (during != "an evaluation"):
            raise RewardError("the service is gone")
        return reward(**arguments)

    cut.reward_funcs = [failing]
    with pytest.raises(RewardError, match=r"is gone; the last checkpoint is .*checkpoint-3: resume from it"):
        cut.train()
    resumed, _ = attached("cut", **options)
    resumed.train(resume_from_checkpoint=True)
    end = weights(whole)
    assert all(torch.equal(end[name], tensor) for name, tensor in weights(resumed).items())
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


def test_what_waiting_does_not_mend_is_not_saved(attached, tmp_path):
    def broken():
        raise NotFinite("the adapter holds NaN")

    trainer, _ = attached(at=(3, broken))
    with pytest.raises(NotFinite):
        trainer.train()
    assert last_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("others", [[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
def test_a_signal_to_any_rank_ends_all_of_them(others):
    """Rank 1 of 3, to which none has come: how many signals, and how many Ctrl-C, have come to the others."""

    def reduce(came, reduction):
        assert came.tolist() == [0.0, 0.0]
        return came + torch.tensor(others)

    accelerator = SimpleNamespace(num_processes=3, device="cpu", reduce=reduce, is_main_process=False)
    session = SimpleNamespace(interrupted=None)
    state = SimpleNamespace(global_step=2, max_steps=3)
    args = SimpleNamespace(output_dir="run")
    leave = _Leave(SimpleNamespace(accelerator=accelerator, state=state, args=args), session)
    assert leave._all_leave() is any(others)
    assert bool(session.interrupted) is any(others)
    with pytest.raises(KeyboardInterrupt) if others[1] else nullcontext():
        leave.interrupt()


def test_a_signal_does_not_put_the_best_weights_into_the_last_step(attached, tmp_path):
    best = {
        "save_strategy": "best",
        "metric_for_best_model": "best",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
    }
    cut, session = attached("cut", at=(3, terminate), **best)
    evaluate = cut.evaluate
    cut.evaluate = lambda *_, **__: evaluate() | {"eval_best": cut.state.global_step}
    cut.train()
    assert (cut.state.global_step, cut.state.best_global_step) == (3, 1)
    one, three = (load_file(tmp_path / "cut" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 3))
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert session.publisher.last.version.step == 3
