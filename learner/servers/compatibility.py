"""Checks that a server can serve this training."""

from __future__ import annotations

from shared.errors import BaseMismatch, InvalidRequest, NotReady
from shared.weights import BaseFingerprint, ServerState

#: Accelerate's names of mixed precision -> the dtype in which autocast computes.
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def check_server(
    state: ServerState, *, allow_policy_altering: bool = False, deterministic: bool = False, corrected: bool = True
) -> None:
    """Check that the server is ready and returns the logprobs of the policy.

    Args:
        corrected: importance ratios account for samples of another policy.

    Raises:
        NotReady, InvalidRequest: it does not.
    """
    if not state.ready:
        raise NotReady("the rollout server is not ready; wait until /ready answers 200")
    if state.logprobs_mode != "processed_logprobs":
        raise InvalidRequest(
            f"the server returns {state.logprobs_mode}, not the logprobs tokens were drawn with; start it "
            "with --logprobs-mode processed_logprobs"
        )
    if state.policy_altering and not (allow_policy_altering or state.allowed_altering):
        raise InvalidRequest(
            f"the server runs with {', '.join(state.policy_altering)}, so its logprobs are not exactly the "
            "policy's; start it without, or set allow_policy_altering to train all the same"
        )
    if state.quantization and not corrected:
        raise InvalidRequest(
            f"the server quantizes the base ({state.quantization}), so it samples from another policy than the one "
            "that is trained: leave vllm_importance_sampling_correction on, or start it without --quantization"
        )
    if deterministic and not state.deterministic:
        raise InvalidRequest(
            "deterministic: the server may answer the same request differently; start it with --deterministic"
        )


def check_shares_gpu(state: ServerState) -> None:
    """Raise `invalid_request` unless the server can take turns with a learner on its GPU."""
    if not state.shares_gpu:
        raise InvalidRequest("share_gpu: the server has its GPU to itself; start it with --share-gpu")


def check_base(own: BaseFingerprint, served: BaseFingerprint, *, allow_mismatch: bool = False) -> list[str]:
    """Check that learner and server hold the same base weights and tokenizer; return warnings.

    Raises:
        BaseMismatch: they differ or cannot be compared, and `allow_mismatch` is not set.
    """
    warnings = []
    pairs = {"weights": (own.weights, served.weights), "tokenizer": (own.tokenizer, served.tokenizer)}
    for part, (mine, theirs) in pairs.items():
        if mine is not None and mine == theirs:
            continue
        if mine is None or theirs is None:
            side = "learner" if mine is None else "server"
            problem = f"the {side}'s base {part} cannot be fingerprinted (no safetensors or tokenizer.json?)"
        else:
            problem = f"the server's base {part} differ from the learner's ({theirs[:12]} and {mine[:12]})"
        if not allow_mismatch:
            raise BaseMismatch(
                f"{problem}; give both the same model and revision, or set allow_base_mismatch if you know better",
                part=part,
            )
        warnings.append(f"{problem}; going on because allow_base_mismatch is set")
    if own.chat_template != served.chat_template:
        warnings.append(
            "the server's chat template differs from the learner's: training uses the learner's, chat "
            "requests and evaluations the server's"
        )
    return warnings


def check_precision(weights: str, autocast: str | None, state: ServerState) -> list[str]:
    """Return a warning where the server quantizes the base, or where autocast makes the learner compute in another
    dtype than its weights and the server.

    Args:
        weights: dtype of the learner's base.
        autocast: dtype of the training's autocast, if it has one.
    """
    if state.quantization:
        return [
            f"the server quantizes the base ({state.quantization}): it samples from another policy than the learner's. "
            "Importance ratios account for it; how far they are apart is measured on the base at the start, and logged "
            "for every batch (lockstep/drift_kl)"
        ]
    if autocast is None or autocast in (weights, state.dtype):
        return []
    flag = next(name for name, dtype in AUTOCAST.items() if dtype == autocast)
    return [
        f"{flag}=true: the learner computes in {autocast} over weights in {weights}, the server in {state.dtype}, so "
        f"their logprobs differ by the rounding of {autocast}: set {flag}=false, or start the server with --dtype "
        f"{autocast}"
    ]


def check_lengths(max_completion_length: int | None, longest_prompt: int, state: ServerState, where: str = "") -> None:
    """Check that prompt and completion, in tokens, fit into the server's context.

    Args:
        where: names the longest prompt.

    Raises:
        InvalidRequest: they do not.
    """
    if longest_prompt + (max_completion_length or 1) > state.max_model_len:
        longest = f"{longest_prompt} tokens: {where}" if where else f"{longest_prompt} tokens"
        raise InvalidRequest(
            f"max_completion_length={max_completion_length} and the longest prompt ({longest}) exceed the server's "
            f"context of {state.max_model_len}: lower max_completion_length, shorten the prompts, or raise the "
            "server's --max-model-len"
        )
