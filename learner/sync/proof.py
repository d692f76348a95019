"""Proof of sync: does every server sample from the weights that the learner has?

A fixed probe of a few token sequences is scored by the learner's own model and by each server's `/v1/score`. What each
check catches:

- **Receipt** (`learner.sync.publisher`): the checksum is read back from the slot on every worker. Catches bytes
  that did not arrive or went elsewhere; says nothing on whether the engine uses the slot.
- **Gap**: max |served - own| over the probe, at the base and at the proven version. Catches another base,
  tokenizer or dtype, a missing module, a wrong scaling, a stale cache, a push that did not take effect, as
  soon as the difference is larger than the tolerance of the dtype.
- **Movement**: the change of the served logprobs since an earlier version against the change of the
  learner's own, as the slope of a regression through the origin: 1 when the server follows, 0 when it did not
  move, 2 when it adds the adapter twice. Judged as soon as the learner's own change stands out from the
  rounding noise (MIN_SIGNAL), long before it reaches the tolerance: constant differences cancel. References
  are step 0, so that small steps add up, and the last proof, so that a server that got stuck later is seen.
- **Canary**: early updates can be smaller than what the server's dtype resolves (learning rate 1e-6 in
  bfloat16): then neither check above can tell. So before step 0 a throw-away adapter with a large effect is
  pushed as a run of its own, must move the served logprobs as it moves the learner's, and is deleted. It
  proves the way from push to logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from learner.adapters.exporter import active_adapter, lora_layers
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from learner.sync.tolerance import Measurement, derived_tolerance, merge_noise, noise, slope
from learner.utils.distributed import OnMain, gathered, on_one_rank, overwrite, reshard
from shared.errors import BaseMismatch, InstallFailed, LockstepError
from shared.rollouts import PolicySelector, ScoreRequest, ScoreResponse
from shared.weights import ServerState, WeightVersion

#: How far the slope may be from 1; the canary's signal is far above any noise.
SLOPE_SLACK = 0.5
CANARY_SLACK = 0.2
#: The canary moves the probe by so many times the noise, and by no less than CANARY_NATS (rms). Not by more:
#: where the effect saturates, twice the adapter does not show as twice the change.
CANARY_SIGNAL = 20.0
CANARY_NATS = 0.05
#: For a few hundred tokens, behind whatever the server has to do; a path that has died shows no other way.
_SCORE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class _Own:
    """The learner's side of a measurement."""

    version: WeightVersion | None
    logprobs: np.ndarray
    logit_std: float
    logit_max: float


class SyncProof:
    """Scores a fixed probe on both sides and compares. Collective: with several ranks all run the forward, rank 0 asks.

    Attributes:
        sequences: token ids of the probe.
        last: measurement of the last check, of the server with the largest gap.
        max_gap: largest |served - own| of all checks, in nats.
        slope: of the last check, None where the policy has not moved enough to tell.
    """

    def __init__(
        self,
        pool: ServerPool,
        model: PeftModel,
        sequences: list[list[int]],
        *,
        tolerance: float | None = None,
        on_main: OnMain = on_one_rank,
    ) -> None:
        self._fleet = pool
        self.model = model
        self.sequences = [sequence for sequence in sequences if len(sequence) > 1]
        self.fixed_tolerance = tolerance
        self._on_main = on_main
        self._own_base: _Own | None = None
        #: Server -> its measurement at the version this learner began with, and at the last check.
        self._first: dict[str, Measurement] = {}
        self._latest: dict[str, Measurement] = {}
        self.last: Measurement | None = None
        self.max_gap = 0.0
        self.slope: float | None = None

    def check_base(self) -> list[Measurement]:
        """Compare the bases, without any adapter."""
        self._own_base = self._own(None)
        measurements = self._measure(self._own_base)
        for measurement in measurements:
            self._check_gap(measurement)
        return measurements

    def check_newcomer(self, client: RolloutClient, state: ServerState) -> None:
        """Compare the base of a server that joins, if ours was measured. Not collective.

        Raises:
            LockstepError: `base_mismatch` if it is another.
        """
        if self._own_base is None:
            return
        answer = client.score(ScoreRequest(sequences=self.sequences, policy="base"), _SCORE_TIMEOUT_S)
        measurement = self._compare(self._own_base, client.url, state, answer)
        if measurement.max_gap > measurement.tolerance:
            raise BaseMismatch(
                f"its base's logprobs differ from the learner's by {measurement.max_gap:.3g} (tolerance "
                f"{measurement.tolerance:.3g}): start that server on the same checkpoint and dtype"
            )

    def check(self, version: WeightVersion) -> Measurement:
        """Compare at `version`, which must be served and be what the model holds now; the largest gap of any server.

        Raises:
            LockstepError: `install_failed`, naming the version and both values.
        """
        measurements = self._measure(self._own(version))
        slopes: list[float | None] = []
        for now in measurements:
            self._check_gap(now)
            references = [known[now.server] for known in (self._first, self._latest) if now.server in known]
            slopes += [self._check_movement(reference, now) for reference in references]
            self._first.setdefault(now.server, now)
            self._latest[now.server] = now
        self.slope = next((s for s in slopes if s is not None), None)
        self.last = max(measurements, key=lambda m: m.max_gap)
        return self.last

    def canary(self, push: Callable[[], WeightVersion]) -> float:
        """Push an adapter with a large effect and see it in the served logprobs; the model stays as it is.

        Args:
            push: sends the model's present adapter to a run of its own and answers its version.

        Returns:
            The slope, near 1: that of the server that is farthest from it.

        Raises:
            LockstepError: `install_failed` if a server does not follow.
        """
        base = {measurement.server: measurement for measurement in self.check_base()}
        loudest = max(map(noise, base.values()))
        own = next(iter(base.values())).own
        with _loud_adapter(self, own, max(CANARY_SIGNAL * loudest, CANARY_NATS)):
            louds = self._measure(self._own(push()))
        slopes = []
        for loud in louds:
            self._check_gap(loud)
            seen = self._check_movement(base[loud.server], loud, CANARY_SLACK)
            if seen is None:
                raise _failed("the canary adapter moves the learner's own logprobs too little to prove anything")
            slopes.append(seen)
        return max(slopes, key=lambda seen: abs(seen - 1.0))

    def own_logprobs(self, *, adapter: bool = True) -> tuple[np.ndarray, float, float]:
        """Teacher-forced logprobs of the probe [N] by the learner's model, std and max of its logits.

        In eval mode, without dropout and autocast: the weights in their own dtype, log-softmax in float32.
        """
        was_training = self.model.training
        self.model.eval()
        device = self.model.get_input_embeddings().weight.device
        logprobs, variances, largest = [], [], 0.0
        try:
            with torch.no_grad(), nullcontext() if adapter else self.model.disable_adapter():
                for sequence in self.sequences:
                    ids_1T = torch.tensor([sequence], device=device)
                    logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
                    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
                    logprobs.append(logprobs_TV.gather(-1, ids_1T[0, 1:, None])[:, 0].double().cpu().numpy())
                    variances.append(logits_TV.var(dim=-1).mean().item())
                    largest = max(largest, logits_TV.abs().max().item())
                reshard(self.model)
        finally:
            self.model.train(was_training)
        # Rank 0's figures for all, so that all draw the same conclusions.
        return self._on_main(lambda: (np.concatenate(logprobs), math.sqrt(sum(variances) / len(variances)), largest))

    def _own(self, version: WeightVersion | None) -> _Own:
        return _Own(version, *self.own_logprobs(adapter=version is not None))

    def _measure(self, own: _Own) -> list[Measurement]:
        """One for each server that is up; of the rest the fleet knows."""
        version = own.version
        policy: PolicySelector = version or "base"
        request = ScoreRequest(sequences=self.sequences, policy=policy, run_id=version.run_id if version else None)

        def ask(replica: Replica) -> tuple[str, ServerState, ScoreResponse]:
            return replica.url, replica.known, replica.client.score(request, _SCORE_TIMEOUT_S)

        answers = self._on_main(lambda: self._fleet.ask_all(ask, "proof"))
        return [self._compare(own, *answer) for answer in answers]

    def _compare(self, own: _Own, url: str, state: ServerState, answer: ScoreResponse) -> Measurement:
        version = own.version
        served = np.array([logprob for row in answer.logprobs for logprob in row], dtype=np.float64)
        if answer.version != version or served.shape != own.logprobs.shape or not np.isfinite(served).all():
            raise _failed(
                f"{url} scored {served.size} tokens by {answer.version}, not the {own.logprobs.size} by {version}"
            )
        config = self.model.get_base_model().config.get_text_config()
        layers, rounding = config.num_hidden_layers, 0.0
        if state.apply == "merge" and version:
            rounding = merge_noise(state.dtype, layers=layers, logit_std=own.logit_std)
        derived = derived_tolerance(
            [_computed_in(self.model), state.dtype],
            layers=layers,
            width=config.hidden_size,
            logit_std=own.logit_std,
            logit_max=own.logit_max,
            merge_noise=rounding,
        )
        tolerance = self.fixed_tolerance or derived
        return Measurement(version, own.logprobs, served, tolerance, rounding, f"{url}, epoch {answer.epoch}")

    def _check_gap(self, m: Measurement) -> None:
        self.max_gap = max(self.max_gap, m.max_gap)
        if m.max_gap <= m.tolerance:
            return
        worst = int(np.abs(m.served - m.own).argmax())
        row, position = self._locate(worst)
        what = f"version {m.version}" if m.version else "the base (no adapter)"
        hint = (
            "the server does not sample from the weights that were pushed"
            if m.version
            else "learner and server do not hold the same base, or compute it in very different precision"
        )
        raise _failed(
            f"at {what} the logprob of the server at {m.server} of token {position} of probe sequence {row} is "
            f"{m.served[worst]:.6f}, the learner's {m.own[worst]:.6f}: a gap of {m.max_gap:.3g}, tolerance "
            f"{m.tolerance:.3g}. {hint}. Compare model, revision and dtype on both sides; proof_tolerance "
            "overrides the derived tolerance"
        )

    def _check_movement(self, reference: Measurement, now: Measurement, slack: float = SLOPE_SLACK) -> float | None:
        seen = slope(reference, now)
        if seen is not None and abs(seen - 1.0) > slack:
            own, served = now.own - reference.own, now.served - reference.served
            most = int(np.abs(own).argmax())
            row, position = self._locate(most)
            raise _failed(
                f"from {reference.version or 'the base'} to {now.version} the learner's logprobs moved, those of the "
                f"server at {now.server} followed by a factor of {seen:.2f} instead of 1: token {position} of probe "
                f"sequence {row} moved by {own[most]:.3g} here and by {served[most]:.3g} there. The push has "
                "not (or not rightly) taken effect; restart the rollout server"
            )
        return seen

    def _locate(self, flat: int) -> tuple[int, int]:
        """(sequence, position of the token in it) of a flat index."""
        for row, sequence in enumerate(self.sequences):
            if flat < len(sequence) - 1:
                return row, flat + 1
            flat -= len(sequence) - 1
        raise IndexError(flat)


def _computed_in(model: PeftModel) -> str:
    """The coarser dtype of base and adapter."""
    adapter = next(iter(lora_layers(model, active_adapter(model)).values())).lora_A[active_adapter(model)].weight
    coarser = max(model.get_base_model().dtype, adapter.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return str(coarser).removeprefix("torch.")


@contextmanager
def _loud_adapter(proof: SyncProof, base_logprobs: np.ndarray, nats: float) -> Iterator[None]:
    """Random B, doubled until the probe's logprobs move by `nats` (rms); put back to the bit at the end."""
    model = proof.model
    layers = lora_layers(model, active_adapter(model))
    weights = [layer.lora_B[active_adapter(model)].weight for layer in layers.values()]
    with gathered(weights):
        kept = [weight.detach().clone() for weight in weights]
    # A generator of its own, so that the training's random numbers are not used up.
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            with gathered(weights, written=True):
                for weight in weights:
                    overwrite(weight, torch.randn(weight.shape, generator=generator) * 2.0**-10)
            for _ in range(16):
                moved = proof.own_logprobs()[0] - base_logprobs
                if np.sqrt(np.mean(moved**2)) >= nats:
                    break
                with gathered(weights, written=True):
                    for weight in weights:
                        weight.mul_(2.0)
        yield
    finally:
        with torch.no_grad(), gathered(weights, written=True):
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def _failed(message: str) -> LockstepError:
    return InstallFailed(f"proof of sync failed: {message}")
