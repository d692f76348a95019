"""One training of bench.race: its clock, the adapters that it keeps, and how policies are evaluated."""

from __future__ import annotations

import json
import queue
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from bench.race.learner import (
    AsynchronousCopies,
    Clock,
    CompletionsClient,
    Copies,
    PeerWatch,
    Race,
    prompt_order,
    shared_options,
    unload_adapters,
)
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams


def test_the_clock_runs_from_the_first_step_and_stands_still_when_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("bench.race.learner.time.perf_counter", lambda: now[0])

    def pass_time() -> None:
        now[0] += 5.0

    clock = Clock()
    clock.stopped(pass_time)
    assert clock.now() == 0.0
    clock.on_step_begin(None, None, None)
    now[0] += 2.0
    assert clock.stopped(pass_time) == 5.0
    now[0] += 1.0
    clock.on_step_begin(None, None, None)
    assert clock.now() == 3.0


class RacedSteps(Race):
    """A race of 3 steps of 32 samples without a model, evaluated after every second one."""

    def __init__(self, generation: Any = None) -> None:
        args = Namespace(max_steps=3, per_device_train_batch_size=16, gradient_accumulation_steps=2)
        self.training, self.clock, self.points = Namespace(eval_every=2, eval_size=8), Clock(), []
        state = Namespace(global_step=0)
        self.trainer: Any = Namespace(args=args, state=state, vllm_generation=generation, _last_loaded_step=-1)
        self.asked: list[tuple[str, int]] = []

    def ask(self, model: str, step: int, seconds: float) -> None:
        self.asked.append((model, step))
        self.points.append({"step": step, "samples": step * self.samples_per_step, "seconds": seconds, "accuracy": 0.5})


def test_a_policy_is_evaluated_at_the_beginning_at_the_end_and_in_between() -> None:
    race = RacedSteps()
    assert [step for step in range(4) if race.is_due(step)] == [0, 2, 3]
    assert race.samples_per_step == 32


def test_the_peer_is_evaluated_after_its_syncs_and_brings_no_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    for module in ("bench.race.learner", "bench.step.learner", "bench.common.report"):
        monkeypatch.setattr(f"{module}.time.perf_counter", lambda: now[0])
    syncs = []

    class Generation:
        def generate(self) -> tuple[None, list[list[int]]]:
            now[0] += 2.0
            return None, [[1, 2, 3]]

        def sync_weights(self) -> None:
            now[0] += 1.0
            syncs.append(trainer.state.global_step)

        def _iter_named_params(self) -> None: ...

    race = RacedSteps(Generation())
    trainer, ask = race.trainer, race.ask

    def ask_slowly(*asked: Any) -> None:
        now[0] += 50.0
        ask(*asked)

    monkeypatch.setattr(race, "ask", ask_slowly)
    watch = PeerWatch(race)
    watch.on_train_begin(None, trainer.state, None)
    for _ in range(3):
        race.clock.on_step_begin(None, trainer.state, None)
        watch.on_step_begin(None, trainer.state, None)
        if trainer._last_loaded_step != trainer.state.global_step:  # as TRL does
            trainer.vllm_generation.sync_weights()
        trainer.vllm_generation.generate()
        now[0] += 3.0
        trainer.state.global_step += 1
        watch.on_step_end(None, trainer.state, None)
    watch.on_train_end(None, trainer.state, None)
    assert syncs == [0, 1, 2, 3]
    assert race.asked == [("base", 0), ("base", 2), ("base", 3)]
    # Three steps of 5 s, and three syncs; the first one came before.
    assert [(point["step"], point["seconds"]) for point in race.points] == [(0, 0.0), (2, 12.0), (3, 18.0)]
    assert [step.seconds for step in watch.steps] == [5.0, 6.0, 6.0]
    assert [step.sync for step in watch.steps] == [0.0, 1.0, 1.0]
    assert [step.wait for step in watch.steps] == [2.0, 2.0, 2.0]


def test_adapters_are_kept_as_they_were_and_put_back() -> None:
    race, weight = RacedSteps(), torch.nn.Parameter(torch.zeros(2))
    copies = Copies(race, [weight])
    for step in range(1, 4):
        race.trainer.state.global_step = step - 1
        copies.on_step_begin(None, race.trainer.state, None)
        with torch.no_grad():
            weight += 1.0
        race.trainer.state.global_step = step
        copies.on_step_end(None, race.trainer.state, None)
    assert [step for step, *_ in copies.kept] == [0, 2, 3]
    copies.restore(copies.kept[1][2])
    assert weight.tolist() == [2.0, 2.0]
    assert weight.requires_grad


def test_the_asynchronous_trainers_clock_runs_from_the_end_of_its_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its first batch before its first step begins, and brings a step's weights before our callback."""
    now = [100.0]
    monkeypatch.setattr("bench.race.learner.time.perf_counter", lambda: now[0])
    race, ended = RacedSteps(), list[str]()
    race.trainer._metrics = {"train": {"perf/weight_sync_s": [1.0]}}
    samples: queue.Queue[int] = queue.Queue()
    samples.put(1)
    race.trainer.rollout_worker = Namespace(
        rollout_buffer=samples,
        metrics_queue=queue.Queue(),
        _stop_event_mp=Namespace(set=lambda: ended.append("worker")),
        _process=Namespace(is_alive=lambda: not samples.empty()),  # until they are read
    )
    copies = AsynchronousCopies(race, [torch.nn.Parameter(torch.zeros(2))])
    copies.on_train_begin(None, race.trainer.state, None)
    for step in range(3):
        now[0] += 2.0
        race.clock.on_step_begin(None, race.trainer.state, None)
        copies.on_step_begin(None, race.trainer.state, None)
        now[0] += 3.0
        race.trainer.state.global_step = step + 1
        copies.on_step_end(None, race.trainer.state, None)
    copies.on_train_end(None, race.trainer.state, None)
    assert [kept[:2] for kept in copies.kept] == [(0, 0.0), (2, 10.0), (3, 15.0)]
    assert race.trainer._metrics == {"train": {}}
    assert ended == ["worker"]


def test_options_that_both_trainers_have_are_those_of_the_recipe() -> None:
    @dataclass
    class Options:
        learning_rate: float = 1e-6
        accelerator_config: Any = None
        token_budget: int | None = None
        max_staleness: int = 4
        queue_maxsize: int = 1024

    args: Any = Namespace(learning_rate=2e-4, beta=0.1, accelerator_config="of another class")
    assert shared_options(args, Options, max_staleness=2) == Options(2e-4, None, 0, 2, 1024)


def test_the_asynchronous_trainer_gets_prompts_in_the_order_of_the_others() -> None:
    from trl.trainer.utils import RepeatSampler

    dataset: Any = range(10)
    args: Any = Namespace(generation_batch_size=12, num_generations=4, shuffle_dataset=True, seed=7)
    # As GRPOTrainer makes it: three prompts a batch, every one four times.
    sampled = list(RepeatSampler(dataset, 4, batch_size=3, repeat_count=1, shuffle=True, seed=7))
    assert prompt_order(args, dataset) == sampled[::4]
    assert len(set(sampled)) == 9


def test_a_server_forgets_the_adapters_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    unloaded = []

    def answered(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            unloaded.append(json.loads(request.content))
            return httpx.Response(200)
        models = [{"id": "base", "parent": None}, {"id": "trl-policy-v2", "parent": "base"}]
        return httpx.Response(200, json={"data": models})

    client = httpx.Client
    transport = httpx.MockTransport(answered)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(**options, transport=transport))
    unload_adapters("http://server")
    assert unloaded == [{"lora_name": "trl-policy-v2"}]


def test_a_held_out_question_is_asked_as_a_trainer_asks_it() -> None:
    asked = []

    class Tokenizer:
        def apply_chat_template(self, chat: list[Any], **options: Any) -> list[int]:
            assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
            return [len(chat[0]["content"])]

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [-len(text)]}

    def complete(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        choices = [{"index": i, "token_ids": [7, i], "text": str(i), "finish_reason": "stop"} for i in (1, 0)]
        return httpx.Response(200, json={"choices": choices})

    client = CompletionsClient("http://server", "policy:run", Tokenizer())
    client.http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(complete))
    prompts = [Prompt(messages=[{"role": "user", "content": "xxx"}]), Prompt(text="xxxx")]
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    groups = client.generate(GenerateRequest(prompts=prompts, sampling=greedy)).groups
    assert [group.completions[0].text for group in groups] == ["0", "1"]
    expected = {"model": "policy:run", "prompt": [[3], [-4]], "temperature": 0.0, "max_tokens": 12}
    assert asked == [{**expected, "return_token_ids": True}]
