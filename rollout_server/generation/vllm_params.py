"""vLLM's inputs and sampling parameters from ours, and logprobs from its outputs."""

from __future__ import annotations

from typing import Any

from rollout_server.vllm_compat import versions
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams


def token_prompt(token_ids: list[int]) -> dict[str, Any]:
    """Return vLLM's engine input for a prompt of token ids."""
    return {"type": "token", "prompt_token_ids": token_ids}


def to_vllm(params: SamplingParams, *, skip_special_tokens: bool = True) -> Any:
    """Return vLLM's SamplingParams for one prompt: final output only, logprobs of the sampled tokens only.

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
            skip_special_tokens=skip_special_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except versions.refusals() as error:
        raise InvalidRequest(f"sampling: {error}") from error


def sampled_logprobs(output: Any) -> list[float]:
    """Return ln p of each sampled token of a completion output; it comes first at each position."""
    return [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
