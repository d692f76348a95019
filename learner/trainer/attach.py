"""Remote rollouts under a `trl.GRPOTrainer`.

TRL's internals are touched here and in `batches`, `resume`, `rewards`, `wrappers`; `trl_internals` says which they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from trl import GRPOTrainer

from learner.adapters.exporter import active_adapter, lora_layers
from learner.adapters.lora_rules import check_lora, check_model, check_rank, check_targets
from learner.adapters.peft_dir import save_adapter
from learner.adapters.quantization import pin_compute_dtype
from learner.config import LearnerConfig
from learner.monitors.recorder import attach_recorder
from learner.rollouts.schedule import Schedule
from learner.servers.client import RolloutClient
from learner.servers.compatibility import check_base, check_lengths, check_server
from learner.servers.credentials import read_token
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.session import Session
from learner.sync.gpu_sharing import check_shared_gpu
from learner.trainer.checks import check_grpo, check_replaceable, correction_warnings
from learner.trainer.hooks import begin_passes_with, mark_tool_turns, replace_degenerate, skip_padding, watch_mismatch
from learner.trainer.internals import check_trl
from learner.trainer.prompt_order import ComingPrompts, check_slots, schedule_of
from learner.trainer.resume import ExactResume
from learner.trainer.reward_hooks import score_in_workers
from learner.trainer.sample_hook import read_samples
from learner.trainer.sampling import sampling_params
from learner.trainer.unsloth import with_vllm_params
from shared.errors import InvalidRequest
from shared.fingerprint import fingerprint_checkpoint
from shared.weights import ServerState

PROMPTS_MEASURED = 512
NEUTRAL_TEXT = "The quick brown fox jumps over the lazy dog because 12 + 30 = 42."


def attach(
    trainer: GRPOTrainer,
    url: str | Sequence[str] | None = None,
    config: LearnerConfig | None = None,
    *,
    client: RolloutClient | None = None,
    pool: ServerPool | None = None,
    revision: str | None = None,
    vllm_sampling_params: Any = None,
    **options: Any,
) -> Session:
    """Let `trainer` sample from the rollout servers at `url` and push its adapter to them after every optimizer step.

    Args:
        trainer: a GRPOTrainer with a LoRA adapter, built with `use_vllm=False`, before `train()`.
        url: of one or several rollout servers; `config.rollout_url` by default.
        config, options: `LearnerConfig`, or its fields as keyword arguments.
        client: of one rollout server, instead of `url`.
        pool: servers that were already met; otherwise waits until one is ready.
        revision: of the base model, where it was loaded from the hub.
        vllm_sampling_params: as in Unsloth, see `learner.trainer.unsloth`; by default the attribute of that name of the
            trainer's arguments, if they have it.

    Raises:
        LockstepError: every refusal of `learner.trainer.checks`, before anything is changed.
    """
    config = config or LearnerConfig(rollout_url=[url] if isinstance(url, str) else list(url or ()) or None, **options)
    check_trl(trainer)
    model = _peft_model(trainer)
    if vllm_sampling_params is None:
        vllm_sampling_params = getattr(trainer.args, "vllm_sampling_params", None)
    args = with_vllm_params(trainer.args, vllm_sampling_params)
    check_grpo(args)
    for warning in correction_warnings(args):
        warnings.warn(warning, stacklevel=2)
    if pool is None:
        pool = ServerPool.of(client, patience_s=config.ready_timeout_s) if client else meet(config)
    if config.max_staleness:
        ComingPrompts(trainer)  # refuses what cannot be read ahead
    if config.drop_degenerate_groups:
        check_replaceable(trainer)
    if config.deterministic and not trainer.args.full_determinism:
        raise InvalidRequest("deterministic: set full_determinism=True in GRPOConfig, for deterministic kernels")
    adapter_config = model.peft_config[active_adapter(model)]
    own = fingerprint_checkpoint(adapter_config.base_model_name_or_path or model.config._name_or_path, revision)
    prompts = _first_prompts(trainer)
    longest_prompt = max(map(len, prompts), default=0)

    def accepts(state: ServerState) -> list[str]:
        check_server(state, allow_policy_altering=config.allow_policy_altering, deterministic=config.deterministic)
        if config.share_gpu:
            check_shared_gpu(state, trainer.accelerator.device, trainer.accelerator.num_processes)
        if config.max_staleness:
            check_slots(trainer, state, config.max_staleness, config.in_flight)
        check_rank(adapter_config, state)
        check_targets(lora_layers(model, active_adapter(model)), mixture_of_experts=state.mixture_of_experts)
        check_lengths(trainer.args.max_completion_length, longest_prompt, state)
        return check_base(own, state.base, allow_mismatch=config.allow_base_mismatch)

    states = [replica.known for replica in pool.up()]
    for warning in dict.fromkeys(warning for state in states for warning in accepts(state)):
        warnings.warn(warning, stacklevel=2)
    session = Session(
        TrainerSide(trainer),
        model,
        pool,
        config,
        sampling=sampling_params(args, trainer.eos_token_ids),
        prompts=prompts or [trainer._tokenizer(NEUTRAL_TEXT)["input_ids"]],
        base_weights=own.weights if all(own.weights == state.base.weights for state in states) else None,
        accepts=accepts,
    )
    if config.reward_workers:
        session.use(score_in_workers(trainer, config))
    _put_under_trainer(trainer, session)
    if config.drop_degenerate_groups:
        replace_degenerate(trainer, session.use_dynamic_sampling(trainer.num_generations), session.rollouts)
    ExactResume(trainer, session)
    recorder = attach_recorder(trainer, session)
    if recorder and config.run_page:
        read_samples(trainer, session, recorder.samples.add)
    return session


def meet(config: LearnerConfig) -> ServerPool:
    """The servers at `config.rollout_url`, at least one of which is ready.

    Raises:
        LockstepError: `not_ready` after `config.ready_timeout_s`.
    """
    token = read_token(config.token_file)

    def connect(url: str) -> RolloutClient:
        return RolloutClient(
            url,
            token,
            ca_file=config.ca_file,
            push_timeout_s=config.push_timeout_s,
            generate_timeout_s=config.generate_timeout_s,
        )

    pool = ServerPool(connect, ServerDiscovery(config.require_urls()), patience_s=config.ready_timeout_s)
    pool.wait_ready(config.ready_timeout_s)
    return pool


class TrainerSide:
    """What a session needs of the trainer."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self.accelerator = trainer.accelerator
        self.output_dir = Path(trainer.args.output_dir)
        self.seed = trainer.args.seed

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._trainer.state.global_step

    @property
    def micro_step(self) -> int:
        """Forward-backward passes done."""
        return self._trainer._step

    @property
    def first_row(self) -> int:
        """This rank's first row among the rows of a generation batch."""
        accelerator = self.accelerator
        return self._trainer.args.generation_batch_size // accelerator.num_processes * accelerator.process_index

    @property
    def schedule(self) -> Schedule:
        """When generation batches are trained on; known once the training has begun."""
        return schedule_of(self._trainer)

    def coming_prompts(self) -> ComingPrompts:
        """The prompts that this rank will be given."""
        return ComingPrompts(self._trainer)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self._trainer.state.max_steps

    @property
    def is_training(self) -> bool:
        """False during evaluation; TRL tells the two apart in the same way."""
        return self._trainer.model.training

    def latest(self, metric: str) -> float | None:
        """TRL's last value of a training metric; None where nothing was generated since its last log."""
        values = self._trainer._metrics["train"].get(metric)
        return values[-1] if values else None

    def log(self, metric: str, value: float) -> None:
        """Add to what TRL averages until its next log and hands to report_to."""
        self._trainer._metrics["train"][metric].append(value)


def _put_under_trainer(trainer: GRPOTrainer, session: Session) -> None:
    """What the constructor sets with use_vllm=True and vllm_mode="server".

    Everything else it sets is the same in both cases, but for `generation_config`, which is then not read.
    The check of loss_type=vespo is made in `check_grpo`, that of the server's logprobs_mode in
    `check_server`.
    """
    trainer.use_vllm = True
    trainer.vllm_mode = "server"
    trainer.vllm_generation = session.rollouts
    trainer._last_loaded_step = -1
    if trainer.accelerator.device.type == "cpu":
        trl.trainer.utils._use_triton = _picks_scored_positions
        pin_compute_dtype(trainer.model)
    skip_padding(trainer)
    if session.gpu_sharing:
        begin_passes_with(trainer, session.gpu_sharing.take_gpu)
    mark_tool_turns(trainer, session.rollouts)
    watch_mismatch(trainer, session.figures.saw_mismatch)
    trainer.add_callback(_PushAfterStep(session))


def _picks_scored_positions(device: torch.device) -> bool:
    """Whether TRL runs the language-model head on the completion's positions only, or on the prompt's too.

    TRL asks this of Triton, since a number of positions that changes would recompile elsewhere. A CPU compiles nothing.
    """
    return device.type == "cpu" or trl.kernels.chunked_logprob._use_triton(device)


class _PushAfterStep(TrainerCallback):
    """The trainer's events, as calls of the session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.pool.close()  # else it would go on pushing this run to servers that restart
        self.session.yield_gpu()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.yield_gpu()  # also of an evaluation that no training follows


def save_final_adapter(trainer: GRPOTrainer, folder: Path) -> Path:
    """The trained adapter and its tokenizer as a PEFT directory. Collective; rank 0 writes."""
    is_main = trainer.accelerator.is_main_process
    save_adapter(_peft_model(trainer), folder, writes=is_main)
    if is_main:
        trainer.processing_class.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def _peft_model(trainer: GRPOTrainer) -> PeftModel:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        check_lora(None)
    check_lora(model.peft_config[active_adapter(model)])
    check_model(model.config)
    return model


def _first_prompts(trainer: GRPOTrainer) -> list[list[int]]:
    """Token ids of the first prompts, templated as TRL does it; none for streams and environments."""
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return []
    if getattr(trainer, "environment_factories", None) is not None:
        return []
    prompts = dataset[:PROMPTS_MEASURED]["prompt"]
    return [list(ids) for ids in trainer._tokenize_prompts(prompts)[0]] if prompts else []
