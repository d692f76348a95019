"""TRL's internals: their names and versions, checked before anything is changed, and the state that a session reads."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import trl
import trl.trainer.utils
from packaging.specifiers import SpecifierSet
from trl import GRPOTrainer

from learner.passes.flops import multiplied_weights, peak_flops, training_flops
from learner.rollouts.schedule import Schedule
from learner.trainer.packed_scoring import PackedScoring
from learner.trainer.prompt_order import TrlPrompts, generation_batch, rows_of_rank, schedule_of
from shared.errors import InvalidRequest

TRL_RANGE = SpecifierSet(">=1.16,<1.17")
_USED = (
    "_generate",
    "_compute_loss",
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
    "_load_best_model",
    "_determine_best_metric",
    "use_vllm",
    "vllm_mode",
    "eos_token_ids",
    "_is_vlm",
    "_metrics",
    "_logs",
    "reward_weights",
    "multi_objective_aggregation",
    "_tokenizer",
    "environment_factories",
    "rollout_func",
    "num_generations_eval",
    "reward_func_names",
    "reward_processing_classes",
    "tools",
    "_step",
    "_buffered_inputs",
    "pad_to_multiple_of",
    "aux_loss_enabled",
    "_entropy_bonus_enabled",
)


def check_trl(trainer: GRPOTrainer) -> None:
    """Check that the internals of the installed TRL are known, and that the trainer is in a supported state.

    Raises:
        LockstepError: `invalid_request`.
    """
    if not TRL_RANGE.contains(trl.__version__, prereleases=True):
        raise InvalidRequest(
            f"Lockstep knows the internals of trl {TRL_RANGE}, not of {trl.__version__}; install one of these"
        )
    missing = [name for name in _USED if not hasattr(trainer, name)]
    missing += [] if hasattr(trl.trainer.utils, "_use_triton") else ["trainer.utils._use_triton"]
    if missing:
        raise InvalidRequest(f"this trl {trl.__version__} has no {', '.join(missing)}; install trl {TRL_RANGE}")
    if trainer.use_vllm:
        raise InvalidRequest(
            "the trainer was built with use_vllm=True and has its own vLLM; build it with use_vllm=False"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise InvalidRequest("FSDP version 1 is not supported: set fsdp_version (fsdp_config.version) to 2")
    if trainer.is_fsdp_enabled and trainer.args.load_best_model_at_end:
        raise InvalidRequest(
            "load_best_model_at_end: under FSDP transformers does not find the adapter in its checkpoints; leave it "
            "out, and choose among them with learner eval --policy"
        )


class TrlTrainer:
    """A `trl.GRPOTrainer` as `learner.protocols.Trainer`, whose docstrings apply.

    Attributes:
        scoring: packs its passes; None: nothing does.
    """

    scoring: PackedScoring | None = None

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self.accelerator = trainer.accelerator
        self.output_dir = Path(trainer.args.output_dir)
        self.seed = trainer.args.seed
        self.num_generations = trainer.num_generations

    @property
    def step(self) -> int:
        return self._trainer.state.global_step

    @property
    def micro_step(self) -> int:
        return self._trainer._step

    @property
    def max_steps(self) -> int:
        return self._trainer.state.max_steps

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self._trainer)

    @property
    def generation_batch(self) -> int:
        return generation_batch(self._trainer)

    @property
    def first_row(self) -> int:
        return rows_of_rank(self._trainer).start

    @property
    def is_training(self) -> bool:
        return self._trainer.model.training  # TRL tells training and evaluation apart in the same way

    def coming_prompts(self) -> TrlPrompts:
        return TrlPrompts(self._trainer)

    def utilisation(self, tokens_per_second: float) -> float | None:
        peak, weights = self._flops
        scored = self.scoring is None or self.scoring.scores_apart
        return training_flops(weights, tokens_per_second, scored=scored) / peak if peak and weights else None

    @cached_property
    def _flops(self) -> tuple[float | None, int | None]:
        model = self.accelerator.unwrap_model(self._trainer.model)
        return peak_flops(self.accelerator.device), multiplied_weights(model.get_base_model())

    def latest(self, metric: str) -> float | None:
        values = self._trainer._metrics["train"].get(metric)
        return values[-1] if values else None

    def log(self, metric: str, value: float) -> None:
        self._trainer._metrics["train"][metric].append(value)
