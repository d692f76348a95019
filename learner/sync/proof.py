"""Proof of sync: does every server sample from the weights that the learner has?

The learner's own model and each server's `/v1/score` score a fixed probe of a few token sequences. Each check detects
something else:

- **Receipt** (`learner.sync.publisher`): the checksum is read back from the slot on every worker. Detects bytes
  that did not arrive or went elsewhere; does not show whether the engine uses the slot.
- **Base**: served - own without an adapter, in prefill, on one sequence as long as prompt and completion may be, and of
  tokens that were decoded. Held to what the dtypes explain. Detects another base, tokenizer, dtype or position
  encoding. Its rms is the noise of this very pair, which calibrates what follows.
- **Mismatch**: served - own at the proven version, held to a few times that noise (rms). A pair that loses small
  updates (below) may exceed it, while no mismatch is larger than the dtypes explain. Detects a missing module, a wrong
  scaling, a stale cache.
- **Movement**: the change of the served logprobs since an earlier proof against the change of the learner's own, as the
  slope of a regression through the origin: 1 when the server follows, 0 when it did not move, 2 when it adds the
  adapter twice. Judged where the learner's own change is far above the noise (MIN_SIGNAL). References are the first
  proof, so that small steps add up, and the last one.
- **Last step**: the share of the last optimizer step in served logprobs (`learner.sync.evidence`). The step's effect is
  mostly far below the noise; its direction is known exactly, from a pass with the step enlarged. Proof by proof the
  evidence adds up, and names a server that serves the version before.
- **Canary** (`learner.sync.canary`): before step 0, and later, an adapter with a large effect of every module.
- **Samples**: the mismatch of every on-policy batch, which decoding has made, is held to that noise too.

Where a side rounds to 16 bits before it adds the adapter (`--apply adapter` and `merge`, PEFT under autocast), most of
a small update never reaches the logprobs. Then a server that serves the version before looks like one that serves the
version pushed, and small movements prove nothing: shares are reported, and raise no alarm.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from learner.adapters.exporter import TORCH_DTYPES, active_adapter, lora_layers
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.servers.prompts import images_of
from learner.sync.evidence import Evidence, Share, Suspicion, closest, without
from learner.sync.probe import LONG_TOKENS, SEEN_TOKENS, AdapterWeights, LearnerLogprobs, Probe, ProbeText
from learner.sync.tolerance import (
    FLOOR,
    MAX_SLACK,
    MIN_SIGNAL,
    QUANTIZED_RMS,
    RMS_SLACK,
    SAFETY,
    Measurement,
    derived_tolerance,
    merge_noise,
    slope,
)
from learner.utils.distributed import OnMain, on_one_rank
from shared.errors import BaseMismatch, InstallFailed
from shared.rollouts import ScoreRequest, ScoreResponse
from shared.weights import ServerState, WeightVersion

logger = logging.getLogger("lockstep.sync")

#: How far the slope of a movement may be from 1; and its least value where rounding takes most of small updates.
SLOPE_SLACK, LEAST_SLOPE = 0.5, 0.03
#: The last step is enlarged until the probe moves by so much (rms, nats), at most LARGEST times: well above rounding,
#: and so little that twice the step is twice the movement.
STEP_NATS, LARGEST = 0.25, 256.0
#: Warned of where less than this part of a step arrives, by four standard errors.
_LITTLE = 0.5
#: For a few hundred tokens, queued behind other requests; a connection that has died shows in no other way.
_SCORE_TIMEOUT_S = 120.0


class SyncProof:
    """Scores a fixed probe on both sides and compares. Collective: all ranks run the forward, rank 0 asks the servers.

    Args:
        text: the probe; sequences of one token are left out.
        tolerance: of the mismatch, in nats, instead of the derived ones.
        autocast: dtype of the training's autocast, if it has one.
        one_product: whether every LoRA layer of the learner computes base and adapter with one rounding.
        same_base: whether fingerprints have shown that all servers hold the learner's base.

    Attributes:
        last: of the last check, failed or not, the measurement with the largest mismatch.
        max_mismatch: largest |served - own| of all checks, in nats.
        slope: of the last check; None where the policy has not moved enough to tell.
        step_share: of the last check, the least share of the last step that a server serves; None: unknown, as where
            a missing step would show in the mismatch.
    """

    def __init__(
        self,
        pool: ServerPool,
        model: PeftModel,
        text: ProbeText | list[list[int]],
        *,
        tolerance: float | None = None,
        autocast: str | None = None,
        one_product: bool = False,
        same_base: bool = False,
        on_main: OnMain = on_one_rank,
    ) -> None:
        text = text if isinstance(text, ProbeText) else ProbeText([s for s in text if len(s) > 1])
        self._pool, self.model, self.on_main, self._decoded = pool, model, on_main, text.decoded
        self.probe = Probe(model, text.sequences, on_main=on_main)
        self._long = Probe(model, [text.long], last=LONG_TOKENS, on_main=on_main) if text.long else None
        self._seen = None
        if text.seen:
            self._seen = Probe(model, [text.seen.token_ids], last=SEEN_TOKENS, inputs=text.seen.inputs, on_main=on_main)
        self.weights = AdapterWeights(model)
        self.fixed_tolerance, self._autocast, self._same_base = tolerance, autocast, same_base
        self._one_product = one_product
        self._base: LearnerLogprobs | None = None
        #: Server -> its measurement without an adapter.
        self.bases: dict[str, Measurement] = {}
        #: The same of the image.
        self._seen_bases: dict[str, Measurement] = {}
        #: Server -> its measurements at this learner's first version, and at the last check.
        self._references = defaultdict[str, list[Measurement]](list)
        self._suspicions = defaultdict[str, Suspicion](Suspicion)
        self._step_before: list[torch.Tensor] | None = None
        self._enlarged = 1.0
        self._warned = False
        self._sampled_rms: float | None = None
        self.last: Measurement | None = None
        self.max_mismatch = 0.0
        self.slope: float | None = None
        self.step_share: Share | None = None

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of the probe, [N][T]."""
        return self.probe.sequences

    @property
    def compute_dtype(self) -> str:
        """The coarsest dtype in which the learner computes: of base, adapter or autocast."""
        adapter = active_adapter(self.model)
        lora = next(iter(lora_layers(self.model, adapter).values()))
        dtypes = [self.model.get_base_model().dtype, lora.lora_A[adapter].weight.dtype]
        dtypes += [TORCH_DTYPES[self._autocast]] if self._autocast else []
        return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")

    def check_base(self) -> list[Measurement]:
        """Compare the bases, without any adapter; return one measurement per server.

        Raises:
            InstallFailed: a mismatch exceeds the tolerance.
        """
        for probe in filter(None, (self._long, self._seen)):
            for measurement in self.measure(probe.logprobs(adapter=False), None, probe):
                self.check_mismatch(measurement, probe)
                if probe is self._seen:
                    self._seen_bases[measurement.server] = measurement
        self._base = self.probe.logprobs(adapter=False)
        measurements = self.measure(self._base, None)
        for measurement in measurements:
            self.check_mismatch(measurement)
            self.bases[measurement.server] = measurement
        self._check_decoded(measurements[0])
        return measurements

    def check_newcomer(self, client: RolloutClient, state: ServerState) -> Measurement | None:
        """Compare the base of a server that joins, if the learner's was measured; return what was. Not collective.

        Raises:
            BaseMismatch: it is another.
        """
        if self._base is None:
            return None
        answer = client.score(ScoreRequest(sequences=self.sequences, policy="base"), _SCORE_TIMEOUT_S)
        measurement = self.compare(self._base, None, client.url, state, answer)
        if not measurement.is_acceptable:
            raise BaseMismatch(
                f"its base's logprobs differ from the learner's by {measurement.max_mismatch:.3g} (tolerance "
                f"{measurement.tolerance:.3g}): start that server on the same checkpoint and dtype"
            )
        self.bases[measurement.server] = measurement
        return measurement

    def keep_step(self) -> None:
        """Remember the adapter, for the next check: that of the step before. Collective."""
        self._step_before = self.weights.copied()

    def check(self, version: WeightVersion) -> Measurement:
        """Compare at `version`, which must be served and be what the model holds now. Collective.

        Returns:
            The measurement with the largest mismatch.

        Raises:
            InstallFailed: a server does not sample from `version`; the message names it and what it may serve.
        """
        with self.weights.held_in(self._served_dtype):
            own = self.probe.logprobs()
            seen = self._seen.logprobs() if self._seen else None
            step = None if self.on_main(lambda: self._would_see_a_step(own, version)) else self._last_step()
        measurements = self.measure(own, version)
        self.last = max(measurements, key=lambda m: m.max_mismatch)
        if seen:
            for measurement in self.measure(seen, version, self._seen):
                self.check_mismatch(measurement, self._seen)
        self.step_share, self.slope = None, None
        for now in measurements:
            self.check_mismatch(now)
            references = self._references[now.server]
            slopes = [self._check_movement(reference, now) for reference in references]
            self.slope = next((s for s in slopes if s is not None), self.slope)
            if step is not None:
                self._check_step(now, step)
            references[1:] = [now]
        return self.last

    @cached_property
    def _served_dtype(self) -> torch.dtype:
        """The dtype of adapters, the same on all servers. Collective at its first use."""
        return TORCH_DTYPES[self.on_main(lambda: self._pool.available()[0].known.lora_dtype)]

    def check_sampled(self, rms: float, tokens: int, temperature: float = 1.0) -> None:
        """Hold the mismatch of sampled tokens of the present version to that of the probe and of the first batch.

        Args:
            rms: of served - own over `tokens` sampled tokens, in nats.
            temperature: at which they were drawn; logprobs, and their noise, are those of logits divided by it.

        Raises:
            InstallFailed: it exceeds the tolerance.
        """
        if not self.bases or not tokens or not all(base.is_decisive for base in self.bases.values()):
            return
        noise = max(m.rms_mismatch for m in self.bases.values()) / min(temperature or 1.0, 1.0)
        known = max(noise, FLOOR, self._sampled_rms or 0.0)
        limit = RMS_SLACK * (1 + 8 / math.sqrt(tokens)) * known  # few tokens may all be unlucky ones
        if self.fixed_tolerance is not None:
            limit = self.fixed_tolerance
        if rms > limit:
            raise InstallFailed(
                f"proof of sync failed: the logprobs of {tokens} sampled tokens differ from the learner's by {rms:.3g} "
                f"(rms, nats), tolerance {limit:.3g}: the servers do not decode with the weights that were pushed; "
                "proof_tolerance overrides the tolerance"
            )
        if self._sampled_rms is None:
            self._sampled_rms = rms

    def measure(
        self, own: LearnerLogprobs, version: WeightVersion | None, probe: Probe | None = None
    ) -> list[Measurement]:
        """Score the probe on each server that is up; None: its base."""
        probe = probe or self.probe
        run_id = version.run_id if version else None
        images = [images_of(sequence) for sequence in probe.sequences]
        request = ScoreRequest(
            sequences=[list(sequence) for sequence in probe.sequences],
            images=images if any(images) else [],
            policy=version or "base",
            run_id=run_id,
        )
        answers = self.on_main(
            lambda: self._pool.ask_all(lambda r: (r.url, r.known, r.client.score(request, _SCORE_TIMEOUT_S)), "proof")
        )
        return [self.compare(own, version, url, state, answer, probe) for url, state, answer in answers]

    def compare(
        self,
        own: LearnerLogprobs,
        version: WeightVersion | None,
        url: str,
        state: ServerState,
        answer: ScoreResponse,
        probe: Probe | None = None,
    ) -> Measurement:
        """Return the measurement of what a server has answered."""
        probe = probe or self.probe
        lengths = [len(row) for row in answer.logprobs]
        if answer.version != version or lengths != [len(sequence) - 1 for sequence in probe.sequences]:
            raise InstallFailed(
                f"proof of sync failed: {url} scored {sum(lengths)} tokens by {answer.version}, not those of the "
                f"probe by {version}"
            )
        if missing := int((~np.isfinite(own.values)).sum()):
            raise InstallFailed(
                f"proof of sync failed: the learner itself has no finite logprob for {missing} of {own.values.size} "
                f"probe tokens at {version or 'the base'}: its weights have diverged, or its attention or precision "
                "computes NaN (attn_implementation, fp16)"
            )
        served = probe.picked(answer.logprobs)
        if missing := int((~np.isfinite(served)).sum()):
            raise InstallFailed(
                f"proof of sync failed: {url} has no finite logprob for {missing} of {served.size} probe tokens at "
                f"{version or 'the base'}: it computes NaN or infinity; start it with --dtype bfloat16 if it computes "
                "in float16"
            )
        server = f"{url}, epoch {answer.epoch}"
        layers, rounding = int(self._config.num_hidden_layers), 0.0
        if state.apply == "merge" and version:
            rounding = merge_noise(state.dtype, layers=layers, logit_std=own.logit_std)
        limits = self._tolerances(own, state, version, server, rounding, seen=probe is self._seen)
        decisive = self._carries_small_updates(state)
        return Measurement(version, own.values, served, limits[0], rounding, server, state.dtype, *limits[1:], decisive)

    def _carries_small_updates(self, state: ServerState) -> bool:
        """Whether small updates reach the logprobs of both sides: in float32, or with one rounding."""
        served = state.dtype == "float32" or (state.apply == "columns" and state.quantization is None)
        return served and (self.compute_dtype == "float32" or self._one_product)

    @property
    def _config(self) -> Any:
        """Configuration of the language model."""
        return self.model.get_base_model().config.get_text_config()

    def _tolerances(
        self,
        own: LearnerLogprobs,
        state: ServerState,
        version: WeightVersion | None,
        server: str,
        rounding: float,
        *,
        seen: bool,
    ) -> tuple[float, float, float]:
        """Return the largest mismatch and the largest rms to accept, and the rms up to which any mismatch is."""
        if self.fixed_tolerance is not None:
            return self.fixed_tolerance, math.inf, 0.0
        derived = derived_tolerance(
            [self.compute_dtype, state.dtype],
            layers=self._config.num_hidden_layers,
            linear_layers=list(getattr(self._config, "layer_types", None) or ()).count("linear_attention"),
            width=self._config.hidden_size,
            logit_std=own.logit_std,
            logit_max=own.logit_max,
            merge_noise=rounding,
        )
        base = (self._seen_bases if seen else self.bases).get(server)
        if version is None:
            return (math.inf, QUANTIZED_RMS, 0.0) if state.quantization else (derived, math.inf, 0.0)
        if base is None:
            return derived, math.inf, 0.0
        calibrated = RMS_SLACK * max(base.rms_mismatch, FLOOR / SAFETY)
        if not self._carries_small_updates(state):
            # Of a policy that has become surer of itself, a token in thousands is further off than is derived.
            return max(derived, MAX_SLACK * calibrated) if state.quantization else derived, math.inf, calibrated
        # A policy that has become surer of itself rounds more coarsely: what the last proof has shown counts, too.
        references = self._references.get(server)
        if references and not seen:
            calibrated = max(calibrated, RMS_SLACK * min(references[-1].rms_mismatch, derived / SAFETY))
        # The largest follows from the rms: one improbable token may be far off.
        return calibrated * math.sqrt(own.values.size), calibrated, 0.0

    def check_mismatch(self, m: Measurement, probe: Probe | None = None) -> None:
        """Raise `InstallFailed` if served and own logprobs differ by more than the tolerances."""
        self.max_mismatch = max(self.max_mismatch, m.max_mismatch)
        if m.is_acceptable:
            return
        worst = int(np.abs(m.mismatch).argmax())
        row, position = (probe or self.probe).places[worst]
        what = f"version {m.version}" if m.version else "the base (no adapter)"
        limit = min(m.rms_tolerance, m.usual_rms or math.inf)
        rms = f"; rms {m.rms_mismatch:.3g}, tolerance {limit:.3g}" if math.isfinite(limit) else ""
        hint = "the server does not sample from the weights that were pushed" if m.version else self._base_hint(m)
        raise InstallFailed(
            f"proof of sync failed: at {what} the logprob of the server at {m.server} of token {position} of probe "
            f"sequence {row} is {m.served[worst]:.6f}, the learner's {m.own[worst]:.6f}: a mismatch of "
            f"{m.max_mismatch:.3g}, tolerance {m.tolerance:.3g}{rms}. {hint}; proof_tolerance overrides the derived "
            "tolerance"
        )

    def _check_decoded(self, base: Measurement) -> None:
        """Compare logprobs that a server returned as it drew tokens from its base: those of decoding, not prefill."""
        picked = [(base.own[self.probe.rows == row][-len(drawn) :], drawn) for row, drawn in self._decoded.items()]
        if not picked:
            return
        own, served = np.concatenate([o for o, _ in picked]), np.concatenate([np.array(d, float) for _, d in picked])
        finite = np.isfinite(served)
        rms = float(np.sqrt(np.mean((served - own)[finite] ** 2))) if finite.any() else 0.0
        limit = max(base.tolerance / SAFETY, RMS_SLACK * base.rms_mismatch, FLOOR)
        if self.fixed_tolerance is not None:
            limit = self.fixed_tolerance
        if rms > limit:
            raise InstallFailed(
                f"proof of sync failed: logprobs that came with {finite.sum()} tokens drawn from the base differ from "
                f"the learner's by {rms:.3g} (rms, nats), tolerance {limit:.3g}, although scoring them agrees: the "
                f"server decodes another policy than it scores. {self._base_hint(base)}"
            )

    def _base_hint(self, m: Measurement) -> str:
        """Return why the bases differ, and what to set."""
        own, same = self.compute_dtype, "learner and server hold the same base (by its fingerprint)"
        if not self._same_base:
            same = "learner and server may not hold the same base: compare model and revision"
        if own == m.dtype:
            return f"{same}, and both compute in {own}: compare the versions of vLLM and transformers"
        precision = f"the learner computes in {own}, the server in {m.dtype}: give both the same --dtype"
        if own == self._autocast != str(self.model.get_base_model().dtype).removeprefix("torch."):
            precision = (
                f"the learner computes in {own} by autocast, the server in {m.dtype}: set bf16=false and fp16=false, "
                f"or start the server with --dtype {own}"
            )
        return f"{same}, and {precision}"

    def _check_movement(self, reference: Measurement, now: Measurement) -> float | None:
        """Return the slope of served and own change since `reference`, if the learner's own is far above the noise.

        Raises:
            InstallFailed: it is not near 1; where a side loses updates in rounding, not even above 0.
        """
        seen = slope(reference, now)
        least = 1.0 - SLOPE_SLACK if now.is_decisive else LEAST_SLOPE
        if seen is not None and not least <= seen <= 1.0 + SLOPE_SLACK:
            own, served = now.own - reference.own, now.served - reference.served
            most = int(np.abs(own).argmax())
            row, position = self.probe.places[most]
            raise InstallFailed(
                f"proof of sync failed: from {reference.version or 'the base'} to {now.version} the learner's logprobs "
                f"moved, those of the server at {now.server} followed by a factor of {seen:.2f} instead of 1: token "
                f"{position} of probe sequence {row} moved by {own[most]:.3g} here and by {served[most]:.3g} there. "
                "The push has not (or not correctly) taken effect; restart the rollout server"
            )
        return seen

    def _would_see_a_step(self, own: LearnerLogprobs, version: WeightVersion) -> bool:
        """Whether this step would exceed the tolerance of the mismatch if it were missing, by the last proof's own."""
        last = self.last
        if last is None or last.version is None or last.version.step != version.step - 1:
            return False
        limits = [RMS_SLACK * max(base.rms_mismatch, FLOOR / SAFETY) for base in self.bases.values()]
        decisive = self.fixed_tolerance is None and all(base.is_decisive for base in self.bases.values())
        rms = float(np.sqrt(np.mean((own.values - last.own) ** 2)))
        return bool(limits) and decisive and rms > MIN_SIGNAL * max(limits)

    def _last_step(self) -> np.ndarray | None:
        """Return how the last optimizer step d has moved the learner's logprobs, [N]; None: not known. Collective.

        A step that moves them by less than rounding does is enlarged k times: (o(w + k d) - o(w - k d)) / 2k, whose
        noise is k times smaller. The pass at w has no part in it: its rounding is in served minus own logprobs, too.
        """
        before, self._step_before = self._step_before, None
        if before is None:
            return None
        before = self.weights.rounded(before, self._served_dtype)
        with self.weights.kept() as present:
            for _ in range(4):
                factor, seen = self._enlarged, []
                for k in (factor, -factor):
                    self.weights.write([w + k * (w - b) for w, b in zip(present, before, strict=True)])
                    seen.append(self.probe.logprobs().values)
                moved_N = (seen[0] - seen[1]) / 2
                rms = float(np.sqrt(np.mean(moved_N**2)))
                if not rms:
                    return None
                if math.isnan(rms):  # enlarged so much that it overflows
                    rms = math.inf
                self._enlarged = min(max(factor * STEP_NATS / rms, 1 / 4), LARGEST)
                if 0.3 < self._enlarged / factor < 3.0:
                    break
        return moved_N / factor if np.isfinite(moved_N).all() else None

    def _check_step(self, now: Measurement, step_N: np.ndarray) -> None:
        """Add what this proof knows of the last step to the evidence against a server."""
        assert now.version
        base = self.bases.get(now.server)
        residual_N = without(now.mismatch, base.mismatch) if base else now.mismatch
        evidence = Evidence.of(residual_N, step_N, self.probe.rows, FLOOR / SAFETY)
        found = evidence.share()
        if found is None:
            return
        if self.step_share is None or found.value < self.step_share.value:
            self.step_share = found
        if not now.is_decisive and not self._warned and found.value + 4 * found.error < _LITTLE:
            self._warned = True
            logger.warning(
                "of the last step %.2f (standard error %.2f) reaches the logprobs of %s: it, or the learner, rounds to "
                "16 bits before the adapter is added, and a server that serves the version before would look the same. "
                "Start it with --apply columns, and leave packed_passes on (said once, logged as lockstep/step_share)",
                *(found.value, found.error, now.server),
            )
        if now.is_decisive and self._suspicions[now.server].add(evidence):
            raise InstallFailed(self._accusation(now, step_N, found))

    def _accusation(self, now: Measurement, step_N: np.ndarray, found: Share) -> str:
        assert now.version
        before = now.version.model_copy(update={"step": max(now.version.step - 1, 0)})
        versions = {str(now.version): now.own, str(before): now.own - step_N}
        versions |= {str(reference.version): reference.own for reference in self._references[now.server]}
        if self._base is not None:
            versions["the base"] = self._base.values
        return (
            f"proof of sync failed: the server at {now.server} does not serve {now.version}: of the last step "
            f"{found.value:.2f} (standard error {found.error:.2f}) has arrived, and the evidence of the proofs so far "
            f"is e^{self._suspicions[now.server].total:.0f} for the version before. Its logprobs are closest to those "
            f"of {closest(now.served, versions)}. Restart the rollout server"
        )
