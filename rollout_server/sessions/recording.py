"""Outputs of vLLM, deltas or not, as the choices of a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rollout_server.engine.admission import Admission
from rollout_server.sessions.trajectories import Choice
from rollout_server.vllm_compat import kept_mass


@dataclass
class _Sampled:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    finish_reason: str = "abort"


@dataclass
class Recording:
    """What the engine has sampled for one call so far.

    Args:
        deltas: outputs hold what is new; else everything so far.
        truncated: the sampling cuts the distribution, so the kept mass is wanted.
    """

    deltas: bool
    truncated: bool
    _sampled: dict[int, _Sampled] = field(default_factory=dict)

    def see(self, outputs: list[Any]) -> None:
        """Record outputs of vLLM, which have logprobs."""
        for output in outputs:
            known = self._sampled.get(output.index)
            if known is None or not self.deltas:
                known = self._sampled[output.index] = _Sampled()
            known.token_ids += output.token_ids
            for logprob, rank in _of_sampled(output.logprobs):
                known.logprobs.append(logprob)
                known.ranks.append(rank)
            known.finish_reason = output.finish_reason or known.finish_reason

    def choices(self, admission: Admission, request_id: str) -> list[Choice] | None:
        """Return the choices of a call that has ended, in their order; None if one of them was ended by force."""
        if any(each.finish_reason == "abort" for each in self._sampled.values()):
            return None
        return [
            Choice(
                token_ids=each.token_ids,
                logprobs=each.logprobs,
                log_kept_mass=kept_mass.decoded(each.ranks) if self.truncated else None,
                spans=admission.spans(request_id, index, len(each.token_ids)),
                finish_reason=each.finish_reason,
            )
            for index, each in sorted(self._sampled.items())
        ]


def _of_sampled(logprobs: Any) -> list[tuple[float, int | None]]:
    """Return logprob and rank of each sampled token, which comes first at its position."""
    if hasattr(logprobs, "start_indices"):  # vLLM's FlatLogprobs
        return [(logprobs.logprobs[start], logprobs.ranks[start]) for start in logprobs.start_indices]
    firsts = [next(iter(position.values())) for position in logprobs or ()]
    return [(first.logprob, first.rank) for first in firsts]
