"""`learner train`: GRPO on a LoRA adapter, with rollouts from servers and a push after every optimizer step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

from learner.adapters.exporter import active_adapter
from learner.adapters.lora_rules import caps_logits, check_lora, check_model, check_rank
from learner.adapters.peft_dir import load_adapter, trainable_adapter
from learner.adapters.quantization import quantization_config
from learner.adapters.stored import CONFIG_FILE, WEIGHTS_FILE
from learner.adapters.target_modules import check_target_modules, model_class
from learner.agents.calls import agent_of
from learner.agents.on_cluster import agents_on_cluster
from learner.agents.rewards import agent_reward
from learner.cluster.resources import Resources
from learner.commands.export import export, how_much
from learner.commands.options import DEFAULTS, OptionParser
from learner.config import LearnerConfig
from learner.monitors.progress import show_progress
from learner.rewards.on_cluster import workers_on_cluster
from learner.run_dir.checkpoint import load_state, save_state
from learner.run_dir.files import FINAL_ADAPTER, MERGED, SUMMARY_FILE, provenance, write_summary
from learner.run_dir.lock import check_unused
from learner.servers.compatibility import check_base, check_lengths, check_server
from learner.servers.credentials import read_token, ssl_context
from learner.servers.discovery import ServerDiscovery
from learner.session import Session
from learner.tasks import Task, import_object, load_task
from learner.tasks.columns import has_images
from learner.trainer.attach import attach, meet, save_final_adapter
from learner.trainer.checks import (
    check_best_metric,
    check_callable,
    check_corrected,
    check_evaluated,
    check_grpo,
    check_slots,
)
from learner.trainer.datasets import check_enough
from learner.trainer.leaving import SIGNALS
from learner.trainer.prompt_order import steps_in_all
from learner.trainer.rehearsal import rehearse
from learner.trainer.resume import resume_point, training_state
from learner.trainer.sampling import sampling_params
from learner.trainer.settings import settings_before
from learner.utils.atomic import atomic_directory, atomic_file, check_writable
from learner.utils.cleanup import finally_do
from learner.utils.hub import hub_error
from learner.utils.logs import show_messages
from learner.utils.processes import Stopped, each_signal, raise_stopped
from shared.errors import InvalidRequest
from shared.fingerprint import fingerprint_checkpoint
from shared.image_processors import do_without_videos
from shared.model_files import check_model_exists, take_chat_template
from shared.module_names import encoders

logger = logging.getLogger("lockstep.commands")

#: LoRA flags that exclude init_adapter, which has its own settings.
_ADAPTER_FLAGS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("lora_task_type", "use_rslora", "use_dora", "use_peft"),
)


def parse(argv: Sequence[str]) -> tuple[LearnerConfig, GRPOConfig, ModelConfig]:
    """Parse flags and `--config FILE.yaml` into Lockstep's options, TRL's GRPOConfig and its ModelConfig.

    `use_peft` is true by default, since only adapters can be trained, and `lora_dropout` is 0.

    Raises:
        LockstepError: `invalid_request` for contradictory, unknown or wrong options.
    """
    config, args, model_args = OptionParser().parse(argv)
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        model_args.lora_target_modules = [targets]  # TRL makes a regular expression of a single name
    return config, args, model_args


def check_options(config: LearnerConfig, args: GRPOConfig, model_args: ModelConfig) -> LoraConfig:
    """Refuse what is wrong with options by themselves; return the adapter's settings."""
    check_grpo(args)
    check_corrected(args, config)
    sampling_params(args)
    lora = _lora_config(config, model_args)
    check_lora(lora)
    assert lora is not None
    rehearse(args)
    _check_installed(args)
    return lora


def checked_task(config: LearnerConfig, args: GRPOConfig) -> Task:
    """Load the task, with what is refused of its data: `invalid_request`."""
    has_agent = bool(config.agent or config.agent_command)
    task = load_task(
        config.require_task(),
        task_args=cast(dict[str, Any], config.task_args),
        eval_size=config.eval_size,
        train_size=config.train_size,
        seed=args.seed,
        reward_specs=config.reward_funcs,
        reward_weights=args.reward_weights,
        prompt_column=config.prompt_column,
        eval_dataset=config.eval_dataset,
        default_reward=agent_reward if has_agent else None,
    )
    check_enough(task.train, args)
    check_evaluated(args, task.eval)
    if not (has_agent or config.environment):  # which may log metrics of their own, and have columns
        check_best_metric(args, task.reward_funcs)
        check_callable(task.reward_funcs, task.train.column_names)
    return task


def run(config: LearnerConfig, args: GRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Train, save the adapter in `output_dir/adapter`, and return the run's summary.

    Raises:
        LockstepError: for everything that is refused, if possible before the model is loaded.
    """
    started, out = time.perf_counter(), Path(args.output_dir)
    model, revision = model_args.model_name_or_path, model_args.model_revision
    show_messages(is_main=_is_main())
    urls = config.require_urls()
    config.require_task()
    if not model:
        raise InvalidRequest("give --model_name_or_path: the base model, the same as the rollout server's")
    args.full_determinism = args.full_determinism or config.deterministic
    args.use_vllm = False  # use_vllm=true means rollouts from vLLM, which is what happens; TRL must not start its own
    # All that is on this machine comes before servers are awaited, and before the model is loaded.
    lora = check_options(config, args, model_args)
    _check_paths(config, args)
    model_config = _model_config(model, revision, args)
    if args.cast_lm_head_to_fp32 and model_config.get_text_config().tie_word_embeddings:
        raise InvalidRequest("cast_lm_head_to_fp32: the model's head is tied to its embeddings; leave it out")
    lora = check_target_modules(
        lora, model_config, trust_remote_code=args.trust_remote_code, is_given=config.init_adapter is not None
    )
    quantized = quantization_config(model_args)
    tools = [import_object(path) for path in config.tools or ()]
    environment = import_object(config.environment) if config.environment else None
    agent = agent_of(config.agent, config.agent_command)
    # Both raise where none can be.
    if config.agent_backend == "ray":
        agents_on_cluster(agent, cast(Resources, config.agent_resources), config.ca_file)
    if config.reward_backend == "ray":
        workers_on_cluster(cast(Resources, config.reward_resources))
    own = fingerprint_checkpoint(model, revision)
    asked = _asked(args)
    checkpoint = resume_point(out, asked, settings_before(args, lora, config, own.weights))
    task = checked_task(config, args)
    pool = meet(config)
    states = [replica.known for replica in pool.up()]
    for state in states:  # what is known before the model is loaded; `attach` checks all of it
        check_server(
            state,
            allow_policy_altering=config.allow_policy_altering,
            deterministic=config.deterministic,
            corrected=args.vllm_importance_sampling_correction,
        )
        check_rank(lora, state)
        check_slots(args, state, config)
        check_lengths(args.max_completion_length, 1, state)
        check_base(own, state.base, allow_mismatch=config.allow_base_mismatch)
    trainer = _trainer(task, config, args, model_args, model_config, lora, quantized, tools, environment)
    session = attach(trainer, config=config, pool=pool, revision=revision)
    show_progress(trainer, session)
    run_id, size = session.run_id, len(task.train)
    logger.info("run %s: %s, %d training questions, rollouts from %s", run_id, task.name, size, ", ".join(urls))
    training = time.perf_counter()
    with finally_do(session.close, "closing the session"):
        resume_point(out, checkpoint or asked, session.settings)
        if checkpoint and asked is None:
            logger.info(
                "resuming from %s (--resume_from_checkpoint false, or another output_dir, starts over)", checkpoint
            )
        reached = load_state(checkpoint) if checkpoint else None
        steps = steps_in_all(trainer)
        finished = reached if reached and steps is not None and steps <= reached.step else None
        if checkpoint and finished:  # transformers would make one more step
            logger.info(
                "already trained for %d steps; raise --max_steps or --num_train_epochs to train further", finished.step
            )
            load_adapter(session.model, checkpoint)
            trainer.state.global_step = finished.step
            session.metrics.restore(finished.pushes, finished.completions, finished.completion_tokens)
            session.finish()  # it may have been killed before it could
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
            _stop_if_interrupted(trainer, session, asked)
    train_seconds = time.perf_counter() - training
    saved = load_state(out / FINAL_ADAPTER) if finished else None
    if not (finished and saved and saved.step == finished.step and saved.fence >= finished.fence):
        _save_adapter(trainer, session, out / FINAL_ADAPTER)
    if hasattr(trainer, "end"):
        trainer.end()  # closes the trackers of report_to
    for replica in pool.replicas.values():
        replica.client.close()
    summary = session.summary() | {"train_seconds": train_seconds, "total_seconds": time.perf_counter() - started}
    summary |= provenance(
        model,
        revision,
        task.name,
        session.publisher.base_weights,
        states[0],
        trust_remote_code=args.trust_remote_code,
    )
    if trainer.accelerator.is_main_process:
        write_summary(out / SUMMARY_FILE, summary)
        if config.save_merged:
            _, arrived = export(
                out / FINAL_ADAPTER, out / MERGED, merged=True, model=model, revision=revision, force=True
            )
            logger.info("merged model written to %s; %s", out / MERGED, how_much(arrived))
    return summary


def _stop_if_interrupted(trainer: GRPOTrainer, session: Session, asked: str | bool | None) -> None:
    """Raise `Stopped` if a signal has ended the training early; says how to go on."""
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if not session.interrupted or step >= steps:
        return
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{step}"
    how = "the same command goes on" if asked in (None, True) else f"--resume_from_checkpoint {checkpoint} goes on"
    raise Stopped(f"{session.interrupted}: step {step} of {steps} is saved in {checkpoint}; {how} from there")


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    with each_signal(raise_stopped, *SIGNALS):
        summary = run(*parse(argv))
    if _is_main():
        gap, push = summary["max_logprob_gap"], summary["push_seconds_median"]
        print(
            f"{summary['steps']} steps, {summary['pushes']} pushes, {summary['completions']} completions in "
            f"{summary['train_seconds']:.0f} s"
            + (f"; median push {push:.3f} s" if push is not None else "")
            + (f"; largest logprob gap {gap:.2e}" if gap is not None else "")
        )
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _check_paths(config: LearnerConfig, args: GRPOConfig) -> None:
    """Refuse files that cannot be read and an output_dir that cannot be written: `invalid_request`."""
    read_token(config.token_file)
    if config.ca_file:
        ssl_context(config.ca_file)
    ServerDiscovery(config.require_urls())
    check_writable(args.output_dir, "output_dir", directory=True)
    if _is_main():
        check_unused(args.output_dir)


def _check_installed(args: GRPOConfig) -> None:
    """Refuse trackers and kernels of packages that are not here: `invalid_request`."""
    trackers = set(args.report_to or ()) & INTEGRATION_TO_CALLBACK.keys()
    if missing := sorted(trackers - set(get_available_reporting_integrations())):
        raise InvalidRequest(f"report_to {missing[0]}: it is not installed; install it, or leave it out")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InvalidRequest("use_liger_kernel: liger-kernel is not installed; install it, or leave it out")


def _model_config(model: str, revision: str | None, args: GRPOConfig) -> Any:
    """Return the model's configuration; raises `invalid_request` where there is none, `unsupported_adapter`."""
    check_model_exists(model, revision)
    try:
        found = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise hub_error(
            f"model_name_or_path {model!r} is no model's directory here, nor on the hub: {error}", error
        ) from error
    check_model(found)
    return found


def _revision(model_args: ModelConfig) -> str | None:
    """Return the base's revision as an adapter names it: None for the usual one."""
    return None if model_args.model_revision == ModelConfig.model_revision else model_args.model_revision


def _lora_config(config: LearnerConfig, model_args: ModelConfig) -> LoraConfig | None:
    """Build the adapter's config from flags, or read that of `init_adapter`; None without PEFT."""
    extra = cast(dict[str, Any], config.lora_kwargs)
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)} | DEFAULTS
    changed = [name for name in _ADAPTER_FLAGS if getattr(model_args, name) != defaults[name]]
    if config.init_adapter is not None:
        if changed or extra:
            what = ", ".join(changed) or "lora_kwargs"
            raise InvalidRequest(f"{what}: the adapter of init_adapter keeps its own LoRA settings; leave this out")
        try:
            return LoraConfig.from_pretrained(config.init_adapter)
        except (ValueError, OSError, TypeError) as error:
            raise hub_error(
                f"init_adapter {config.init_adapter!r} is not a PEFT LoRA adapter: {error}", error
            ) from error
    if not model_args.use_peft:
        return None
    unknown = sorted(extra.keys() - {f.name for f in dataclasses.fields(LoraConfig)})
    if unknown:
        raise InvalidRequest(f"lora_kwargs: peft.LoraConfig has no {', '.join(unknown)}")
    if twice := [name for name in extra if {name, f"lora_{name}"}.intersection(changed)]:
        raise InvalidRequest(f"lora_kwargs.{twice[0]}: its flag is given, too; leave this out")
    if extra.get("init_lora_weights") == "eva":
        raise InvalidRequest(
            "lora_kwargs.init_lora_weights eva needs activations of the model on data, which are not collected here: "
            "make the adapter with peft.initialize_lora_eva_weights, save it, and give it as init_adapter"
        )
    try:
        return dataclasses.replace(get_peft_config(model_args), **{"revision": _revision(model_args), **extra})
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the LoRA settings (lora_kwargs, lora_task_type) are refused: {error}") from error


def _trainer(
    task: Task,
    config: LearnerConfig,
    args: GRPOConfig,
    model_args: ModelConfig,
    model_config: Any,
    lora: LoraConfig | None,
    quantized: BitsAndBytesConfig | None,
    tools: list[Any],
    environment: Any,
) -> GRPOTrainer:
    model_init = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation or ("eager" if caps_logits(model_config) else None),
        "dtype": model_args.dtype,
        **({"quantization_config": quantized} if quantized else {}),
        **(args.model_init_kwargs or {}),
    }
    model: Any = model_args.model_name_or_path
    args.reward_weights = task.reward_weights
    tokenizer = None  # TRL takes the checkpoint's own
    try:
        if encoders(model_config) and has_images(task.train):
            do_without_videos(transformers)
        elif encoders(model_config):  # of its processor, too, whose chats are made of parts; it needs torchvision
            tokenizer = text_tokenizer(model, model_args.model_revision, args.trust_remote_code)
        if config.init_adapter is not None:
            base = model_class(model_config).from_pretrained(model, **model_init)
            model, lora = trainable_adapter(base, config.init_adapter), None
            model.peft_config[active_adapter(model)].revision = _revision(model_args)
        args.model_init_kwargs = model_init if config.init_adapter is None else None
        return GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=list(task.reward_funcs),
            processing_class=tokenizer,
            train_dataset=task.train,
            eval_dataset=task.eval if args.eval_strategy != "no" or args.eval_on_start else None,
            peft_config=lora,
            tools=tools or None,
            environment_factory=environment,
        )
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        NotImplementedError,
    ) as error:  # what TRL and transformers refuse
        raise hub_error(str(error), error) from error


def text_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a model that sees, to train its text, as TRL would load it, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        padding_side="left",
        truncation_side="left",
    )
    take_chat_template(tokenizer, model, revision)
    return tokenizer


def _save_adapter(trainer: GRPOTrainer, session: Session, folder: Path) -> None:
    """Save the final adapter, with what it was trained with, in place of an earlier one. Collective."""
    state, writes = training_state(trainer, session), trainer.accelerator.is_main_process
    with atomic_directory(folder) if writes else contextlib.nullcontext(folder) as building:
        save_final_adapter(trainer, building)
        if writes:
            save_state(building, state)
    if writes:  # where PEFT, lm_eval and others look for the adapter in an output_dir of TRL
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with atomic_file(folder.parent / name) as copy:
                shutil.copyfile(folder / name, copy)


def _asked(args: GRPOConfig) -> str | bool | None:
    """Return what to resume from, see `learner.trainer.resume.resume_point`; TRL's parser gives booleans as text.

    By default the last whole checkpoint of ours, if any: an interrupted training continues when it is started again.
    """
    value = args.resume_from_checkpoint
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
