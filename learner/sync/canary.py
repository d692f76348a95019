"""The canary: an adapter with a large effect of every module, pushed as a run of its own, found in what is served.

Early updates can be smaller than the resolution of the server's dtype; then no proof can tell whether adapters reach
the logits. The canary proves the way from push to logits, module by module. B is random, and scaled so that every
module moves the probe's logprobs by about the same. Let x_m be the movement that module m makes of all that are there:
the derivative of the logprobs in the scale of its B. A server on which m is silent misses -x_m. So of all modules
those are suspected whose score r . x_m is lowest, and far from 0, r being served minus own logprobs (Rao 1948: the
score test). One backward pass weighted by r gives all of them; passes weighted by random signs give |x_m|^2 (Hutchinson
1990). Suspects are convicted by a regression of r on the movement that passes with the module turned up and down show.
On a server that rounds before it adds the adapter a suspect's movement may be lost in rounding: there it is pushed once
more, as loud as the whole canary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.sync.evidence import Share, share, without
from learner.sync.probe import AdapterWeights, LearnerLogprobs, Probe
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from learner.sync.tolerance import FLOOR, SAFETY, Measurement, slope
from learner.utils.cleanup import finally_do
from shared.errors import InstallFailed, NoFreeRun
from shared.rollouts import ScoreRequest
from shared.weights import ServerState, WeightVersion

logger = logging.getLogger("lockstep.sync")

#: How far the slope may be from 1; the canary's signal is far above any noise. DEAF: before modules are looked at.
CANARY_SLACK, DEAF = 0.2, 0.7
#: The canary moves the probe by so many times the noise, and by no less than CANARY_NATS (rms). Not by more:
#: where the effect saturates, twice the adapter does not show as twice the change. Nor by more than a share of what
#: logprobs of two unrelated models differ by, sqrt(2) times the spread of logits: no adapter moves them further.
CANARY_SIGNAL, CANARY_NATS, LOUDEST, OF_UNRELATED = 20.0, 0.05, 2.0, 0.5
#: An adapter as large as the canary rounds more coarsely than what tolerances are derived for.
LOUD_SLACK = 3.0
#: Backward passes with random signs: to make modules equally loud, and to measure how loud they are.
BALANCING, MEASURING = 2, 4
#: A module is made louder or quieter than random weights by this factor at most.
MOST_SCALED = 64.0
#: Modules that a regression tests at most, for every server.
SUSPECTS = 4
#: The part of a silent module's score, -|x_m|, that makes one suspected; of one that is served it is rounding alone.
ACCUSING = 0.1
#: A suspect's movement is enlarged by this factor against rounding.
ENLARGED = 4.0
#: Standard errors that a silent module's share lies below 1.
CERTAIN = 5.0
_SCORE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class CanaryResult:
    """What a canary has shown.

    Attributes:
        slope: of served and own movement, near 1; that of the server farthest from it.
        modules: modules of the adapter.
        proven: those whose movement is large enough to convict them if they were silent; 0 of a sharded adapter.
        version, own: of the canary, and the learner's logprobs under it.
    """

    version: WeightVersion
    own: LearnerLogprobs
    slope: float
    modules: int
    proven: int


def prove_modules(
    proof: SyncProof,
    push: Callable[[int], WeightVersion],
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> CanaryResult:
    """Push an adapter with a large effect and find it in the served logprobs; the model stays as it is. Collective.

    Args:
        push: sends the model's present adapter to a run of its own, as this step, and returns its version.
        turn: entered for backward passes, which need memory on the GPU.

    Raises:
        InstallFailed: a server does not follow, or a module is silent there.
    """
    base = {measurement.server: measurement for measurement in proof.check_base()}
    noise = max(measurement.noise for measurement in base.values())
    quiet = proof.probe.logprobs()
    nats = min(max(CANARY_SIGNAL * noise, CANARY_NATS), LOUDEST, OF_UNRELATED * math.sqrt(2) * quiet.logit_std)
    quiet_N = next(iter(base.values())).own
    with _loud(proof.probe, proof.weights, quiet_N, nats, turn) as strengths_M:
        version, own = push(0), proof.probe.logprobs()
        louds = proof.measure(own, version)
        proven = len(strengths_M)
        for loud in louds if len(strengths_M) else ():
            _check_slope(base[loud.server], loud, DEAF)  # of a server that ignores all of it no module is to blame
            silent, count = _silent_modules(proof, base[loud.server], loud, strengths_M, turn)
            if silent and not loud.is_decisive:
                silent = _still_silent(proof, push, base[loud.server], silent, strengths_M)
            if silent:
                raise InstallFailed(_accusation(proof.weights.modules, loud, silent))
            proven = min(proven, count)
        slopes = [_check_slope(base[loud.server], loud) for loud in louds]
        for loud in louds:
            proof.check_mismatch(_coarse(loud))
    farthest = max(slopes, key=lambda seen: abs(seen - 1.0))
    return CanaryResult(version, own, farthest, len(proof.weights.modules), proven)


def _coarse(loud: Measurement) -> Measurement:
    """Return the measurement with tolerances for an adapter as large as the canary."""
    names = ("tolerance", "rms_tolerance", "usual_rms")
    return replace(loud, **{name: LOUD_SLACK * getattr(loud, name) for name in names})


def _check_slope(base: Measurement, loud: Measurement, slack: float = CANARY_SLACK) -> float:
    seen = slope(base, loud)
    if seen is None:
        raise InstallFailed(
            "proof of sync failed: the canary adapter moves the learner's own logprobs too little to prove anything"
        )
    if abs(seen - 1.0) > slack:
        raise InstallFailed(
            f"proof of sync failed: the canary adapter {loud.version} moves the learner's logprobs, and those of the "
            f"server at {loud.server} by a factor of {seen:.2f} of that instead of 1: adapters do not reach its logits "
            f"as they should ({_movements(base, loud)}). Restart the rollout server"
        )
    return seen


def _movements(base: Measurement, loud: Measurement) -> str:
    """Tell a server that leaves modules out, and moves less, from one that computes another function."""
    own, served = (float(np.sqrt(np.mean(moved**2))) for moved in (loud.own - base.own, loud.served - base.served))
    mismatches = f"with a mismatch of {loud.rms_mismatch:.2g}, {base.rms_mismatch:.2g} without the adapter"
    return f"they move by {served:.2g} nats, the learner's by {own:.2g}, {mismatches}; rms"


@contextmanager
def _loud(
    probe: Probe,
    weights: AdapterWeights,
    quiet_N: np.ndarray,
    nats: float,
    turn: Callable[[], AbstractContextManager[None]],
) -> Iterator[np.ndarray]:
    """Within it B is random, and so large that the probe's logprobs move by `nats` (rms); then it is restored.

    Yields:
        The norm over all tokens of the movement that each module makes, [M]; empty where the adapter is sharded.
    """
    # A generator of its own, so that the training's random numbers are not used up.
    generator = torch.Generator().manual_seed(0)

    def moved() -> float:
        return float(np.sqrt(np.mean((probe.logprobs().values - quiet_N) ** 2)))

    with weights.kept():
        shapes = [getattr(b, "ds_shape", b.shape) for b in weights.b]
        weights.write_b([torch.randn(tuple(shape), generator=generator) * 2.0**-10 for shape in shapes])
        _grow(weights, moved, nats)
        strengths_M = np.zeros(0)
        if not weights.sharded:
            with turn():
                drawn = _strengths(probe, weights, BALANCING)
                typical = float(np.median(drawn))
                factors = np.clip(typical / np.maximum(drawn, 1e-30), 1 / MOST_SCALED, MOST_SCALED)
                weights.scale_b(factors.tolist())
                _grow(weights, moved, nats)
                strengths_M = _strengths(probe, weights, MEASURING)
        yield strengths_M


def _grow(weights: AdapterWeights, moved: Callable[[], float], nats: float) -> None:
    """Scale B until the probe has moved by `nats`, within a half."""
    for _ in range(16):
        factor = nats / max(moved(), 1e-30)
        if 2 / 3 <= factor <= 3 / 2:
            return
        weights.scale_b([min(max(factor, 1 / 16), 16.0)] * len(weights.b))


def _strengths(probe: Probe, weights: AdapterWeights, passes: int) -> np.ndarray:
    """Estimate the norm over all tokens of the movement that each module makes, [M], by Hutchinson's random signs."""
    signs = np.random.default_rng(0)
    squares = [
        np.square(probe.sensitivities(signs.choice([-1.0, 1.0], len(probe.places)), weights.b)).sum(0)
        for _ in range(passes)
    ]
    return np.sqrt(np.mean(squares, axis=0))


def _silent_modules(
    proof: SyncProof,
    base: Measurement,
    loud: Measurement,
    strengths_M: np.ndarray,
    turn: Callable[[], AbstractContextManager[None]],
) -> tuple[dict[int, Share], int]:
    """Test the modules that a server is most likely to leave out.

    Returns:
        The silent ones, with the share that is served of each; and how many could be convicted.
    """
    probe, weights = proof.probe, proof.weights
    residual_N = without(loud.mismatch, base.mismatch)
    # Few draws have shown them: none is taken for much weaker than the others, which are as strong.
    least_M = np.maximum(strengths_M, np.median(strengths_M) / 2)
    with turn():
        scores_M = probe.sensitivities(residual_N, weights.b).sum(0) / least_M
    lowest = np.argsort(scores_M)[:SUSPECTS]
    suspects = proof.on_main(lambda: lowest[scores_M[lowest] < -ACCUSING * strengths_M[lowest]].tolist())
    noise = max(float(np.sqrt(np.mean(residual_N**2))), FLOOR / SAFETY)
    return _convicted(probe, weights, suspects, residual_N), int((strengths_M > 2 * CERTAIN * noise).sum())


def _still_silent(
    proof: SyncProof,
    push: Callable[[int], WeightVersion],
    base: Measurement,
    silent: dict[int, Share],
    strengths_M: np.ndarray,
) -> dict[int, Share]:
    """Return those of the silent modules of a server that are silent even where each is as loud as all together."""
    probe, weights = proof.probe, proof.weights
    together = float(np.sqrt(np.sum(strengths_M**2)))
    louder = [max(together / max(strengths_M[m], 1e-30), 1.0) if m in silent else 1.0 for m in range(len(strengths_M))]
    with weights.kept():
        weights.scale_b([min(factor, MOST_SCALED) for factor in louder])
        version, own = push(1), probe.logprobs()
        now = next(m for m in proof.measure(own, version) if m.server == base.server)
        return _convicted(probe, weights, list(silent), without(now.mismatch, base.mismatch))


def _convicted(
    probe: Probe, weights: AdapterWeights, suspects: Sequence[int], residual_N: np.ndarray
) -> dict[int, Share]:
    """Return the suspects of which less than a half is served, with that share."""
    shares = {m: _share_of(probe, weights, m, residual_N) for m in suspects}
    return {m: s for m, s in shares.items() if s and s.value < 0.5 and s.value + CERTAIN * s.error < 1.0}


def _accusation(modules: Sequence[str], loud: Measurement, silent: dict[int, Share]) -> str:
    named = [f"{modules[m]} ({s.value:.2f} of its effect, standard error {s.error:.2f})" for m, s in silent.items()]
    return (
        f"proof of sync failed: of the canary adapter {loud.version} the server at {loud.server} leaves out "
        f"{', '.join(named)}: it does not compute LoRA there. Use another version of vLLM, or leave the module "
        "out of target_modules"
    )


def _share_of(probe: Probe, weights: AdapterWeights, module: int, residual_N: np.ndarray) -> Share | None:
    """Return the share of one module's movement in served logprobs: 1 where it is there, 0 where it is silent."""
    seen = []
    for change in (ENLARGED, -ENLARGED):  # without the pass that the residual is of: its rounding would be in both
        with weights.kept():
            weights.scale_b([1.0 + change if m == module else 1.0 for m in range(len(weights.b))])
            seen.append(probe.logprobs().values)
    return share(residual_N, (seen[0] - seen[1]) / (2 * ENLARGED), probe.rows, FLOOR / SAFETY)


@dataclass
class KeptCanary:
    """A canary that can be shown to a server again, without the model: what was pushed, and what must be scored."""

    lease: Lease
    pieces: list[bytes | memoryview]
    result: CanaryResult
    takeover: bool

    def show(self, proof: SyncProof, client: RolloutClient, state: ServerState, base: Measurement) -> float | None:
        """Push it as a run of its own, compare, and delete the run; not collective.

        Returns:
            The slope, near 1; None where the server has no room for another run.

        Raises:
            InstallFailed: the server does not follow.
        """
        run_id, secret, version = self.lease.run_id, self.lease.secret, self.result.version
        if sum(run.version is not None for run in state.runs) >= state.max_runs:
            return None
        try:
            client.push(run_id, self.pieces, secret, takeover=self.takeover)
        except NoFreeRun:
            return None
        with finally_do(lambda: client.delete_run(run_id, secret), "deleting the canary's run"):
            request = ScoreRequest(sequences=proof.sequences, policy=version, run_id=run_id)
            answer = client.score(request, _SCORE_TIMEOUT_S)
            loud = proof.compare(self.result.own, version, client.url, state, answer)
            seen = _check_slope(base, loud)
            proof.check_mismatch(_coarse(loud))
        return seen


def show_canary(
    proof: SyncProof,
    real: Publisher,
    *,
    takeover: bool,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[CanaryResult, KeptCanary] | tuple[None, None]:
    """Push a canary adapter as a run of its own, prove that it is served, and delete it. Collective, as a push is.

    Returns:
        What it has shown, and the canary; None where a server has no room: the real run's own push reports that.
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
    pieces: list[bytes | memoryview] = []

    def push(step: int) -> WeightVersion:
        version = canary.push(step).version
        if step == 0:  # what is shown again
            pieces.extend(canary.pieces())
        return version

    try:
        with finally_do(lambda: real.on_main(canary.delete_run), "deleting the canary's run"):
            try:
                result = prove_modules(proof, push, turn)
            except NoFreeRun:
                return None, None
    finally:
        for replica in real.pool.up():
            replica.receipt = None  # from now on the real run is served
    if result.proven < result.modules:
        logger.info("the canary proves %d of %d modules one by one", result.proven, result.modules)
    return result, KeptCanary(canary.lease, pieces, result, takeover)
