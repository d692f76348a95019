"""`learner train`: GRPO on a LoRA adapter, rollouts from a server, a push after every optimizer step."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from learner.adapters.lora_rules import check_lora, check_rank
from learner.adapters.peft_dir import load_adapter
from learner.adapters.quantization import quantization
from learner.adapters.stored import FINAL_ADAPTER
from learner.commands.export import export
from learner.config import LearnerConfig
from learner.monitors.progress import show_progress
from learner.run_dir.checkpoint import TrainingState, last_checkpoint, load_state
from learner.run_dir.files import SUMMARY_FILE, write_summary
from learner.run_dir.provenance import provenance
from learner.servers.compatibility import check_base, check_server
from learner.tasks import Task, import_object, load_task
from learner.trainer.attach import attach, meet, save_final_adapter
from learner.trainer.checks import check_grpo
from learner.trainer.sampling import sampling_params
from shared.errors import InvalidRequest
from shared.fingerprint import fingerprint_checkpoint
from shared.weights import ServerState

logger = logging.getLogger("lockstep.commands")

#: Where in output_dir a merged model goes.
MERGED = "merged"
#: LoRA flags that an adapter given with init_adapter decides itself.
_ADAPTER_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora")


def parse(argv: Sequence[str]) -> tuple[LearnerConfig, GRPOConfig, ModelConfig]:
    """Flags and `--config FILE.yaml` into our options, TRL's GRPOConfig and its ModelConfig.

    `use_peft` is true unless it is set to false, since nothing but adapters can be trained.

    Raises:
        LockstepError: `invalid_request` for contradictory or unknown options.
    """
    parser = TrlParser((LearnerConfig, GRPOConfig, ModelConfig), prog="learner train")
    parser.set_defaults(use_peft=True)
    try:
        return parser.parse_args_and_config(_joined_config(argv))
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise InvalidRequest(str(error)) from error


def run(config: LearnerConfig, args: GRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Train, save the adapter in `output_dir/adapter`, and answer the run's figures.

    Raises:
        LockstepError: every refusal, before the model is loaded where it can be known by then.
    """
    started = time.perf_counter()
    urls, task_spec = config.require_urls(), config.require_task()
    if not model_args.model_name_or_path:
        raise InvalidRequest("give --model_name_or_path: the base model, the same as the rollout server's")
    args.full_determinism = args.full_determinism or config.deterministic
    args.use_vllm = False  # use_vllm=true means rollouts from vLLM, which is what happens; TRL must not start its own
    check_grpo(args)
    sampling_params(args)
    lora = _lora_config(config, model_args)
    check_lora(lora)
    quantized = quantization(model_args)
    pool = meet(config)
    server = pool.up()[0].known
    for replica in pool.up():
        _check_server(replica.known, config, model_args, lora)
    task = _load_task(task_spec, config, args)
    trainer = _trainer(task, config, args, model_args, lora, quantized)
    session = attach(trainer, config=config, pool=pool, revision=model_args.model_revision)
    show_progress(trainer, session)
    logger.info(
        f"run {session.run_id}: {task.name}, {len(task.train)} training questions, rollouts from {', '.join(urls)}"
    )
    training = time.perf_counter()
    checkpoint = _resume(args)
    try:
        if finished := _finished(checkpoint, args):
            logger.info(f"trained already, {finished.step} steps; more with a higher --max_steps")
            load_adapter(session.model, Path(str(checkpoint)))
            trainer.state.global_step = finished.step
            session.metrics.restore(finished.pushes, finished.completions, finished.completion_tokens)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        session.close()
    train_seconds = time.perf_counter() - training
    save_final_adapter(trainer, Path(args.output_dir) / FINAL_ADAPTER)
    if hasattr(trainer, "end"):
        trainer.end()  # closes the trackers of report_to
    for replica in pool.replicas.values():
        replica.client.close()
    summary = session.summary() | {"train_seconds": train_seconds, "total_seconds": time.perf_counter() - started}
    summary |= provenance(
        model_args.model_name_or_path, model_args.model_revision, task.name, session.publisher.base_weights, server
    )
    if trainer.accelerator.is_main_process:
        write_summary(Path(args.output_dir) / SUMMARY_FILE, summary)
        if config.save_merged:
            _save_merged(Path(args.output_dir), model_args)
    return summary


def main(argv: Sequence[str]) -> int:
    """The command. Answers the exit code."""
    summary = run(*parse(argv))
    if int(os.environ.get("RANK", "0")) == 0:
        gap, push = summary["max_logprob_gap"], summary["push_seconds_median"]
        print(
            f"{summary['steps']} steps, {summary['pushes']} pushes, {summary['completions']} completions in "
            f"{summary['train_seconds']:.0f} s"
            + (f"; median push {push:.3f} s" if push is not None else "")
            + (f"; largest logprob gap {gap:.2e}" if gap is not None else "")
        )
    return 0


def _save_merged(output_dir: Path, model_args: ModelConfig) -> None:
    export(
        output_dir / FINAL_ADAPTER,
        output_dir / MERGED,
        merged=True,
        model=model_args.model_name_or_path,
        revision=model_args.model_revision,
        force=True,
    )
    logger.info(f"the merged model is in {output_dir / MERGED}")


def _joined_config(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as `--config FILE`, the only form that TrlParser knows; the values of several `--rollout_url`
    behind one, since the parser would take the last one only.
    """
    joined: list[str] = []
    urls: list[str] = []
    into = joined
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag in ("--rollout_url", "--rollout-url"):
            urls += [value] if equals else []
            into = joined if equals else urls
            continue
        if argument.startswith("--"):
            into = joined
        into += argument.split("=", 1) if flag == "--config" else [argument]
    return [*joined, "--rollout_url", *urls] if urls else joined


def _lora_config(config: LearnerConfig, model_args: ModelConfig) -> LoraConfig | None:
    """The adapter's config: from flags, or of the adapter that training starts from."""
    if config.init_adapter is not None:
        defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
        changed = [name for name in _ADAPTER_FLAGS if getattr(model_args, name) != defaults[name]]
        if changed or config.lora_options:
            what = ", ".join(changed) or "lora_kwargs"
            raise InvalidRequest(
                f"{what}: an adapter given with init_adapter keeps its own LoRA settings; leave this out"
            )
        try:
            return LoraConfig.from_pretrained(config.init_adapter)
        except (ValueError, OSError, TypeError) as error:
            raise InvalidRequest(f"init_adapter {config.init_adapter!r} is no PEFT LoRA adapter: {error}") from error
    if not model_args.use_peft:
        return None
    lora = get_peft_config(model_args)
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(config.lora_options) - known)
    if unknown:
        raise InvalidRequest(f"lora_kwargs: peft.LoraConfig has no {', '.join(unknown)}")
    fields = {f.name: getattr(lora, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
    return LoraConfig(**{**fields, **config.lora_options})


def _check_server(state: ServerState, config: LearnerConfig, model_args: ModelConfig, lora: LoraConfig) -> None:
    """What can be known before the model is loaded; `attach` looks again, for scripts that call it."""
    check_server(state, allow_policy_altering=config.allow_policy_altering, deterministic=config.deterministic)
    check_rank(lora, state)
    own = fingerprint_checkpoint(model_args.model_name_or_path, model_args.model_revision)
    check_base(own, state.base, allow_mismatch=config.allow_base_mismatch)


def _load_task(spec: str, config: LearnerConfig, args: GRPOConfig) -> Task:
    return load_task(
        spec,
        task_args=config.task_options,
        eval_size=config.eval_size,
        train_size=config.train_size,
        seed=args.seed,
        reward_specs=config.reward_funcs,
        reward_weights=args.reward_weights,
        prompt_column=config.prompt_column,
        eval_dataset=config.eval_dataset,
    )


def _trainer(
    task: Task,
    config: LearnerConfig,
    args: GRPOConfig,
    model_args: ModelConfig,
    lora: LoraConfig,
    quantized: BitsAndBytesConfig | None,
) -> GRPOTrainer:
    model_init = {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **({"quantization_config": quantized} if quantized else {}),
        **(args.model_init_kwargs or {}),
    }
    model: Any = model_args.model_name_or_path
    if config.init_adapter is not None:
        base = AutoModelForCausalLM.from_pretrained(model, **model_init)
        model, peft_config, args.model_init_kwargs = (
            PeftModel.from_pretrained(base, config.init_adapter, is_trainable=True),
            None,
            None,
        )
    else:
        peft_config, args.model_init_kwargs = lora, model_init
    args.reward_weights = task.reward_weights
    evaluates = args.eval_strategy != "no"
    return GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=list(task.reward_funcs),
        train_dataset=task.train,
        eval_dataset=task.eval if evaluates else None,
        peft_config=peft_config,
        tools=[import_object(path) for path in config.tools or ()] or None,
        environment_factory=import_object(config.environment) if config.environment else None,
    )


def _resume(args: GRPOConfig) -> bool | str | None:
    """A path, or true for the last checkpoint in output_dir, as in TRL; by default the last whole one of ours, if any:
    a training that was cut off goes on when it is started again.
    """
    value = args.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if value is False:
        return None
    last = last_checkpoint(args.output_dir)
    if value is None and last is not None:
        logger.info(f"going on from {last} (start anew with --resume_from_checkpoint false, or another output_dir)")
    return (str(last) if last else value) if value in (None, True) else value


def _finished(checkpoint: bool | str | None, args: GRPOConfig) -> TrainingState | None:
    """The state in `checkpoint` if nothing is left to train; transformers would make one step more."""
    state = load_state(Path(checkpoint)) if isinstance(checkpoint, str) else None
    return state if state is not None and 0 < args.max_steps <= state.step else None
