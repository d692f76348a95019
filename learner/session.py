"""A training run on rollout servers, seen from the learner: begin, push after every step, prove, count."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel

from learner.adapters.rounding import RoundedUpdates
from learner.cluster.relay import Relays
from learner.config import LearnerConfig
from learner.protocols import Trainer
from learner.rewards.scorer import Rewards
from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher
from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.generation import Agents, RemoteRollouts
from learner.rollouts.mismatch import Mismatch
from learner.run_dir.lease import load_lease, save_lease
from learner.run_dir.lock import OutputLock
from learner.servers.client import RolloutClient
from learner.servers.compatibility import AUTOCAST
from learner.servers.discovery import RAY
from learner.servers.event_log import EventLog
from learner.servers.pool import ServerPool, serve_base
from learner.servers.replica import Replica
from learner.step_metrics import Proven, StepMetrics, StepReport
from learner.sync.canary import CanaryResult, KeptCanary, show_canary
from learner.sync.evidence import Share
from learner.sync.gpu_sharing import GpuSharing
from learner.sync.probe import SeenText, make_probe
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from learner.sync.tolerance import Measurement
from learner.utils.waits import waiting
from shared.errors import (
    ErrorDetail,
    InstallFailed,
    InvalidRequest,
    LockstepError,
    UnsupportedAdapter,
    VersionNotActive,
)
from shared.messages import one_line
from shared.sampling import SamplingParams
from shared.weights import ServerState, WeightVersion

logger = logging.getLogger("lockstep.session")


class Session:
    """Everything that is built under a trainer: publisher, rollouts, proof, and the run's metrics.

    `begin`, `after_step` and `ensure_served` are collective: every rank takes part in reading the adapter and in the
    model's forward, which may be sharded; rank 0 pushes. Every rank requests its own rollouts.

    Args:
        pool: the servers; at least one is up.
        prompts: token ids [B][P], for the probe.
        longest: tokens that prompt and completion may have together.
        make_rewards: called last, since it changes the trainer: what scores completions as they arrive. None: TRL does.
        check_state: raises if a server in this state is incompatible.
        settings: what the training's state depends on, see `learner.trainer.settings`.
        make_agents: returns what runs agents in the place of completions.

    Attributes:
        proof, rounded: made when a training begins, since the trainer places the model only then.
        canary: see `learner.sync.canary`; None where there was none.
        one_product: whether every LoRA layer of the learner computes base and adapter with one rounding.
        samples_policy: whether completions are drawn from the policy being trained, so that their logprobs must agree.
        page: where the run's page is; None: there is none, or it is rank 0's.
        interrupted: the signal that has asked the training to end, see `learner.trainer.leaving`.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: PeftModel,
        pool: ServerPool,
        config: LearnerConfig,
        *,
        sampling: SamplingParams,
        prompts: list[list[int]],
        seen: SeenText | None,
        longest: int,
        base_weights: str | None,
        make_rewards: Callable[[], Rewards] | None,
        check_state: Callable[[ServerState], object],
        settings: dict[str, Any],
        make_agents: Callable[[Session], Agents] | None = None,
    ) -> None:
        self.trainer, self.model, self.pool, self.config, self.settings = trainer, model, pool, config, settings
        # What follows from them must be the same on every rank.
        states: list[ServerState] = self._on_main(lambda: [replica.known for replica in pool.up()])
        self.max_model_len = min(state.max_model_len for state in states)
        self._check_state, self._prompts, self._temperature = check_state, prompts, sampling.temperature
        self._longest, self._seen = longest, seen
        self.page: str | None = None
        # A server that merges has no base to show while any run lives; the proof at the first push covers it then.
        self._base_served = serve_base(states)
        self._lock: OutputLock | None = None
        self._on_main(self._lock_output)
        # All ranks hold the same lease, so that they request one version; rank 0 keeps it and pushes.
        lease = self._on_main(lambda: load_lease(trainer.output_dir, config.run_id))
        self.publisher = Publisher(
            pool,
            model,
            lease,
            base_weights=base_weights,
            takeover=config.takeover,
            transport=config.transport,
            in_flight=config.in_flight,
            on_main=self._on_main,
            relays=_relays(config),
        )
        self._save_lease()
        self._continues = any(run.run_id == self.run_id for state in states for run in state.runs)
        self.gpu_sharing = GpuSharing(pool.up()[0]) if config.share_gpu else None
        rank = trainer.accelerator.process_index
        dispatcher = Dispatcher(pool, sampling, self.max_model_len, rank=rank, before=self.yield_gpu)
        self.rewards = make_rewards() if make_rewards else None
        dynamic_sampling = None
        if config.drop_degenerate_groups and self.rewards:
            coming, size = trainer.coming_prompts(), trainer.num_generations
            dynamic_sampling = DynamicSampling(self.rewards, coming, self.seed_of, size, config.degenerate_rounds)
        agents = make_agents(self) if make_agents else None
        self.rollouts = RemoteRollouts(dispatcher, trainer, self, self.rewards, dynamic_sampling, agents)
        self.metrics = StepMetrics(self.rollouts)
        self.proof: SyncProof | None = None
        self.rounded: RoundedUpdates | None = None
        self.canary: CanaryResult | None = None
        self._kept_canary: KeptCanary | None = None
        self._shown_again = False
        self.one_product = self.samples_policy = False
        self.interrupted: str | None = None
        self._log: EventLog | None = None

    def _lock_output(self) -> None:
        self._lock = OutputLock(self.trainer.output_dir)

    def _save_lease(self) -> None:
        if self.trainer.accelerator.is_main_process:
            save_lease(self.trainer.output_dir, self.publisher.lease)

    @property
    def run_id(self) -> str:
        """Name of the run on the server."""
        return self.publisher.lease.run_id

    def begin(self) -> None:
        """Prove the base, push the initial adapter, prove it. Collective.

        A second training of the same trainer pushes under the next fence.
        """
        if again := self.publisher.last is not None:
            self.publisher.next_fence()
            self._save_lease()
        with waiting("the proof that the servers hold the same base, and what is pushed to them"):
            self._prove_and_push(again=again)
        self.pool.supervise(self._catch_up if self.trainer.accelerator.is_main_process else self._check_up)
        if self.config.max_staleness:
            self.rollouts.read_ahead(self.config.max_staleness)
        self.metrics.restart_clock()

    def _prove_and_push(self, *, again: bool) -> None:
        self.yield_gpu()
        config, trainer, is_main = self.config, self.trainer, self.trainer.accelerator.is_main_process
        text = self._on_main(lambda: make_probe(self.pool, self._prompts, self._longest, self._seen))
        self.proof = SyncProof(
            self.pool,
            self.model,
            text,
            tolerance=config.proof_tolerance,
            autocast=AUTOCAST.get(trainer.accelerator.mixed_precision),
            one_product=self.one_product,
            same_base=self.publisher.base_weights is not None,
            on_main=self._on_main,
        )
        if config.proof_canary and not self._continues and not again and self._base_served:
            self.canary, self._kept_canary = show_canary(
                self.proof, self.publisher, takeover=config.takeover, turn=self._own_turn
            )
            self._shown_again = False
        elif self._base_served:
            self.proof.check_base()
        if is_main and self._log is None:
            self._log = EventLog(trainer.output_dir / "servers.jsonl", self.pool)
        self.rounded = RoundedUpdates(self.model, lambda local: trainer.accelerator.reduce(local, reduction="sum"))
        self.publisher.push(trainer.step)
        self.proof.check(self.publisher.version(trainer.step))
        if self._proof_is_due(trainer.step + 1):
            self.proof.keep_step()

    def _proof_is_due(self, step: int) -> bool:
        every = self.config.proof_every
        return step <= 2 or step == self.trainer.max_steps or (every > 0 and step % every == 0)

    def after_step(self) -> StepReport:
        """Push the step that was just made until it is served; prove it where that is due. Collective.

        Raises:
            LockstepError: it is not served, or not proven; the step has been reported with the error.
        """
        step, steps = self.trainer.step, self.trainer.max_steps
        try:
            with waiting(f"the push of step {step}, and the proof of it"):
                self.yield_gpu()
                receipt, proven = self.publisher.push(step), None
                if self.proof and self._proof_is_due(step):
                    proven = self._proven(self.proof, receipt.version)
                if self.proof and self._proof_is_due(step + 1):
                    self.proof.keep_step()
                if step >= steps // 2:
                    self._show_canary_again()
        except Exception as error:
            self._fail_step(step, error)
            raise
        return self.metrics.end_step(
            push_seconds=self.publisher.seconds[-1],
            receipt=receipt,
            proven=proven,
            update_lost=self.rounded.last_lost() if self.rounded else None,
        )

    def _fail_step(self, step: int, error: Exception) -> None:
        """Report a step with which the training ends, as far as it went."""
        last, measured = self.publisher.last, self.proof.last if self.proof else None
        receipt = last if last and last.version == self.publisher.version(step) else None
        found = measured if receipt and measured and measured.version == receipt.version else None
        self.metrics.end_step(
            push_seconds=self.publisher.seconds[-1] if receipt else 0.0,
            receipt=receipt,
            proven=_proven(found) if found else None,
            error=one_line(error),
        )

    def push_loaded(self) -> None:
        """Push and prove, as a version of its own, an adapter that was loaded after the last step. Collective."""
        self.yield_gpu()
        self.publisher.next_fence()
        self._save_lease()
        receipt = self.publisher.push(self.trainer.step)
        if self.proof:
            self.proof.check(receipt.version)

    def _proven(self, proof: SyncProof, version: WeightVersion) -> Proven:
        started = time.perf_counter()
        return _proven(proof.check(version), proof.step_share, time.perf_counter() - started)

    def _show_canary_again(self) -> None:
        """Show the canary a second time, to servers that have room for it, halfway through the training. Collective."""
        canary, proof = self._kept_canary, self.proof
        if self._shown_again or canary is None or proof is None:
            return
        self._shown_again = True

        def show(replica: Replica) -> float | None:
            state = replica.client.state()
            base = proof.bases.get(f"{replica.url}, epoch {state.epoch}")
            return canary.show(proof, replica.client, state, base) if base and serve_base([state]) else None

        self._on_main(lambda: [show(replica) for replica in self.pool.up()])

    def saw_mismatch(self, mismatch: Mismatch) -> None:
        """Record the mismatch of a generation batch; of an on-policy one it is a proof, too. Collective."""
        self.metrics.saw_mismatch(mismatch)
        proof = self.proof
        if proof and self.samples_policy and not self.config.max_staleness:
            self._on_main(lambda: proof.check_sampled(mismatch.rms, mismatch.tokens, self._temperature))

    def summary(self) -> dict[str, Any]:
        """Return the metrics of the training, over all ranks. Collective."""
        return self.metrics.summary() | {
            "run_id": self.run_id,
            "max_logprob_gap": self.proof.max_mismatch if self.proof else None,
            "logprob_tolerance": self.proof.last.tolerance if self.proof and self.proof.last else None,
            "canary_slope": self.canary.slope if self.canary else None,
            "canary_modules": [self.canary.proven, self.canary.modules] if self.canary else None,
            **({"gpu_turn_seconds": sum(self.gpu_sharing.seconds)} if self.gpu_sharing else {}),
        }

    def yield_gpu(self) -> None:
        """Give a shared GPU to the server."""
        if self.gpu_sharing:
            self.gpu_sharing.yield_gpu()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Within it a shared GPU is the learner's."""
        if self.gpu_sharing:
            self.gpu_sharing.take_gpu()
        yield
        self.yield_gpu()

    def finish(self) -> None:
        """Tell the servers that this training has ended: the run stays served, but gives way to another that needs its
        place, after `keep_run` seconds. Training on makes it a run in training again. Collective.
        """
        self._on_main(lambda: self.publisher.finish(self.config.keep_run))

    def close(self) -> None:
        """Close the transports, and end reward workers and agents that run elsewhere; pushed adapters stay served, and
        a run that has not finished keeps its place, so that the training can be resumed.
        """
        self.pool.close()
        if self._log:
            self._log.flush()
        self.publisher.close()
        if self.rewards:
            self.rewards.close()
        if self.rollouts.agents:
            self.rollouts.agents.close()
        try:
            self.yield_gpu()
        except (LockstepError, RuntimeError) as error:  # after a failure the learner may not release its memory
            logger.warning(f"share_gpu: the server is left asleep: {error}")
        if self._lock:
            self._lock.close()

    # As `learner.rollouts.generation.Training`, whose docstrings apply.

    def allowed_version(self, *, ahead: bool) -> AllowedVersion:
        if not ahead:
            return AllowedVersion(self.publisher.version(self.trainer.step))
        assert self.publisher.last  # of the push before the first request; the next may be under way just now
        return AllowedVersion(self.publisher.last.version, exact=False, carried=self.config.in_flight == "carried")

    def ensure_served(self) -> None:
        self.yield_gpu()
        self.publisher.ensure(self.trainer.step)

    def seed_of(self, row: int, token_ids: list[int]) -> int | None:
        if not self.config.deterministic:
            return None
        trainer = self.trainer
        when = ("train", trainer.micro_step) if trainer.is_training else ("eval", trainer.step)
        return prompt_seed(trainer.seed, *when, trainer.first_row + row, *token_ids)

    def _catch_up(self, replica: Replica) -> None:
        self.publisher.catch_up(replica, self._admit)

    def _check_up(self, replica: Replica) -> None:
        """On ranks other than 0: use a server once rank 0 has brought it up to date."""
        state, last = replica.client.state(), self.publisher.last
        if last is None or state.draining or not any(run.version == last.version for run in state.runs):
            raise VersionNotActive(f"{replica.url} does not serve this run yet")
        replica.state = state
        self.pool.mark_up(replica)

    def _admit(self, client: RolloutClient, state: ServerState) -> None:
        """Raise if a server must not join the present ones."""
        same = next((r for r in self.pool.up() if r.url != client.url and r.known.epoch == state.epoch), None)
        if same is not None:
            raise InvalidRequest(f"it is the server at {same.url}, by another address")
        self._check_state(state)
        if state.lora_dtype != self.publisher.lora_dtype:
            raise UnsupportedAdapter(
                f"it holds adapters in {state.lora_dtype}, the first server in {self.publisher.lora_dtype}; start all "
                "of them with the same --dtype"
            )
        if state.max_model_len < self.max_model_len:
            raise InvalidRequest(
                f"its context is {state.max_model_len} tokens, that of the first servers {self.max_model_len}; start "
                "all of them with the same --max-model-len"
            )
        if self.proof and serve_base([state]):
            base = self.proof.check_newcomer(client, state)
            if base and self._kept_canary:
                self._kept_canary.show(self.proof, client, state, base)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run on rank 0, and return its result or raise its error on every rank, so that none waits in vain."""
        accelerator, outcome = self.trainer.accelerator, list[Any]([None])
        if accelerator.is_main_process:
            try:
                outcome = [action()]
            except Exception as error:
                if accelerator.num_processes == 1:
                    raise
                if not isinstance(error, LockstepError):
                    error = InstallFailed(f"rank 0 failed with {type(error).__name__}: {error}")
                outcome = [error.body().error]
        broadcast_object_list(outcome, from_process=0)
        if isinstance(outcome[0], ErrorDetail):
            raise LockstepError.from_detail(outcome[0])
        return outcome[0]


def _relays(config: LearnerConfig) -> Relays | None:
    """Return the relays of servers on a Ray cluster; None without one."""
    names = [url.removeprefix(RAY) for url in config.rollout_url or () if url.startswith(RAY)]
    return Relays(names[0], config.ca_file) if names else None


def _proven(worst: Measurement, share: Share | None = None, seconds: float | None = None) -> Proven:
    return Proven(
        logprob_gap=worst.max_mismatch,
        logprob_gap_mean=worst.mean_mismatch,
        logprob_gap_rms=worst.rms_mismatch,
        logprob_gap_p99=worst.p99_mismatch,
        step_share=share.value if share else None,
        step_share_error=share.error if share else None,
        proof_seconds=seconds,
    )


def prompt_seed(base: int, *place: int | str) -> int:
    """Return a seed in [0, 2^62) for the prompt at `place` (phase, step, row) of a training seeded with `base`.

    vLLM adds the index of a completion to its prompt's seed, so neighbors must not be close to each other.
    """
    digest = hashlib.blake2b(repr((base, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
