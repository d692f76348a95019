"""What is relied on inside TRL, and in which versions: checked before anything is changed."""

from __future__ import annotations

import trl
import trl.trainer.utils
from packaging.specifiers import SpecifierSet
from trl import GRPOTrainer

from shared.errors import InvalidRequest, UnsupportedAdapter

TRL_RANGE = SpecifierSet(">=1.16,<1.17")
_TRAINER_NAMES = (
    "_generate_single_turn",
    "_tool_call_loop",
    "_tokenize_prompts",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
    "_prepare_inputs",
    "_get_train_sampler",
    "_get_output_dir",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
)
_INSTANCE_NAMES = (
    "use_vllm",
    "vllm_mode",
    "eos_token_ids",
    "_is_vlm",
    "_metrics",
    "_logs",
    "reward_weights",
    "_tokenizer",
    "num_generations_eval",
    "reward_func_names",
    "tools",
    "_step",
    "_buffered_inputs",
    "pad_to_multiple_of",
    "aux_loss_enabled",
    "_entropy_bonus_enabled",
)


def check_trl(trainer: GRPOTrainer) -> None:
    """The installed TRL is one whose internals are known here, and the trainer is in the state it expects.

    Raises:
        LockstepError: `invalid_request`.
    """
    if not TRL_RANGE.contains(trl.__version__, prereleases=True):
        raise InvalidRequest(
            f"Lockstep knows the internals of trl {TRL_RANGE}, not of {trl.__version__}; install one of these"
        )
    missing = [n for n in _TRAINER_NAMES if not hasattr(GRPOTrainer, n)]
    missing += [n for n in _INSTANCE_NAMES if not hasattr(trainer, n)]
    missing += [] if hasattr(trl.trainer.utils, "_use_triton") else ["trainer.utils._use_triton"]
    if missing:
        raise InvalidRequest(f"this trl {trl.__version__} has no {', '.join(missing)}; install trl {TRL_RANGE}")
    if trainer.use_vllm:
        raise InvalidRequest(
            "the trainer was built with use_vllm=True and has its own vLLM; build it with use_vllm=False"
        )
    if trainer._is_vlm:
        raise UnsupportedAdapter("vision models are not supported: use a text model")
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise InvalidRequest("FSDP version 1 is not supported: set fsdp_version (fsdp_config.version) to 2")
    if trainer.is_fsdp_enabled and trainer.args.load_best_model_at_end:
        raise InvalidRequest(
            "load_best_model_at_end: under FSDP transformers does not find the adapter in its checkpoints; leave it "
            "out, and choose among them with learner eval --policy"
        )
