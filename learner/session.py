"""A training run on rollout servers, seen from the learner: begin, push after every step, prove, count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from tqdm import tqdm

from learner.adapters.rounding import RoundedUpdates
from learner.config import LearnerConfig
from learner.protocols import Trainer
from learner.rewards.scorer import Rewards
from learner.rollouts.completions import Wanted
from learner.rollouts.dispatch import Dispatcher
from learner.rollouts.dynamic_sampling import DynamicSampling
from learner.rollouts.generation import Ahead, RemoteRollouts
from learner.rollouts.prefetch import Prefetcher
from learner.run_dir.lease import load_lease, save_lease
from learner.servers.client import RolloutClient
from learner.servers.event_log import EventLog
from learner.servers.pool import ServerPool, serve_base
from learner.servers.replica import Replica
from learner.step_metrics import Figures, StepReport
from learner.sync.gpu_sharing import GpuSharing
from learner.sync.probe import canary_slope, probe_sequences
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from learner.utils.logs import show_messages
from shared.errors import (
    ErrorDetail,
    InstallFailed,
    InvalidRequest,
    LockstepError,
    UnsupportedAdapter,
    VersionNotActive,
)
from shared.sampling import SamplingParams
from shared.weights import ServerState


class Session:
    """Everything that is built under a trainer: publisher, rollouts, proof, and the run's figures.

    `begin`, `after_step` and `ensure_served` are collective: every rank takes part in reading the adapter and in the
    model's forward, which may be sharded; rank 0 pushes. Every rank fetches its own rollouts.

    Args:
        pool: the servers; at least one is up.
        accepts: raises what speaks against a server in this state.
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
        base_weights: str | None,
        accepts: Callable[[ServerState], object] = lambda state: None,
    ) -> None:
        self.trainer, self.model, self.pool, self.config = trainer, model, pool, config
        show_messages(is_main=trainer.accelerator.is_main_process)
        # What follows from them must be the same on every rank.
        states: list[ServerState] = self._on_main(lambda: [replica.known for replica in pool.up()])
        self.max_model_len = min(state.max_model_len for state in states)
        self._accepts = accepts
        # A server that merges has no base to show while any run lives; the proof at the first push covers it then.
        self.base_served = serve_base(states)
        self.prompts = prompts
        self.publisher = self._publisher(base_weights)
        self._keep_lease()
        self.continues = any(run.run_id == self.run_id for state in states for run in state.runs)
        self.gpu_sharing = GpuSharing(pool.up()[0]) if config.share_gpu else None
        dispatcher = Dispatcher(
            pool,
            sampling,
            self.max_model_len,
            warn=self.say,
            rank=trainer.accelerator.process_index,
            before=self.yield_gpu,
        )
        self.rollouts = RemoteRollouts(
            dispatcher,
            version=lambda: self.publisher.version(trainer.step),
            barrier=self.ensure_served,
            is_training=lambda: trainer.is_training,
            seed_of=self._seed_of,
            batch=lambda: trainer.schedule.batch_at(trainer.micro_step),
        )
        self.rewards: Rewards | None = None
        self.dynamic: DynamicSampling | None = None
        self.proof: SyncProof | None = None
        self.rounded: RoundedUpdates | None = None
        self.canary_slope: float | None = None
        self._log: EventLog | None = None
        self.figures = Figures(trainer, self.rollouts)

    def _publisher(self, base_weights: str | None) -> Publisher:
        """All ranks hold the same lease, so that they ask for one version; rank 0 keeps it and pushes."""
        lease = self._on_main(lambda: load_lease(self.trainer.output_dir, self.config.run_id))
        return Publisher(
            self.pool,
            self.model,
            lease,
            base_weights=base_weights,
            takeover=self.config.takeover,
            transport=self.config.transport,
            in_flight=self.config.in_flight,
            on_main=self._on_main,
        )

    def _keep_lease(self) -> None:
        if self.trainer.accelerator.is_main_process:
            save_lease(self.trainer.output_dir, self.publisher.lease)

    @property
    def run_id(self) -> str:
        """Name of the run on the server."""
        return self.publisher.lease.run_id

    def say(self, text: str) -> None:
        """Print on rank 0, above a progress bar."""
        if self.trainer.accelerator.is_main_process:
            tqdm.write(text)

    def begin(self) -> None:
        """Prove the base, push the initial adapter, prove it. Collective.

        A second training of the same trainer pushes under the next fence.
        """
        if again := self.publisher.last is not None:
            self.publisher.next_fence()
            self._keep_lease()
        self.yield_gpu()
        sequences = self._on_main(lambda: probe_sequences(self.pool, self.prompts))
        self.proof = SyncProof(
            self.pool, self.model, sequences, tolerance=self.config.proof_tolerance, on_main=self._on_main
        )
        if self.config.proof_canary and not self.continues and not again and self.base_served:
            self.canary_slope = canary_slope(self.proof, self.publisher, takeover=self.config.takeover)
        elif self.base_served:
            self.proof.check_base()
        if self.trainer.accelerator.is_main_process and self._log is None:
            self._log = EventLog(self.trainer.output_dir / "servers.jsonl", self.pool)
        self.rounded = RoundedUpdates(self.model, lambda local: self.trainer.accelerator.reduce(local, reduction="sum"))
        step = self.trainer.step
        self.publisher.push(step)
        self.proof.check(self.publisher.version(step))
        self.pool.supervise(self._catch_up if self.trainer.accelerator.is_main_process else self._see_whether_up)
        if self.config.max_staleness > 0:
            self._read_ahead(self.config.max_staleness)
        self.figures.restart_clock()

    def after_step(self) -> StepReport:
        """Push the step just made until it is served; prove it where that is due. Collective."""
        step, steps = self.trainer.step, self.trainer.max_steps
        self.yield_gpu()
        receipt = self.publisher.push(step)
        every = self.config.proof_every
        due = step <= 2 or step == steps or (every > 0 and step % every == 0)
        gap = self.proof.check(receipt.version).max_mismatch if due and self.proof else None
        lost = self.rounded.last_lost() if self.rounded else None
        return self.figures.add(
            push_seconds=self.publisher.seconds[-1], receipt=receipt, logprob_gap=gap, update_lost=lost
        )

    def ensure_served(self) -> None:
        """Barrier: the trainer's step is what was pushed last, else it is pushed. Collective."""
        self.yield_gpu()
        self.publisher.ensure(self.trainer.step)

    def summary(self) -> dict[str, Any]:
        """Figures of the training, over all ranks. Collective."""
        return self.figures.summary() | {
            "run_id": self.run_id,
            "max_logprob_gap": self.proof.max_mismatch if self.proof else None,
            "logprob_tolerance": self.proof.last.tolerance if self.proof and self.proof.last else None,
            "canary_slope": self.canary_slope,
            **({"gpu_turn_seconds": sum(self.gpu_sharing.seconds)} if self.gpu_sharing else {}),
        }

    def use(self, rewards: Rewards) -> None:
        """Have rewards computed as completions arrive."""
        self.rewards = self.figures.rewards = rewards
        self.rollouts.arrived = rewards.arrived

    def use_dynamic_sampling(self, size: int) -> DynamicSampling:
        """Have groups of `size` completions replaced whose rewards do not vary; `use` comes first."""
        assert self.rewards
        coming = self.trainer.coming_prompts()

        def spare_of(batch: int, count: int) -> list[tuple[dict[str, Any], list[int]]]:
            rows = coming.spare_rows(batch, count)
            return list(zip(rows, coming.token_ids(rows), strict=True)) if rows else []

        self.dynamic = DynamicSampling(
            self.rewards, spare_of, self._seed_of, size=size, rounds=self.config.degenerate_rounds
        )
        self.rollouts.refill = self.figures.dynamic = self.dynamic
        return self.dynamic

    def yield_gpu(self) -> None:
        """Let a server that shares the learner's GPU have it."""
        if self.gpu_sharing:
            self.gpu_sharing.yield_gpu()

    def close(self) -> None:
        """Let go of the way to the servers, where what was pushed stays, and end the reward workers."""
        self.pool.close()
        if self._log:
            self._log.close()
        self.publisher.close()
        if self.rewards:
            self.rewards.close()
        try:
            self.yield_gpu()
        except (LockstepError, RuntimeError) as error:  # after a failure the learner may not let its memory go
            self.say(f"share_gpu: the server is left asleep: {error}")

    def _read_ahead(self, max_staleness: int) -> None:
        """Request the first generation batches; from then on each one that is taken requests another."""
        schedule = self.trainer.schedule

        def wanted() -> Wanted:
            assert self.publisher.last  # of the push before the first request; the next may be under way just now
            return Wanted(self.publisher.last.version, exact=False, carried=self.config.in_flight == "carried")

        coming = self.trainer.coming_prompts()

        def prompts_of(batch: int) -> list[list[int]]:
            rows = coming.rows(batch)
            prompts = coming.token_ids(rows)
            if self.dynamic:
                self.dynamic.expect(batch, rows, prompts)
            elif self.rewards:
                self.rewards.expect(batch, rows)
            return prompts

        prefetcher = Prefetcher(
            prompts_of,
            lambda batch, prompts: self.rollouts.draw_ahead(batch, prompts, wanted),
            last_batch=schedule.last_batch,
            warn=self.say,
        )
        self.rollouts.ahead = Ahead(prefetcher, schedule, max_staleness)
        first = schedule.next_batch(self.trainer.micro_step)
        prefetcher.request(first, first + max_staleness - 1)

    def _seed_of(self, row: int, token_ids: list[int]) -> int | None:
        """Seed of the prompt in a row of the present batch, where seeds are derived."""
        if not self.config.deterministic:
            return None
        trainer = self.trainer
        when = ("train", trainer.micro_step) if trainer.is_training else ("eval", trainer.step)
        return prompt_seed(trainer.seed, *when, trainer.first_row + row, *token_ids)

    def _catch_up(self, replica: Replica) -> None:
        self.publisher.catch_up(replica, self._admit)

    def _see_whether_up(self, replica: Replica) -> None:
        """On other ranks: rank 0 brings it up to date; until then it is asked for nothing."""
        state, last = replica.client.state(), self.publisher.last
        if last is None or state.draining or not any(run.version == last.version for run in state.runs):
            raise VersionNotActive(f"{replica.url} does not serve this run yet")
        replica.state = state
        self.pool.mark_up(replica)

    def _admit(self, client: RolloutClient, state: ServerState) -> None:
        """Raise what keeps a server from joining those that are there."""
        same = next((m for m in self.pool.up() if m.url != client.url and m.known.epoch == state.epoch), None)
        if same is not None:
            raise InvalidRequest(f"it is the server at {same.url}, by another address")
        self._accepts(state)
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
            self.proof.check_newcomer(client, state)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run on rank 0; its result, or its error, reaches every rank, so that none waits in vain."""
        accelerator = self.trainer.accelerator
        outcome: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                outcome = [action()]
            except Exception as error:
                if accelerator.num_processes == 1:
                    raise
                failure = error if isinstance(error, LockstepError) else _of_rank_0(error)
                outcome = [failure.body().error]
        broadcast_object_list(outcome, from_process=0)
        if isinstance(outcome[0], ErrorDetail):
            raise LockstepError.from_detail(outcome[0])
        return outcome[0]


def _of_rank_0(error: Exception) -> LockstepError:
    return InstallFailed(f"rank 0 failed with {type(error).__name__}: {error}")


def prompt_seed(base: int, *place: int | str) -> int:
    """A seed in [0, 2^62) for the prompt at `place` (say: training, micro-step, row) of a training seeded with `base`.

    vLLM adds the index of a completion to its prompt's seed, so neighbours must not be close to each other.
    """
    digest = hashlib.blake2b(repr((base, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
