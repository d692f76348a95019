"""Unsloth's `vllm_sampling_params`: a `vllm.SamplingParams`, or a dict of its fields, over TRL's own options.

vLLM is not imported: it need not be installed beside the learner.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from trl import GRPOConfig

from learner.foreign_options import sampling_fields
from learner.trainer.sampling import generation_kwargs
from shared.errors import InvalidRequest, LockstepError
from shared.sampling import SamplingParams

#: Fields that shape vLLM's text and stream, which training does not read: it has the token ids.
_OUTPUT_ONLY = {
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "flat_logprobs",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "output_text_buffer_length",
}


def with_vllm_params(args: GRPOConfig, given: Any) -> GRPOConfig:
    """Return a copy of `args` with the fields set in `given` as `generation_kwargs`; `args` itself if there are none.

    Args:
        given: a `vllm.SamplingParams`, of which fields at vLLM's default count as not set; or a dict; or the text
            `max_tokens=512, min_p=0.1`; or None.

    Raises:
        LockstepError: `invalid_request`, naming what cannot be honored and what to do instead.
    """
    fields = {} if given is None else _set_fields(given)
    owned_by_trl: dict[str, tuple[str, tuple[Any, ...]]] = {
        "n": ("num_generations", (1, args.num_generations)),
        "temperature": ("temperature", (args.temperature,)),
        "max_tokens": ("max_completion_length", (args.max_completion_length,)),
    }
    for name, (option, same) in owned_by_trl.items():
        value = fields.pop(name, same[-1])
        if value not in same:
            raise _invalid(
                f"{name}={value!r} contradicts {option}={same[-1]!r}, which the loss is computed with: set {option} in "
                "GRPOConfig"
            )
    if (value := fields.pop("logprobs", 0)) != 0:
        raise _invalid(f"logprobs={value!r}: rollouts carry the sampled tokens' logprobs and no others; leave it out")
    if fields.get("skip_special_tokens") is False and fields.get("stop"):
        raise _invalid(
            "skip_special_tokens=False with stop: the server looks for stop strings in text without special tokens; "
            "name special tokens in stop_token_ids"
        )
    fields = {name: value for name, value in fields.items() if name not in _OUTPUT_ONLY}
    if unknown := sorted(fields.keys() - SamplingParams.model_fields.keys()):
        raise _invalid(f"{', '.join(unknown)}: rollout requests have no such field; leave it out")
    extra = generation_kwargs(args)
    for name in fields.keys() & extra.keys():
        if fields[name] != extra[name]:
            raise _invalid(f"{name}={fields[name]!r}, and generation_kwargs.{name}={extra[name]!r}: give one of them")
    if not fields:
        return args
    changed = copy.copy(args)
    changed.generation_kwargs = {**extra, **fields}
    return changed


def _set_fields(given: Any) -> dict[str, Any]:
    """Return the fields that were set; None means "not set" for every field of vLLM's."""
    if isinstance(given, str):
        fields = sampling_fields(given)
    elif isinstance(given, Mapping):
        fields = dict(given)
    elif isinstance(written := getattr(given, "_set_kwargs", None), Mapping):  # of Unsloth's vLLMSamplingParams
        fields = dict(written)
    else:
        defaults = _values(type(given)())
        fields = {n: value for n, value in _values(given).items() if value != defaults.get(n)}
    form = fields.get("structured_outputs")
    if form is not None and not isinstance(form, Mapping):
        fields["structured_outputs"] = {k: v for k, v in _values(form).items() if v not in (None, False)}
    return {name: value for name, value in fields.items() if value is not None}


def _values(record: Any) -> dict[str, Any]:
    """Return the public fields of a vLLM object: a msgspec.Struct or a dataclass, depending on its version."""
    fields = dataclasses.fields(record) if dataclasses.is_dataclass(record) else []
    names = getattr(record, "__struct_fields__", [field.name for field in fields])
    if not names:
        raise _invalid(f"a {type(record).__name__}: give a vllm.SamplingParams, or a dict of its fields")
    return {name: getattr(record, name) for name in names if not name.startswith("_")}


def _invalid(message: str) -> LockstepError:
    return InvalidRequest(f"vllm_sampling_params: {message}")
