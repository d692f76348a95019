"""Report the probability mass that was kept where each token was sampled: by top_k, top_p and min_p, and without the
tokens that stand for images, which no model draws here: no image would fill them.

vLLM's processed logprobs are those of the truncated distribution: ln q(t) - ln Z, where q is the softmax before
truncation and Z the mass of the kept set. A learner that computes ln q(t) needs ln Z to compare the two. vLLM returns
neither, so its sampler is subclassed: in batches with a truncating request ln Z replaces the sampled token's rank, as
an integer <= 0 in units of 2^-24. Ranks are at least 1, and only vLLM's `/inference/v1/generate` shows them. All of it
runs on the device, behind the model's graph; batches without truncation pass through unchanged, but where the model has
tokens of images.

With an unknown sampler, and where speculation drafts tokens, ranks stay ranks: `decoded` then returns None, never a
wrong mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rollout_server.vllm_compat import versions

_STEPS = 2**24
_LEAST = -100.0  # a mass of 4e-44; in units of 2^-24 it still fits into 32 bits
_GREEDY_BELOW = 1e-5  # vLLM's own bound on the temperature


def encoded(log_mass_N: torch.Tensor) -> torch.Tensor:
    """Encode ln Z [N] in place of ranks: int64 [N]; NaN as 0, since the token's logprob is NaN, too."""
    return (log_mass_N.double().nan_to_num(nan=0.0).clamp(_LEAST, 0.0) * _STEPS).round().long()


def decoded(ranks: Sequence[int | None]) -> list[float] | None:
    """Return ln Z of each token; None if any of them still has a rank."""
    if any(rank is None or rank > 0 for rank in ranks):
        return None
    return [rank / _STEPS for rank in ranks if rank is not None]


def install(worker: Any) -> None:
    """Let the worker's sampler report ln Z. A worker without a known sampler stays as it is."""
    sampler, undrawn = worker.model_runner.sampler, versions.media_tokens(getattr(worker, "model_config", None))
    if getattr(sampler, "logprobs_mode", None) != "processed_logprobs":
        return
    if hasattr(getattr(sampler, "sampling_states", None), "apply_min_p"):
        states = sampler.sampling_states
        states.__class__ = _summing_states(type(states))
        sampler.__class__ = _reporting_v2(type(sampler), undrawn)
    elif hasattr(sampler, "topk_topp_sampler"):
        sampler.__class__ = _reporting_v1(type(sampler), undrawn)


def _with_mass(output: Any, log_mass_N: torch.Tensor | None) -> Any:
    tensors = output.logprobs_tensors
    if log_mass_N is not None and tensors is not None and tensors.selected_token_ranks.shape == log_mass_N.shape:
        output.logprobs_tensors = tensors._replace(selected_token_ranks=encoded(log_mass_N))
    return output


def _without(logits_NV: torch.Tensor, undrawn: list[int]) -> torch.Tensor:
    """Return a copy of logits in which these tokens have no probability."""
    return logits_NV.index_fill(-1, torch.tensor(undrawn, device=logits_NV.device), -torch.inf)


def _reporting_v1(base: Any, undrawn: list[int]) -> Any:
    """The sampler of the CPU backend and of vLLM's first GPU runner."""

    class ReportingSampler(base):
        log_mass_N: torch.Tensor | None = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.log_mass_N = None
            return _with_mass(super().forward(*args, **kwargs), self.log_mass_N)

        def sample(self, logits: torch.Tensor, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            by_min_p = any(getattr(p, "min_p_count", 0) > 0 for p in metadata.logitsprocs.argmax_invariant)
            by_top = metadata.top_k is not None or metadata.top_p is not None
            cuts = metadata.temperature is not None and (by_min_p or by_top)
            if not (cuts or undrawn):
                return super().sample(logits, metadata, *args, **kwargs)
            logits_NV = logits
            if metadata.temperature is not None:
                temperature_N = torch.where(metadata.temperature < _GREEDY_BELOW, 1.0, metadata.temperature)
                logits_NV = logits / temperature_N[:, None]
            total_N = logits_NV.logsumexp(-1)
            if undrawn:
                logits, logits_NV = _without(logits, undrawn), _without(logits_NV, undrawn)
            best_N = logits_NV.amax(-1) - total_N
            del logits_NV
            sampled, processed_NV = super().sample(logits, metadata, *args, **kwargs)
            # The most likely token is always kept, so its two logprobs differ by ln Z.
            self.log_mass_N = None if processed_NV is None else best_N - processed_NV.amax(-1)
            return sampled, processed_NV

    return ReportingSampler


def _summing_states(base: Any) -> Any:
    """V2's sampling parameters. `apply_min_p` is called on logits after temperature, right before any truncation."""

    class SummingStates(base):
        log_total_N: torch.Tensor | None = None

        def apply_min_p(self, logits: torch.Tensor, expanded_idx_mapping: Any, idx_mapping_np: Any) -> None:
            rows = idx_mapping_np
            by_min_p = (self.min_p.np[rows] > 0.0).any()
            by_top = (self.top_k.np[rows] != self.vocab_size).any() or (self.top_p.np[rows] != 1.0).any()
            if by_min_p or by_top:
                self.log_total_N = logits.float().logsumexp(-1)
            super().apply_min_p(logits, expanded_idx_mapping, idx_mapping_np)

    return SummingStates


def _reporting_v2(base: Any, undrawn: list[int]) -> Any:
    """The sampler of vLLM's second GPU runner."""

    class ReportingSamplerV2(base):
        log_mass_N: torch.Tensor | None = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _with_mass(super().__call__(*args, **kwargs), self.log_mass_N)

        def sample(self, logits: torch.Tensor, rows: Any, *args: Any, **kwargs: Any) -> Any:
            self.log_mass_N, self.sampling_states.log_total_N = None, None
            drawn = _without(logits, undrawn) if undrawn else logits
            sampled, processed_NV = super().sample(drawn, rows, *args, **kwargs)
            total_N = self.sampling_states.log_total_N
            if total_N is None and not undrawn:
                return sampled, processed_NV
            kept_N = processed_NV.float().logsumexp(-1)
            if undrawn:
                temperature_N = self.sampling_states.temperature.gpu[rows]
                temperature_N = torch.where(temperature_N < _GREEDY_BELOW, 1.0, temperature_N)
                left_N = (logits[:, undrawn].float() / temperature_N[:, None]).logsumexp(-1)
                total_N = torch.logaddexp(kept_N if total_N is None else total_N, left_N)
            self.log_mass_N = kept_N - total_N
            return sampled, processed_NV

    return ReportingSamplerV2
