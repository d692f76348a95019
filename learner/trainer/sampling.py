"""Map GRPOConfig to sampling parameters: every generation option is mapped, used by TRL, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError
from trl import GRPOConfig

from learner.foreign_options import REFUSED
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams

#: Fields that end up in a request.
MAPPED = {"vllm_structured_outputs_regex"}

#: Fields that TRL's loss reads itself; they work with remote rollouts as they do with TRL's own vLLM.
USED_BY_TRL = {
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
}


def refuse_unmapped(args: GRPOConfig) -> None:
    """Refuse generation options that would have no effect here.

    Raises:
        LockstepError: `invalid_request`, naming the field and what to do instead.
    """
    defaults = {f.name: f.default for f in fields(args)}
    for name, instead in REFUSED.items():
        value = getattr(args, name, defaults.get(name))
        harmless = (name, value) == ("vllm_mode", "server")  # as it is here anyway
        if name in defaults and value != defaults[name] and not harmless:
            raise InvalidRequest(f"{name}={value!r} has no effect here: {instead}")
    # Unsloth adds a field to GRPOConfig, which `learner.trainer.unsloth` reads.
    known = MAPPED | USED_BY_TRL | REFUSED.keys() | {"vllm_sampling_params"}
    unknown = {name for name in defaults if name.startswith("vllm_")} - known
    if changed := sorted(name for name in unknown if getattr(args, name) != defaults[name]):
        raise InvalidRequest(f"{', '.join(changed)}: this version of Lockstep does not know what it does")


def sampling_params(args: GRPOConfig, eos_token_ids: Sequence[int] = ()) -> SamplingParams:
    """Return sampling parameters for the completions of one prompt; `n` is left at 1 and set for each request.

    Args:
        args: TRL's options. `generation_kwargs` holds vLLM's names and overrides the other fields, as in TRL.
        eos_token_ids: ids that end a completion for TRL. They are stop tokens of the request, so that
            trainer and server agree even where the server's generation_config.json says something else.

    Raises:
        LockstepError: `invalid_request`, naming the field that is unknown or contradicts another.
    """
    extra = generation_kwargs(args)
    values: dict[str, Any] = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "max_tokens": args.max_completion_length,
    }
    if args.vllm_structured_outputs_regex is not None:
        if extra.get("structured_outputs") is not None:
            raise InvalidRequest(
                "vllm_structured_outputs_regex and generation_kwargs.structured_outputs are both set: give one of them"
            )
        values["structured_outputs"] = {"regex": args.vllm_structured_outputs_regex}
    values.update(extra)
    if values.get("stop_token_ids") is None:  # as vLLM takes it
        values["stop_token_ids"] = []
    ids = values["stop_token_ids"]
    # What is no list of ids is left to the schema.
    if not values.get("ignore_eos") and isinstance(ids, list | tuple | set) and all(type(one) is int for one in ids):
        values["stop_token_ids"] = sorted({*ids, *eos_token_ids})
    try:
        return SamplingParams.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "sampling"
        raise InvalidRequest(f"sampling option {name}: {first['msg']} (see generation_kwargs)") from error


def generation_kwargs(args: GRPOConfig) -> dict[str, Any]:
    """Return `generation_kwargs` as a dict of vLLM's sampling parameters.

    Raises:
        LockstepError: `invalid_request` if it sets the number of completions.
    """
    extra = dict(args.generation_kwargs or {})  # GRPOConfig has parsed a JSON string already
    if "n" in extra:
        raise InvalidRequest("generation_kwargs.n: set num_generations (and num_generations_eval) instead")
    return extra
