"""Attach rollout servers to a `trl.GRPOTrainer`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import TrainerCallback
from trl import GRPOTrainer

from learner.adapters.exporter import active_adapter, lora_layers
from learner.adapters.lora_rules import check_lora, check_model, check_rank, check_targets, unused_patterns
from learner.adapters.peft_dir import save_adapter
from learner.adapters.rounding import keep_master_weights
from learner.agents.calls import Agent, AgentFunction, agent_of
from learner.agents.episodes import Episodes
from learner.agents.on_cluster import agents_on_cluster
from learner.agents.rewards import AgentReward
from learner.cluster.resources import Resources
from learner.config import LearnerConfig
from learner.monitors.recorder import attach_recorder
from learner.passes.lora_product import use_one_product
from learner.servers.client import RolloutClient
from learner.servers.compatibility import AUTOCAST, check_base, check_lengths, check_precision, check_server
from learner.servers.credentials import read_token
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from learner.session import Session
from learner.sync.gpu_sharing import check_shared_gpu
from learner.trainer.agent_hooks import add_agent_reward, run_agents
from learner.trainer.checks import (
    check_agent,
    check_attention,
    check_compiled,
    check_corrected,
    check_evaluated,
    check_grpo,
    check_known_ahead,
    check_slots,
    draws_policy,
)
from learner.trainer.compiling import compile_layers
from learner.trainer.datasets import check_datasets, check_enough, measure_prompts
from learner.trainer.filled_keys import show_own_text
from learner.trainer.forks import Forks, score_forks
from learner.trainer.hooks import (
    begin_passes_with,
    generate_with,
    mark_tool_loop,
    record_samples,
    replace_zero_variance_groups,
    report_failure,
    watch_mismatch,
)
from learner.trainer.images import (
    PROBE_TEXT,
    check_images,
    check_sight,
    image_probe,
    lay_out_prompts,
    read_images,
    sees_images,
    sight_of,
)
from learner.trainer.internals import TrlTrainer, check_trl
from learner.trainer.leaving import leave_in_order
from learner.trainer.packed_scoring import score_packed
from learner.trainer.padding import cut_passes, keep_old_values, sort_rows
from learner.trainer.randomness import as_warnings, randomness
from learner.trainer.resume import resume_exactly
from learner.trainer.reward_hooks import check_rewards, name_rewards, score_in_workers
from learner.trainer.sampling import sampling_params
from learner.trainer.settings import settings_of
from learner.trainer.unsloth import with_vllm_params
from learner.utils.distributed import on_every_rank
from learner.utils.logs import show_messages
from shared.errors import InvalidRequest
from shared.fingerprint import fingerprint_checkpoint
from shared.sampling import SamplingParams
from shared.weights import ServerState

logger = logging.getLogger("lockstep.trainer")


def attach(
    trainer: GRPOTrainer,
    url: str | Sequence[str] | None = None,
    config: LearnerConfig | None = None,
    *,
    client: RolloutClient | None = None,
    pool: ServerPool | None = None,
    agent: AgentFunction | None = None,
    revision: str | None = None,
    vllm_sampling_params: Any = None,
    **options: Any,
) -> Session:
    """Let `trainer` sample from the rollout servers at `url` and push its adapter to them after every optimizer step.

    Example:
        trainer = GRPOTrainer(model, reward_funcs, args, train_dataset=dataset, peft_config=LoraConfig(r=16))
        session = attach(trainer, "http://127.0.0.1:8000", max_staleness=1)
        trainer.train()
        session.close()
        print(session.summary())

    Args:
        trainer: a GRPOTrainer with a LoRA adapter, built with `use_vllm=False`, before `train()`.
        url: of one or several rollout servers; `config.rollout_url` by default.
        config, options: `LearnerConfig`, and fields of it as keyword arguments, which come first; without those of
            `learner train` alone.
        client: of one rollout server, instead of `url`.
        pool: servers that were met already; by default waits until one is ready.
        agent: is called for each row as `agent(session, row)`, plain or async, and makes its requests to
            `session.base_url`; what the policy answered is trained on. It returns a reward, or None where the
            trainer's reward functions score the conversation. By default the one that `config.agent` or
            `config.agent_command` names; without any, a completion is one answer to its prompt. See docs/agents.md.
        revision: of the base model, where it was loaded from the hub.
        vllm_sampling_params: as in Unsloth, see `learner.trainer.unsloth`; by default the attribute of that name of the
            trainer's arguments, if they have it.

    Raises:
        LockstepError: every refusal of `learner.trainer.checks`, before anything of the trainer is changed but its
            data: image columns without images go, and keys that Arrow has filled. It can be attached again.
    """
    show_messages(is_main=trainer.accelerator.is_main_process)
    if url:
        options["rollout_url"] = [url] if isinstance(url, str) else list(url)
    given = LearnerConfig(**options)
    given.refuse_those_of_train()  # of a `config`, which scripts and `learner train` parse, they have read these
    config = given if config is None else replace(config, **options)
    if any(isinstance(callback, _PushAfterStep) for callback in trainer.callback_handler.callbacks):
        raise InvalidRequest(
            "this trainer is attached already, and would push every step twice: use the session that the first "
            "attach returned, or build a new GRPOTrainer"
        )
    check_trl(trainer)
    model = _peft_model(trainer)
    check_attention(model)
    if vllm_sampling_params is None:
        vllm_sampling_params = getattr(trainer.args, "vllm_sampling_params", None)
    args = with_vllm_params(trainer.args, vllm_sampling_params)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    random = randomness(model, trainer.args, sharded=sharded, most=lambda own: max(on_every_rank(lambda: own)))
    for warning in [*check_grpo(args), *check_compiled(args, config), *as_warnings(random)]:
        warnings.warn(warning, stacklevel=2)
    check_corrected(args, config)
    check_evaluated(args, trainer.eval_dataset)
    runs = agent_of(config.agent, config.agent_command, agent)
    if runs:
        check_agent(trainer, args, config)
    make_agent = _maker(runs, config)
    check_sight(trainer, agents=runs is not None)
    check_known_ahead(trainer, config)
    if config.deterministic and not trainer.args.full_determinism:
        raise InvalidRequest("deterministic: set full_determinism=True in GRPOConfig, for deterministic kernels")
    adapter_config = model.peft_config[active_adapter(model)]
    layers = lora_layers(model, active_adapter(model)).keys()
    own = fingerprint_checkpoint(adapter_config.base_model_name_or_path or model.config._name_or_path, revision)
    check_datasets(trainer)
    show_own_text(trainer)
    check_enough(trainer.train_dataset, trainer.args)
    prompts = measure_prompts(trainer)
    sight = sight_of(trainer)
    weights = str(model.get_base_model().dtype).removeprefix("torch.")
    if pool is None:  # last, since it may wait for minutes
        pool = ServerPool.of(client, patience_s=config.ready_timeout_s) if client else meet(config)

    def check_state(state: ServerState) -> list[str]:
        check_server(
            state,
            allow_policy_altering=config.allow_policy_altering,
            deterministic=config.deterministic,
            corrected=args.vllm_importance_sampling_correction,
        )
        if config.share_gpu:
            check_shared_gpu(state, trainer.accelerator.device, trainer.accelerator.num_processes)
        check_slots(trainer.args, state, config)
        warned = check_images(prompts.images, prompts.largest, sight, state, unknown=prompts.unknown)
        check_rank(adapter_config, state)
        check_targets(layers, mixture_of_experts=state.mixture_of_experts)
        check_lengths(trainer.args.max_completion_length, prompts.longest, state, prompts.where)
        warned += check_precision(weights, AUTOCAST.get(trainer.accelerator.mixed_precision), state)
        return [*warned, *check_base(own, state.base, allow_mismatch=config.allow_base_mismatch)]

    states = [replica.known for replica in pool.up()]
    unused = unused_patterns(adapter_config, layers)
    for warning in dict.fromkeys([*unused, *(warning for state in states for warning in check_state(state))]):
        warnings.warn(warning, stacklevel=2)
    reward = add_agent_reward(trainer) if runs else None
    name_rewards(trainer)
    lay_out_prompts(trainer)
    if not trainer.is_deepspeed_enabled:
        keep_master_weights(model)
    sampling = sampling_params(args, trainer.eos_token_ids)
    session = Session(
        TrlTrainer(trainer),
        model,
        pool,
        config,
        sampling=sampling,
        longest=prompts.longest + (trainer.args.max_completion_length or 1),
        prompts=prompts.first or [trainer._tokenizer(PROBE_TEXT)["input_ids"]],
        seen=image_probe(trainer, states) if prompts.images else None,
        base_weights=own.weights if all(own.weights == state.base.weights for state in states) else None,
        settings=settings_of(trainer, adapter_config, layers, config, own.weights),
        make_rewards=partial(score_in_workers, trainer, config) if config.reward_workers else None,
        check_state=check_state,
        make_agents=partial(_episodes, make_agent, sampling) if make_agent else None,
    )
    session.samples_policy = draws_policy(args) and not random
    check_rewards(trainer)
    _install_hooks(trainer, session, reward, is_random=bool(random))
    return session


def _maker(agent: Agent | None, config: LearnerConfig) -> Callable[[int], Agent] | None:
    """Return what makes an agent ready for a number of episodes at a time; None without one.

    Raises:
        InvalidRequest: it is to run on a Ray cluster, and cannot.
    """
    if config.agent_backend == "ray":
        return agents_on_cluster(agent, cast(Resources, config.agent_resources), config.ca_file)
    return (lambda concurrency: agent) if agent else None


def _episodes(make_agent: Callable[[int], Agent], sampling: SamplingParams, session: Session) -> Episodes:
    config = session.config
    return Episodes(
        make_agent(config.agent_concurrency),
        session.pool,
        sampling,
        concurrency=config.agent_concurrency,
        timeout_s=config.agent_timeout_s,
        max_calls=config.agent_max_calls,
        max_tokens=config.agent_max_tokens,
        ca_file=config.ca_file,
        before=session.yield_gpu,
    )


def _install_hooks(trainer: GRPOTrainer, session: Session, reward: AgentReward | None, *, is_random: bool) -> None:
    """Put Lockstep around methods of TRL, in this order: of two hooks on one method, the later one is the outer one.

    | TRL's method | hooks, from the inside out | why in this order |
    | --- | --- | --- |
    | `_generate_and_score_completions` | `lay_out_prompts` (before the session) | sees the rows that TRL sees |
    | | `score_in_workers` (called by the session) | sees the rows trained on |
    | | `watch_mismatch` | measures the batch that is trained on |
    | | `replace_zero_variance_groups` | changes the rows that TRL and the hooks above are given |
    | | `read_images` | all hooks above see rows whose images are lists |
    | | `record_samples` | reads TRL's logs after everything else |
    | | `score_packed` (inside `watch_mismatch`) | keeps the entropies of what TRL scores |
    | | `run_agents` (inside all of these) | TRL and all other hooks see its episodes as completions |
    | `_get_per_token_logps_and_entropies` | `cut_passes` | |
    | | `score_forks` | cuts the sequences of a row, not the row |
    | | `score_packed` | passes that are not packed are cut |
    | | `keep_old_values` | holds for packed and cut passes |
    | | `begin_passes_with` | the GPU must be the learner's before the first pass |
    | `_generate` | `run_agents` | |
    | `_compute_loss`, `training_step` | `run_agents`, `score_packed`, `keep_old_values` | |
    | `_prepare_inputs` | `sort_rows` | |
    | `_tokenize_prompts` | `show_own_text`, `read_images` | |
    | `_tool_call_loop` | `mark_tool_loop` | |
    | `train`, `_get_train_sampler`, `_save_checkpoint`, `_load_optimizer_and_scheduler` | `resume_exactly` | |
    | `_load_best_model`, `_determine_best_metric` | `resume_exactly` | |
    | `create_model_card` | `_name_base` | |
    | `train` | `leave_in_order` | what resuming refuses leaves nothing to save |
    | | `report_failure` | the error says where the last checkpoint is |

    Callbacks run in the order in which they are added: the push comes before the recorder, and before leaving.
    """
    generate_with(trainer, session.rollouts)
    forks = Forks()
    if reward:
        run_agents(trainer, session, reward, forks)
    cut_passes(trainer)
    if reward:
        score_forks(trainer, forks)
    packs = session.config.packed_passes and not sees_images(trainer)
    if session.config.packed_passes and not packs:
        logger.info("passes are not packed: those with images are TRL's own")
    if packs and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        adapter = active_adapter(session.model)
        session.one_product = use_one_product(session.model, adapter) == len(lora_layers(session.model, adapter))
    limit = session.config.max_tokens_per_pass
    packed = score_packed(trainer, limit, forks, is_random=is_random) if packs else None
    if isinstance(session.trainer, TrlTrainer):
        session.trainer.scoring = packed
    if packed is None and not sees_images(trainer):  # whose patches are no rows
        sort_rows(trainer)
    if not is_random:
        keep_old_values(trainer)
    if session.gpu_sharing:
        begin_passes_with(trainer, session.gpu_sharing.take_gpu)
    mark_tool_loop(trainer, session.rollouts)
    watch_mismatch(trainer, session.saw_mismatch)
    if session.rollouts.dynamic_sampling:
        replace_zero_variance_groups(trainer, session.rollouts.dynamic_sampling, session.rollouts)
    read_images(trainer)
    resume_exactly(trainer, session)
    _name_base(trainer)
    trainer.add_callback(_PushAfterStep(session))
    if packed is not None and not packed.sharded:
        compile_layers(trainer, session.config.compile, lambda: session.metrics.reports[-1].train_seconds)
    leave_in_order(trainer, session)
    recorder = attach_recorder(trainer, session)
    if recorder:
        report_failure(trainer, recorder.failed)
    if recorder and session.config.run_page:
        record_samples(trainer, session, recorder.samples.add)


def _name_base(trainer: GRPOTrainer) -> None:
    """Name the base in the README.md of output_dir: TRL writes None for one that is a directory."""
    write, base = trainer.create_model_card, trainer.model.config._name_or_path

    def write_with_base(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        card = Path(trainer.args.output_dir, "README.md")
        if trainer.accelerator.is_main_process and card.is_file():
            text = card.read_text(encoding="utf-8")
            card.write_text(text.replace("[None](https://huggingface.co/None)", f"`{base}`"), encoding="utf-8")

    trainer.create_model_card = write_with_base


def meet(config: LearnerConfig) -> ServerPool:
    """Return the servers at `config.rollout_url`, at least one of which is ready.

    Raises:
        LockstepError: `not_ready` after `config.ready_timeout_s`.
    """
    connect = partial(
        RolloutClient,
        token=read_token(config.token_file),
        ca_file=config.ca_file,
        push_timeout_s=config.push_timeout_s,
        generate_timeout_s=config.generate_timeout_s,
    )
    pool = ServerPool(connect, ServerDiscovery(config.require_urls()), patience_s=config.ready_timeout_s)
    pool.wait_ready(config.ready_timeout_s)
    return pool


class _PushAfterStep(TrainerCallback):
    """Passes the trainer's events to the session."""

    def __init__(self, session: Session) -> None:
        self.session, self._ended = session, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ended = False
        self.session.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.pool.close()  # else it would go on pushing this run to servers that restart
        if state.global_step >= state.max_steps:  # else it was stopped, and may be resumed
            self._ended = True
            self.session.finish()
        self.session.yield_gpu()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._ended:  # the evaluation has made it a run in training again
            self.session.finish()
        self.session.yield_gpu()  # no training may follow


def save_final_adapter(trainer: GRPOTrainer, folder: Path) -> Path:
    """Save the trained adapter and its tokenizer as a PEFT directory. Collective; rank 0 writes."""
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
