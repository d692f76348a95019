"""Proof of sync: does every server sample from the weights that the learner has?

The learner's own model and each server's `/v1/score` score a fixed probe of a few token sequences. Each check detects
something else:

- **Receipt** (`learner.sync.publisher`): the checksum is read back from the slot on every worker. Detects bytes
  that did not arrive or went elsewhere; does not show whether the engine uses the slot.
- **Mismatch**: max |served - own| over the probe, at the base and at the proven version. Detects another base,
  tokenizer or dtype, a missing module, a wrong scaling, a stale cache, a push without effect, as soon as the difference
  exceeds the tolerance of the dtype; that of autocast where the training has one, since the learner's side computes
  under it, too.
- **Movement**: the change of the served logprobs since an earlier version against the change of the learner's own, as
  the slope of a regression through the origin: 1 when the server follows, 0 when it did not move, 2 when it adds the
  adapter twice. Judged as soon as the learner's own change exceeds the rounding noise (MIN_SIGNAL), long before it
  reaches the tolerance: constant differences cancel. References are step 0, so that small steps add up, and the last
  proof, so that a server that got stuck later is detected.
- **Canary**: early updates can be smaller than the resolution of the server's dtype (learning rate 1e-6 in bfloat16):
  then neither check above can tell, nor whether updates are lost to rounding. So before step 0 a throw-away adapter
  with a large effect is pushed as a run of its own, must move the served logprobs as it moves the learner's, and is
  deleted. It proves the way from push to logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from learner.adapters.exporter import TORCH_DTYPES, active_adapter, lora_layers
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool, serve_base
from learner.sync.publisher import Publisher
from learner.sync.tolerance import Measurement, derived_tolerance, merge_noise, slope
from learner.utils.cleanup import finally_do
from learner.utils.distributed import OnMain, gathered, on_one_rank, overwrite, reshard
from shared.errors import BaseMismatch, InstallFailed, NoFreeRun
from shared.rollouts import GenerateRequest, Prompt, ScoreRequest, ScoreResponse
from shared.sampling import SamplingParams
from shared.weights import ServerState, WeightVersion

#: The probe.
SEQUENCES, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 64, 24
#: How far the slope may be from 1; the canary's signal is far above any noise.
SLOPE_SLACK = 0.5
CANARY_SLACK = 0.2
#: The canary moves the probe by so many times the noise, and by no less than CANARY_NATS (rms). Not by more:
#: where the effect saturates, twice the adapter does not show as twice the change.
CANARY_SIGNAL = 20.0
CANARY_NATS = 0.05
#: For a few hundred tokens, queued behind other requests; a connection that has died shows in no other way.
_SCORE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class LearnerLogprobs:
    """The learner's side of a measurement.

    Attributes:
        values: logprobs of all probe tokens, float64 [N].
        logit_std: rms over probe positions of the logits' standard deviation over the vocabulary.
        logit_max: largest |logit|.
    """

    values: np.ndarray
    logit_std: float
    logit_max: float


class SyncProof:
    """Scores a fixed probe on both sides and compares. Collective: all ranks run the forward, rank 0 asks the servers.

    Args:
        sequences: token ids [N][T] of the probe; those of one token are left out.
        tolerance: of the mismatch, in nats, instead of the derived one.
        autocast: dtype of the training's autocast, if it has one.
        same_base: whether fingerprints have shown that all servers hold the learner's base.

    Attributes:
        last: of the last check, the measurement with the largest mismatch.
        max_mismatch: largest |served - own| of all checks, in nats.
        slope: of the last check; None where the policy has not moved enough to tell.
    """

    def __init__(
        self,
        pool: ServerPool,
        model: PeftModel,
        sequences: list[list[int]],
        *,
        tolerance: float | None = None,
        autocast: str | None = None,
        same_base: bool = False,
        on_main: OnMain = on_one_rank,
    ) -> None:
        self._pool, self.model, self._on_main = pool, model, on_main
        self.sequences = [sequence for sequence in sequences if len(sequence) > 1]
        #: Of every scored token: its sequence, and its position there.
        self._places = [(row, t) for row, tokens in enumerate(self.sequences) for t in range(1, len(tokens))]
        self.fixed_tolerance, self._autocast, self._same_base = tolerance, autocast, same_base
        self._base: LearnerLogprobs | None = None
        #: Server -> its measurements at this learner's first version, and at the last check.
        self._references = defaultdict[str, list[Measurement]](list)
        self.last: Measurement | None = None
        self.max_mismatch = 0.0
        self.slope: float | None = None

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
        self._base = self.own_logprobs(adapter=False)
        return self._measure(self._base, None)

    def check_newcomer(self, client: RolloutClient, state: ServerState) -> None:
        """Compare the base of a server that joins, if the learner's was measured. Not collective.

        Raises:
            BaseMismatch: it is another.
        """
        if self._base is None:
            return
        answer = client.score(ScoreRequest(sequences=self.sequences, policy="base"), _SCORE_TIMEOUT_S)
        measurement = self._compare(self._base, None, client.url, state, answer)
        if measurement.max_mismatch > measurement.tolerance:
            raise BaseMismatch(
                f"its base's logprobs differ from the learner's by {measurement.max_mismatch:.3g} (tolerance "
                f"{measurement.tolerance:.3g}): start that server on the same checkpoint and dtype"
            )

    def check(self, version: WeightVersion) -> Measurement:
        """Compare at `version`, which must be served and be what the model holds now.

        Returns:
            The measurement with the largest mismatch.

        Raises:
            InstallFailed: a server does not sample from `version`; the message names it and both values.
        """
        measurements = self._measure(self.own_logprobs(), version)
        slopes: list[float | None] = []
        for now in measurements:
            references = self._references[now.server]
            slopes += [self._check_movement(reference, now) for reference in references]
            references[1:] = [now]
        self.slope = next((s for s in slopes if s is not None), None)
        self.last = max(measurements, key=lambda m: m.max_mismatch)
        return self.last

    def canary(self, push: Callable[[], WeightVersion]) -> float:
        """Push an adapter with a large effect and find it in the served logprobs; the model stays as it is.

        Args:
            push: sends the model's present adapter to a run of its own and returns its version.

        Returns:
            The slope, near 1: that of the server farthest from it.

        Raises:
            InstallFailed: a server does not follow.
        """
        base = {measurement.server: measurement for measurement in self.check_base()}
        own = next(iter(base.values())).own
        noise = max(measurement.noise for measurement in base.values())
        with _loud_adapter(self, own, max(CANARY_SIGNAL * noise, CANARY_NATS)):
            version = push()
            louds = self._measure(self.own_logprobs(), version)
        slopes = [self._check_movement(base[loud.server], loud, CANARY_SLACK) for loud in louds]
        known = [seen for seen in slopes if seen is not None]
        if len(known) < len(slopes):
            raise InstallFailed(
                "proof of sync failed: the canary adapter moves the learner's own logprobs too little to prove anything"
            )
        return max(known, key=lambda seen: abs(seen - 1.0))

    def own_logprobs(self, *, adapter: bool = True) -> LearnerLogprobs:
        """Score the probe with the learner's model, teacher-forced, with or without its adapter. Collective.

        In eval mode, so without dropout, but under the training's autocast if it has one; log-softmax in float32.
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
        std = math.sqrt(sum(variances) / len(variances))
        # Rank 0's figures for all, so that all draw the same conclusions.
        return self._on_main(lambda: LearnerLogprobs(np.concatenate(logprobs), std, largest))

    def _measure(self, own: LearnerLogprobs, version: WeightVersion | None) -> list[Measurement]:
        """Score the probe on each server that is up, and check the mismatch; None: its base."""
        run_id = version.run_id if version else None
        request = ScoreRequest(sequences=self.sequences, policy=version or "base", run_id=run_id)
        answers = self._on_main(
            lambda: self._pool.ask_all(lambda r: (r.url, r.known, r.client.score(request, _SCORE_TIMEOUT_S)), "proof")
        )
        measurements = [self._compare(own, version, *answer) for answer in answers]
        for measurement in measurements:
            self._check_mismatch(measurement)
        return measurements

    def _compare(
        self, own: LearnerLogprobs, version: WeightVersion | None, url: str, state: ServerState, answer: ScoreResponse
    ) -> Measurement:
        served = np.array([logprob for row in answer.logprobs for logprob in row], dtype=np.float64)
        if missing := int((~np.isfinite(served)).sum()):
            raise InstallFailed(
                f"proof of sync failed: {url} has no finite logprob for {missing} of {served.size} probe tokens at "
                f"{version or 'the base'}: it computes NaN or infinity; start it with --dtype bfloat16 if it computes "
                "in float16"
            )
        if answer.version != version or served.shape != own.values.shape:
            raise InstallFailed(
                f"proof of sync failed: {url} scored {served.size} tokens by {answer.version}, not the "
                f"{own.values.size} by {version}"
            )
        config = self.model.get_base_model().config.get_text_config()
        layers, rounding = config.num_hidden_layers, 0.0
        if state.apply == "merge" and version:
            rounding = merge_noise(state.dtype, layers=layers, logit_std=own.logit_std)
        tolerance = self.fixed_tolerance
        if tolerance is None:
            tolerance = derived_tolerance(
                [self.compute_dtype, state.dtype],
                layers=layers,
                width=config.hidden_size,
                logit_std=own.logit_std,
                logit_max=own.logit_max,
                merge_noise=rounding,
            )
        server = f"{url}, epoch {answer.epoch}"
        return Measurement(version, own.values, served, tolerance, rounding, server, state.dtype)

    def _check_mismatch(self, m: Measurement) -> None:
        self.max_mismatch = max(self.max_mismatch, m.max_mismatch)
        if m.max_mismatch <= m.tolerance:
            return
        worst = int(np.abs(m.served - m.own).argmax())
        row, position = self._places[worst]
        what = f"version {m.version}" if m.version else "the base (no adapter)"
        hint = "the server does not sample from the weights that were pushed" if m.version else self._base_hint(m)
        raise InstallFailed(
            f"proof of sync failed: at {what} the logprob of the server at {m.server} of token {position} of probe "
            f"sequence {row} is {m.served[worst]:.6f}, the learner's {m.own[worst]:.6f}: a mismatch of "
            f"{m.max_mismatch:.3g}, tolerance {m.tolerance:.3g}. {hint}; proof_tolerance "
            "overrides the derived tolerance"
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

    def _check_movement(self, reference: Measurement, now: Measurement, slack: float = SLOPE_SLACK) -> float | None:
        seen = slope(reference, now)
        if seen is not None and abs(seen - 1.0) > slack:
            own, served = now.own - reference.own, now.served - reference.served
            most = int(np.abs(own).argmax())
            row, position = self._places[most]
            raise InstallFailed(
                f"proof of sync failed: from {reference.version or 'the base'} to {now.version} the learner's logprobs "
                f"moved, those of the server at {now.server} followed by a factor of {seen:.2f} instead of 1: token "
                f"{position} of probe sequence {row} moved by {own[most]:.3g} here and by {served[most]:.3g} there. "
                "The push has not (or not correctly) taken effect; restart the rollout server"
            )
        return seen


@contextmanager
def _loud_adapter(proof: SyncProof, base_logprobs: np.ndarray, nats: float) -> Iterator[None]:
    """Within it B is random, and so large that the probe's logprobs move by `nats` (rms); then it is restored."""
    adapter = active_adapter(proof.model)
    weights = [layer.lora_B[adapter].weight for layer in lora_layers(proof.model, adapter).values()]
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
                moved = proof.own_logprobs().values - base_logprobs
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


def probe_sequences(pool: ServerPool, prompts: list[list[int]]) -> list[list[int]]:
    """Return ends of the first distinct prompts, each with a greedy completion: text like the policy will see.

    Args:
        prompts: token ids [B][P].

    Returns:
        Token ids [N][T], N <= 4; prompts only where the servers' context has no room for a completion.
    """
    replica = pool.available()[0]
    distinct = list(dict.fromkeys(tuple(prompt[-PROMPT_TOKENS:]) for prompt in prompts))[:SEQUENCES]
    room = min(r.known.max_model_len for r in pool.up()) - max(map(len, distinct))
    if room < 1:
        return [list(prompt) for prompt in distinct]
    request = GenerateRequest(
        prompts=[Prompt(token_ids=list(prompt)) for prompt in distinct],
        sampling=SamplingParams(temperature=0.0, max_tokens=min(COMPLETION_TOKENS, room)),
        policy="base" if serve_base([replica.known]) else "latest",
    )
    groups = replica.client.generate(request).groups
    return [[*group.prompt_token_ids, *group.completions[0].token_ids] for group in groups]


def canary_slope(proof: SyncProof, real: Publisher, *, takeover: bool) -> float | None:
    """Push a canary adapter as a run of its own, prove that it is served, and delete it. Collective, as a push is.

    Returns:
        The slope of `SyncProof.canary`; None where a server has no room: the real run's own push reports that.
    """
    lease = Lease(f"{real.lease.run_id[:57]}.canary", real.lease.secret, 0)
    canary = Publisher(
        real.pool,
        real.model,
        lease,
        base_weights=real.base_weights,
        takeover=takeover,
        transport="http",
        on_main=real.on_main,
    )
    try:
        with finally_do(lambda: real.on_main(canary.delete_run), "deleting the canary's run"):
            try:
                return proof.canary(lambda: canary.push(0).version)
            except NoFreeRun:
                return None
    finally:
        for replica in real.pool.up():
            replica.receipt = None  # from now on the real run is served
