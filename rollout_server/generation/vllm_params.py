"""Our sampling parameters as vLLM's, and vLLM's outputs as our completions."""

from __future__ import annotations

from typing import Any

from rollout_server.vllm_compat import kept_mass, versions
from shared.errors import InvalidRequest
from shared.rollouts import Completion, VersionSpan
from shared.sampling import SamplingParams


def token_prompt(token_ids: list[int]) -> dict[str, Any]:
    """vLLM's engine input for a prompt of token ids."""
    return {"type": "token", "prompt_token_ids": token_ids}


def to_vllm(params: SamplingParams) -> Any:
    """vLLM's SamplingParams for one prompt: final output only, the sampled tokens' logprobs, nothing else.

    Raises:
        LockstepError: `invalid_request` with vLLM's own words when it refuses a value.
    """
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    fields = params.model_dump(exclude={"structured_outputs"})
    form = params.structured_outputs and params.structured_outputs.model_dump(exclude_none=True, by_alias=True)
    try:
        return VllmParams(
            **fields,
            structured_outputs=StructuredOutputsParams(**form) if form else None,
            logprobs=0,
            flat_logprobs=True,
            # Stop and bad-word strings are matched on decoded text; token ids alone do not need decoding.
            detokenize=bool(params.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except versions.refusals() as error:
        raise InvalidRequest(f"sampling: {error}") from error


def scoring_params() -> Any:
    """vLLM's SamplingParams that return the raw logprob of every prompt token."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def to_completion(output: Any, spans: list[VersionSpan], text: str | None, *, truncated: bool = False) -> Completion:
    """One of vLLM's completion outputs. `truncated`: its request cuts the distribution, so the kept mass is wanted."""
    token_ids = list(output.token_ids)
    return Completion(
        token_ids=token_ids,
        logprobs=sampled_logprobs(output.logprobs, token_ids),
        log_kept_mass=kept_mass.decoded(sampled_ranks(output.logprobs, token_ids)) if truncated else None,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        spans=spans,
        text=text,
    )


def sampled_logprobs(logprobs: Any, token_ids: list[int]) -> list[float]:
    """ln p of each sampled token, from vLLM's flat logprobs or its list of dicts."""
    starts = getattr(logprobs, "start_indices", None)
    if starts is not None:
        # The sampled token comes first at each position.
        return [logprobs.logprobs[start] for start in starts]
    return [position[token].logprob for position, token in zip(logprobs, token_ids, strict=True)]


def sampled_ranks(logprobs: Any, token_ids: list[int]) -> list[int | None]:
    """What vLLM calls the rank of each sampled token; see `kept_mass`."""
    starts = getattr(logprobs, "start_indices", None)
    if starts is not None:
        return [logprobs.ranks[start] for start in starts]
    return [position[token].rank for position, token in zip(logprobs, token_ids, strict=True)]
