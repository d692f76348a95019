"""One training of a race, in a process of its own: accuracy on held-out questions over seconds and samples.

python -m bench.race.learner TRAINING.json ANSWER.json GO

It is ready to begin before it is its turn, which is when the file GO is there: imports are not what is raced.

A training has, by `TrainingsBench`: words (options of `learner train`), eval_every, eval_size, and peer (a row that is
of TRL's own trainers with a server at rollout_url, and nothing of ours).

The clock runs from the first step on: all servers hold the initial weights by then. It shows the moment at which the
server has the weights that a step has made. For evaluations it stands still. Those of TRL's server mode are made at
once, after its sync: its server generates nothing then. Ours and those of its asynchronous trainer are made after the
training, from copies of the adapter that are brought to the server again: in between, rollouts that run ahead would be
generated in time that is not counted. The asynchronous trainer has its first batch before its first step begins: its
clock runs from the moment at which it begins to generate.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import queue
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, get_peft_config
from trl.trainer.utils import RepeatSampler

from bench.common.models import trained, wait_for
from bench.contenders import trl_asynchronous
from bench.contenders.lockstep import known_of, rollouts, steps_of
from bench.contenders.vllm_adapter_files import FilePath
from bench.step.figures import ASYNCHRONOUS, TRL, Step, figures
from bench.step.learner import AsynchronousWatch, TrlWatch
from learner.commands.options import OptionParser
from learner.evaluation.evaluate import evaluate
from learner.servers.client import RolloutClient
from learner.tasks import load_task
from learner.utils.atomic import write_atomically
from shared.rollouts import Completion, GenerateRequest, GenerateResponse, Prompt, RolloutGroup
from shared.sampling import SamplingParams


class CompletionsClient:
    """Asks `/v1/completions`, which vLLM and our server have, as `evaluate` asks our client."""

    def __init__(self, url: str, model: str, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.http = httpx.Client(base_url=url, timeout=300.0)

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Return a completion for each prompt, a chat or a text, of the ids that TRL makes of it."""
        ids = [self._ids(prompt) for prompt in request.prompts]
        sampling = {"temperature": request.sampling.temperature, "max_tokens": request.sampling.max_tokens}
        body = {"model": self.model, "prompt": ids, "return_token_ids": True, **sampling}
        answer = self.http.post("/v1/completions", json=body)
        if answer.is_error:
            raise RuntimeError(f"/v1/completions answered {answer.status_code}: {answer.text[:300]}")
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(ids):
            raise RuntimeError(f"/v1/completions gave {len(choices)} completions for {len(ids)} prompts")
        groups = [
            RolloutGroup(prompt_index=i, prompt_token_ids=prompt, completions=[_completion(choice)])
            for i, (prompt, choice) in enumerate(zip(ids, choices, strict=True))
        ]
        return GenerateResponse(epoch="", groups=groups)

    def _ids(self, prompt: Prompt) -> list[int]:
        if prompt.text is not None:
            return list(self.tokenizer(text=prompt.text)["input_ids"])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return list(self.tokenizer.apply_chat_template(prompt.messages, **options))


def _completion(choice: dict[str, Any]) -> Completion:
    reason = choice["finish_reason"]
    return Completion(token_ids=choice["token_ids"], logprobs=[], finish_reason=reason, spans=[], text=choice["text"])


class Race:
    """A training with its task and its clock.

    Attributes:
        points: evaluations so far.
    """

    def __init__(self, training: Namespace, go: Path) -> None:
        self.training = training
        self.config, args, model_args = OptionParser().parse(training.words)
        self.task = load_task(
            self.config.require_task(),
            task_args=cast(dict[str, Any], self.config.task_args),
            eval_size=self.config.eval_size,
            train_size=self.config.train_size,
            seed=args.seed,
        )
        if training.peer == ASYNCHRONOUS:
            importlib.import_module("trl.experimental.async_grpo")  # with vLLM, which takes seconds
        gc.freeze()  # as in `learner train`: a full collection would walk over the imports, half a second of a step
        while not go.exists():
            time.sleep(0.05)
        args.model_init_kwargs = {"dtype": model_args.dtype}
        self.clock, self.points = Clock(), list[dict[str, float]]()
        make = self._asynchronous if training.peer == ASYNCHRONOUS else self._trainer
        self.trainer = make(str(model_args.model_name_or_path), args, get_peft_config(model_args))

    def _trainer(self, model: str, args: GRPOConfig, peft_config: Any) -> Any:
        return GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=list(self.task.reward_funcs),
            train_dataset=self.task.train,
            peft_config=peft_config,
            callbacks=[self.clock],
        )

    def _asynchronous(self, model: str, args: GRPOConfig, peft_config: Any) -> Any:
        own = {"max_staleness": self.config.max_staleness, "vllm_server_base_url": self.url}
        return trl_asynchronous.make_trainer(
            model,
            lambda kind: shared_options(args, kind, **own),
            tokenizer=AutoTokenizer.from_pretrained(model),
            dataset=self.task.train.select(prompt_order(args, self.task.train)),
            reward_funcs=list(self.task.reward_funcs),
            peft_config=peft_config,
            callback=self.clock,
        )

    @property
    def url(self) -> str:
        """Of the server."""
        return (self.config.rollout_url or [""])[0]

    @property
    def samples_per_step(self) -> int:
        """Completions that a step is made of."""
        args = self.trainer.args
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps)

    def is_due(self, step: int) -> bool:
        """Whether the policy is evaluated after this step."""
        return step % self.training.eval_every == 0 or step == self.trainer.args.max_steps

    def ask(self, model: str, step: int, seconds: float) -> None:
        """Evaluate what the server has now."""
        tokenizer = getattr(self.trainer, "_tokenizer", self.trainer.processing_class)
        client = CompletionsClient(self.url, model, tokenizer)
        greedy = SamplingParams(temperature=0.0, max_tokens=self.trainer.args.max_completion_length)
        result = evaluate(cast(RolloutClient, client), self.task, n_questions=self.training.eval_size, sampling=greedy)
        samples = step * self.samples_per_step
        self.points.append({"step": step, "samples": samples, "seconds": seconds, "accuracy": result.reward})


class Clock(TrainerCallback):
    """Runs from the first step on, except while it is stopped. Comes before all other callbacks."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._stopped_s = 0.0

    def now(self) -> float:
        """Return the seconds of the race."""
        return 0.0 if self._started is None else time.perf_counter() - self._started - self._stopped_s

    def stopped(self, action: Callable[[], None]) -> float:
        """Act while the clock stands still; return the seconds that this has taken."""
        began = time.perf_counter()
        action()
        seconds = time.perf_counter() - began
        self._stopped_s += seconds if self._started is not None else 0.0
        return seconds

    def start(self) -> None:
        """Run from now on, if it does not run yet."""
        if self._started is None:
            self._started = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for(args.device)  # else what follows would be charged with the last backward pass


class Copies(TrainerCallback):
    """Keeps the adapters to evaluate, with the seconds at which the server had them. Comes after the push."""

    def __init__(self, race: Race, parameters: list[torch.nn.Parameter]) -> None:
        self.race, self.parameters = race, parameters
        self.kept: list[tuple[int, float, list[torch.Tensor]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._keep(0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.race.is_due(state.global_step):
            self._keep(state.global_step, self.race.clock.now())

    def _keep(self, step: int, seconds: float) -> None:
        self.kept.append((step, seconds, [parameter.detach().clone() for parameter in self.parameters]))

    @torch.no_grad()
    def restore(self, copies: list[torch.Tensor]) -> None:
        """Put a kept adapter back."""
        for parameter, copy in zip(self.parameters, copies, strict=True):
            parameter.copy_(copy)


class PeerWatch(TrlWatch):
    """Evaluates TRL's server after its syncs; times its steps without that."""

    def __init__(self, race: Race) -> None:
        trainer = race.trainer
        super().__init__(trainer.vllm_generation)
        self.race, sync = race, trainer.vllm_generation.sync_weights

        def sync_and_evaluate() -> None:
            with torch.no_grad():
                sync()
            step, seconds = trainer.state.global_step, race.clock.now()
            if race.is_due(step):
                self._started += race.clock.stopped(lambda: race.ask("base", step, seconds))
            trainer._last_loaded_step = step

        trainer.vllm_generation.sync_weights = sync_and_evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # NCCL joins in the first sync, before the clock runs, as our first push comes before it.
        self.race.trainer.vllm_generation.sync_weights()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._started, self._wait_s, self._sync_s = time.perf_counter(), 0.0, 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.race.trainer.vllm_generation.sync_weights()


class AsynchronousCopies(Copies):
    """Those of TRL's asynchronous trainer, which waits for its first batch before its first step begins.

    Comes after the trainer's own callbacks, which bring weights to the server and begin to generate.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.race.trainer._metrics["train"].clear()  # the first sync, which is of no step
        self.race.clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the worker, which waits until its last samples are read: the trainer would kill it after 15 s."""
        worker, late = self.race.trainer.rollout_worker, time.monotonic() + 15.0
        worker._stop_event_mp.set()
        while worker._process.is_alive() and time.monotonic() < late:
            for samples in (worker.rollout_buffer, worker.metrics_queue):
                with contextlib.suppress(queue.Empty):
                    while True:
                        samples.get(timeout=0.05)


def train_ours(race: Race) -> dict[str, Any]:
    """Train with rollouts of our server, and evaluate afterwards; return what is known of the steps."""
    trainer, config = race.trainer, race.config
    with rollouts(trainer, config=config) as session:
        copies = Copies(race, trained(session.model))
        trainer.add_callback(copies)
        trainer.train()
        steps, known = [Step(*one) for one in steps_of(session)], known_of(session)
        # Without reading ahead the server generates only while the trainer waits.
        steps = [replace(step, idle=step.seconds - step.wait) if step.idle is None else step for step in steps]
        session.publisher.next_fence()  # what is pushed now comes after the training
        for step, seconds, adapter in copies.kept:
            copies.restore(adapter)
            session.publisher.push(step)
            race.ask(f"policy:{session.run_id}", step, seconds)
    return figures(steps) | known


def train_peer(race: Race) -> dict[str, Any]:
    """Train with TRL's server mode; return what is known of the steps."""
    watch = PeerWatch(race)
    race.trainer.add_callback(watch)
    race.trainer.train()
    return figures(watch.steps)


def train_asynchronous(race: Race) -> dict[str, Any]:
    """Train with TRL's asynchronous trainer, and evaluate afterwards; return what is known of the steps."""
    trainer, watch = race.trainer, AsynchronousWatch()
    copies = AsynchronousCopies(race, trained(trainer.model))
    trainer.add_callback(copies)
    trainer.add_callback(watch)
    trainer.train()
    unload_adapters(race.url)
    with tempfile.TemporaryDirectory(dir=trainer.args.output_dir) as folder:
        path = FilePath(race.url, trainer.model, Path(folder).absolute(), in_place=False)
        for step, seconds, adapter in copies.kept:
            copies.restore(adapter)
            path.push(step)
            race.ask(str(path.name), step, seconds)
            path.settle()
        path.close()
    return figures(watch.steps) | watch.known


def shared_options(args: GRPOConfig, kind: type[Any], **own: Any) -> Any:
    """Return options of `kind`: those of `args` that it has, too, and its own."""
    # accelerator_config holds what a class has made of it.
    names = [field.name for field in fields(kind) if field.init and field.name != "accelerator_config"]
    shared = {name: getattr(args, name) for name in names if hasattr(args, name)}
    # Steps then have as many completions as the others'.
    return kind(**shared | {"token_budget": 0, **own})


def prompt_order(args: GRPOConfig, dataset: Dataset) -> list[int]:
    """Return the rows of a dataset in the order in which `GRPOTrainer` takes them first."""
    size = int(args.generation_batch_size or 0) // args.num_generations
    return list(RepeatSampler(dataset, 1, batch_size=size, shuffle=args.shuffle_dataset, seed=args.seed))


def unload_adapters(url: str) -> None:
    """Let vLLM forget all adapters."""
    with httpx.Client(base_url=url, timeout=300.0) as http:
        for model in http.get("/v1/models").raise_for_status().json()["data"]:
            if model.get("parent"):
                http.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]}).raise_for_status()


def run(training: Namespace, go: Path) -> dict[str, Any]:
    """Train once the file `go` is there; return the row."""
    race = Race(training, go)
    known = {TRL: train_peer, ASYNCHRONOUS: train_asynchronous}.get(training.peer, train_ours)(race)
    if torch.cuda.is_available():
        known["learner_gib"] = torch.cuda.max_memory_reserved() / 2**30
    rewards = [entry["reward"] for entry in race.trainer.state.log_history if "reward" in entry]
    return {"points": race.points, "rewards": rewards, **known}


if __name__ == "__main__":
    asked, answered, turn = map(Path, sys.argv[1:])
    answer = run(Namespace(**json.loads(asked.read_text())), turn)
    write_atomically(answered, json.dumps(answer))
