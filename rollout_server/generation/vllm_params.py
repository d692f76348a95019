"""vLLM's inputs and sampling parameters from ours, and logprobs from its outputs."""

from __future__ import annotations

import hashlib
from typing import Any

from rollout_server.vllm_compat import versions
from shared.errors import InvalidRequest
from shared.sampling import SamplingParams

#: Sampling parameters of which a session's trainer decides alone: they change what is drawn.
TRAINERS_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "bad_words",
    "allowed_token_ids",
    "logit_bias",
)
#: What stays a client's in a session: where it stops, and the form of its outputs. All else is vLLM's default there.
_CLIENTS_FIELDS = (
    "n",
    "stop",
    "include_stop_str_in_output",
    "repetition_detection",
    "structured_outputs",
    "prompt_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "output_kind",
    "stream_interval",
)


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


def check_vocabulary(params: Any, model_config: Any, tokenizer: Any) -> None:
    """Check what vLLM would look at in every request, before there is one: token ids, and words that it tokenizes.

    Args:
        params, model_config: vLLM's.
        tokenizer: None where words are not looked at.

    Raises:
        LockstepError: `invalid_request`.
    """
    size: int = model_config.get_vocab_size()
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if outside := [token_id for token_id in getattr(params, name) or () if token_id >= size]:
            raise InvalidRequest(f"sampling.{name}: token id {outside[0]} is outside the vocabulary of {size}")
    try:
        if tokenizer is not None:
            params.update_from_tokenizer(tokenizer)
    except versions.refusals() as error:
        raise InvalidRequest(f"sampling: {error}") from error


def overridden(client: Any, trainer: SamplingParams, session_id: str, *, truncated: bool) -> Any:
    """Return vLLM's SamplingParams of a client with what the trainer insists on, and logprobs of the sampled tokens.

    n, seed, stop and structured outputs stay the client's, and so does the form of its outputs; `max_tokens` is the
    smaller one, and token ids that stop are those of both. A seed holds within its session. Whatever else a route of
    vLLM has set is left out.

    Args:
        truncated: the distribution is cut (`EngineProxy.cuts`).

    Raises:
        LockstepError: `invalid_request` with vLLM's own words when the two do not go together.
    """
    if truncated and client.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs cannot be used in a session whose distribution is cut (top_p, top_k, min_p, images): "
            "the kept mass could not be recorded; leave it out"
        )
    fields = {name: getattr(client, name) for name in _CLIENTS_FIELDS if hasattr(client, name)}
    limits = [most for most in (client.max_tokens, trainer.max_tokens) if most is not None]
    max_tokens = min(limits, default=None)
    try:
        return type(client)(
            **fields,
            **trainer.model_dump(include=set(TRAINERS_FIELDS)),
            seed=None if client.seed is None else _mixed(client.seed, session_id),
            max_tokens=max_tokens,
            min_tokens=trainer.min_tokens if max_tokens is None else min(trainer.min_tokens, max_tokens),
            stop_token_ids=[*(client.stop_token_ids or ()), *trainer.stop_token_ids],
            logprobs=client.logprobs or 0,
            # Flat ones of sampled tokens alone have no text, so they are for who reads none; where others stand beside
            # them, only flat ones keep the rank of a sampled token, which carries the kept mass.
            flat_logprobs=client.logprobs != 0 and client.prompt_logprobs is None,
        )
    except versions.refusals() as error:
        raise InvalidRequest(f"sampling of the session: {error}") from error


def _mixed(seed: int, session_id: str) -> int:
    """Return the seed of one session: agents that name a fixed one would else make all episodes of a group alike."""
    return int.from_bytes(hashlib.sha256(f"{session_id}:{seed}".encode()).digest()[:7])


def sampled_logprobs(output: Any) -> list[float]:
    """Return ln p of each sampled token of a completion output; it comes first at each position."""
    return [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
