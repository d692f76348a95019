"""Validate completions: complete, from an allowed version; and find their logprobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared.errors import InvalidRequest, LockstepError, ProtocolMismatch, VersionNotActive
from shared.rollouts import Completion, VersionSpan
from shared.sampling import SamplingParams
from shared.weights import WeightVersion


@dataclass(frozen=True)
class AllowedVersion:
    """Weights that completions may be sampled from.

    Attributes:
        version: served when the request is made.
        exact: every token must be of `version`; else also of later steps of the same learner, as pushes land.
        carried: tokens may have been sampled with KV that older weights computed.
    """

    version: WeightVersion
    exact: bool = True
    carried: bool = False

    def accepts(self, version: WeightVersion | None, kv: Literal["fresh", "carried"]) -> bool:
        """Return whether a token may be of `version`. How old it may be is decided where it is trained on."""
        if kv != "fresh" and not self.carried:
            return False
        if self.exact or version is None:
            return version == self.version
        return (version.run_id, version.fence) == (self.version.run_id, self.version.fence)


def check_completion(completion: Completion, allowed: AllowedVersion) -> None:
    """Check that every token has a logprob, finite or not, and comes from allowed weights.

    Raises:
        LockstepError: `protocol_mismatch` for a broken response, `version_not_active` for tokens of another version.
    """
    length = len(completion.token_ids)
    if length == 0 or completion.finish_reason == "abort":
        raise broken_response(f"a completion of {length} tokens that ended with {completion.finish_reason!r}")
    if len(completion.logprobs) != length:
        raise broken_response(f"{len(completion.logprobs)} logprobs for {length} tokens")
    check_spans(completion.spans, length, allowed)


def check_spans(spans: Sequence[VersionSpan], length: int, allowed: AllowedVersion) -> None:
    """Check that spans cover `length` sampled tokens, each of which comes from allowed weights. Raises as above."""
    position = 0
    for span in spans:
        if span.start != position or span.end <= span.start:
            raise broken_response(f"spans leave a gap or overlap at token {position}")
        if not allowed.accepts(span.version, span.kv):
            raise VersionNotActive(
                f"tokens [{span.start}, {span.end}) come from {span.version or 'the base'} (kv {span.kv}), "
                f"requested was {allowed.version}: this would be off-policy; does another learner push to this run?"
            )
        position = span.end
    if position != length:
        raise broken_response(f"spans cover {position} of {length} tokens")


def sampled_length(completion: Completion) -> int:
    """Return how many tokens were sampled: all of a completion; of an agent's episode, those that its calls sampled."""
    return sum(span.end - span.start for span in completion.spans)


def oldest_step(completion: Completion) -> int:
    """Return the step whose weights sampled the oldest token."""
    return min(span.version.step for span in completion.spans if span.version is not None)


def broken_response(what: str) -> LockstepError:
    """Return the error for a response that violates the protocol."""
    return ProtocolMismatch(f"the rollout server's response is broken: {what}; see its log")


def policy_logprobs(completion: Completion, sampling: SamplingParams) -> list[float]:
    """Return ln p [T] of each sampled token before truncation, to be compared with the trainer's own logprobs.

    NaN where the server computed no finite number: TRL gives such a token the importance ratio 1.

    Raises:
        LockstepError: `invalid_request` if the server does not report how much mass the truncation kept.
    """
    kept = completion.log_kept_mass
    if (kept is None and sampling.truncates) or (kept is not None and len(kept) != len(completion.logprobs)):
        raise InvalidRequest(
            "the rollout server does not say how much probability top_k, top_p or min_p kept (older than the learner, "
            "or speculating), so its logprobs cannot be compared with the trainer's: set top_k=0, top_p=1, min_p=0"
        )
    return [math.nan if logprob is None else logprob for logprob in completion.uncut_logprobs]
