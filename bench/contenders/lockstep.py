"""Lockstep: `rollout-server` as a process, `Publisher.push`, the first token by `RolloutClient.generate`.

What benches use of the learner's internals is here, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft import PeftModel

from bench.common.load import GENERATE, Sampled, sampled
from bench.common.servers import Server
from bench.contenders import Contender, Moved, SyncPath
from learner.adapters.exporter import AdapterExport
from learner.cluster.relay import Relays
from learner.rollouts.completions import AllowedVersion
from learner.rollouts.dispatch import Dispatcher, group_requests
from learner.run_dir.lease import Lease, load_lease
from learner.servers.client import RolloutClient
from learner.servers.discovery import ServerDiscovery
from learner.servers.event_log import EventLog
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from learner.sync.transport import Choice
from shared.errors import LockstepError
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams
from shared.weights import WeightVersion

HTTP, COLLECTIVE, KEEP = "lockstep http", "lockstep collective", "lockstep collective, keep"
TRANSPORTS: dict[str, Choice] = {HTTP: "http", COLLECTIVE: "collective", KEEP: "collective"}
ONE_GREEDY_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


def new_lease(name: str) -> Lease:
    """Return a lease of a run of its own."""
    return Lease(f"bench-{re.sub('[^a-z]+', '-', name)}-{secrets.token_hex(3)}", secrets.token_hex(16), 0)


class LockstepPath(SyncPath):
    """A run on a rollout server, pushed over one transport."""

    def __init__(self, client: RolloutClient, model: PeftModel, row: str) -> None:
        self.client, self.lease, self.transport = client, new_lease(row), TRANSPORTS[row]
        options: dict[str, Any] = {"transport": self.transport, "in_flight": "keep" if row == KEEP else "drain"}
        self.publisher = Publisher(ServerPool.of(client), model, self.lease, takeover=True, **options)
        self.run_id = self.lease.run_id
        self.version: WeightVersion | None = None
        #: That acknowledged the last push: those of all ranks and engines.
        self.workers = 0

    def push(self, step: int) -> Moved:
        receipt = self.publisher.push(step)
        self.version, self.workers = receipt.version, receipt.workers
        # A run starts over HTTP and goes back to it where the group fails: such a push is none of this row's.
        if step > 0 and receipt.transport != self.transport:
            raise RuntimeError(f"push {step} went over {receipt.transport}, not over {self.transport}")
        seconds = {key: float(value) for key, value in receipt.model_dump().items() if key.endswith("_seconds")}
        return Moved(receipt.bytes, {key.removesuffix("_seconds"): value for key, value in seconds.items()})

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        assert self.version is not None
        request = GenerateRequest(
            prompts=[Prompt(token_ids=prompt)], sampling=ONE_GREEDY_TOKEN, policy=self.version, return_text=False
        )
        completion = self.client.generate(request).groups[0].completions[0]
        if [span.version for span in completion.spans] != [self.version]:
            raise RuntimeError(f"the token is of {completion.spans}, not of {self.version}")
        [token], [logprob] = completion.token_ids, completion.logprobs
        if logprob is None:
            raise RuntimeError("the token's logprob is not finite")
        return token, logprob

    def sample(self, prompts: list[list[int]], tokens: int) -> list[Sampled]:
        """Return so many tokens for each prompt, and their logprobs, by the weights pushed last."""
        assert self.version is not None
        request = GenerateRequest(
            prompts=[Prompt(token_ids=prompt) for prompt in prompts],
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True),
            policy=self.version,
            return_text=False,
        )
        content = self.client.generate(request).model_dump_json().encode()
        return sampled(GENERATE, 200, content, tokens, len(prompts))

    def slot_bytes(self) -> int:
        """Return the bytes of a slot on the server."""
        return self.client.state().slot_bytes

    def close(self) -> None:
        """Free the run's slots on the server, and what the transport holds."""
        self.publisher.close()
        self.client.delete_run(self.lease.run_id, self.lease.secret)


class Lockstep(Contender):
    """The contender `lockstep`."""

    rows = (HTTP, COLLECTIVE, KEEP)

    def start(self, folder: Path, max_rank: int) -> Server:
        module, log = ["rollout_server.cli", str(folder)], f"{folder.name}-lockstep-{max_rank}.log"
        return self.setting.start("rollout-server", module, log, "--max-lora-rank", str(max_rank), ready="/ready")

    @contextlib.contextmanager
    def path(self, row: str, server: Server, model: PeftModel) -> Iterator[LockstepPath]:
        # NCCL then takes this process for one of another host, which may use a GPU of the server's, through TCP.
        shared = TRANSPORTS[row] == "collective" and self.setting.same_gpu
        host = patch.dict(os.environ, {"NCCL_HOSTID": "learner"} if shared else {})
        with host, RolloutClient(server.url) as client:
            path = LockstepPath(client, model, row)
            path.push(0)  # what a transport refuses at its first use
            try:
                yield path
            finally:
                with contextlib.suppress(LockstepError):
                    path.close()


class LockstepPool:
    """A pool of servers with a run: pushes over HTTP, and completions by the learner's own dispatcher.

    Args:
        place: `file:` and a file that lists servers, which may change; or the URL of one.
        log: of events and tokens; the records of `bench.fleet`.
        relays: through which all pushes go, however few the servers; None: directly.
    """

    def __init__(
        self, place: str, model: PeftModel, log: Path, patience_s: float = 600.0, relays: Relays | None = None
    ) -> None:
        self.pool = ServerPool(RolloutClient, ServerDiscovery([place]))
        self.pool.wait_ready(patience_s)
        self.log = log
        log.unlink(missing_ok=True)
        self._events = EventLog(log, self.pool)
        options: dict[str, Any] = {"transport": "http", "relays": relays, "relay_from": 1}
        self._publisher = Publisher(self.pool, model, new_lease("pool"), takeover=True, **options)
        self._publisher.push(0)
        #: Processor time of exports so far, a part of that of pushes.
        self.export_s = 0.0
        self._count_exports()
        self.pool.supervise(lambda replica: self._publisher.catch_up(replica, lambda client, state: None))

    def push(self, step: int) -> None:
        """Push the adapter to all servers that are up."""
        self._publisher.push(step)

    def _count_exports(self) -> None:
        exporter = self._publisher._exporter
        assert exporter
        export = exporter.export

        def counted(version: WeightVersion) -> AdapterExport:
            before = time.process_time()
            try:
                return export(version)
            finally:
                self.export_s += time.process_time() - before

        exporter.export = counted  # type: ignore[method-assign]

    def pushed_bytes(self) -> int:
        """Return the bytes of the last push's body."""
        return sum(len(piece) for piece in self._publisher.pieces())

    def up(self) -> int:
        """Return how many servers are up."""
        return len(self.pool.up())

    def tokens(self) -> int:
        """Return how many tokens have come so far."""
        return sum(replica.load.tokens for replica in self.pool.replicas.values())

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of the log, whose last second may be missing."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def fetcher(self, tokens: int, prompt_tokens: int = 64) -> Callable[[list[list[int]]], Any]:
        """Return a function that waits for a completion of `tokens` tokens for each prompt, by the latest version."""
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        dispatcher = Dispatcher(self.pool, sampling, max_model_len=tokens + prompt_tokens)

        def allowed() -> AllowedVersion:
            assert self._publisher.last
            return AllowedVersion(self._publisher.last.version, exact=False)

        return lambda prompts: dispatcher.dispatch(group_requests(prompts), allowed)

    def close(self) -> None:
        """End the run."""
        self.pool.close()
        self._events.flush()
        with contextlib.suppress(LockstepError):
            self._publisher.delete_run()


@contextlib.contextmanager
def rollouts(trainer: Any, url: str | None = None, **options: Any) -> Iterator[Any]:
    """Attach a GRPOTrainer to a server; yield the session, whose run on the server ends with the block.

    Args:
        options: of `attach`.
    """
    from learner.trainer.attach import attach

    session = attach(trainer, url, **options)
    try:
        yield session
    finally:
        session.close()
        with contextlib.suppress(LockstepError):
            session.publisher.delete_run()


def end_run(url: str, output_dir: Path) -> None:
    """End the run of a learner that was killed, which would keep its place on the server."""
    lease = load_lease(output_dir, None)
    with contextlib.suppress(LockstepError), RolloutClient(url) as client:
        client.delete_run(lease.run_id, lease.secret)


def steps_of(session: Any) -> list[tuple[Any, ...]]:
    """Return the steps of a training: seconds, seconds of waiting, of the push, of an idle server; tokens."""
    reports = session.metrics.reports
    before = [0, *(report.completion_tokens for report in reports)]  # counted since the start
    return [
        (r.seconds, r.wait_seconds, r.push_seconds, r.idle_seconds, r.completion_tokens - earlier)
        for r, earlier in zip(reports, before, strict=False)
    ]


def known_of(session: Any) -> dict[str, Any]:
    """Return what else is known of a training."""
    summary = session.summary()
    return {
        "transport": session.publisher.receipts[-1].transport,
        "turn_s": session.gpu_sharing.seconds if session.gpu_sharing else [],
        **{name: summary[name] for name in ("lags", "regenerated", "max_logprob_gap", "max_drift_kl")},
    }


def train_with_rollouts(trainer: Any, url: str, **options: Any) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """Train with rollouts of a server; return what the steps took, see `steps_of`, and what else is known."""
    with rollouts(trainer, url, proof_canary=False, **options) as session:
        trainer.train()
        return steps_of(session), known_of(session)
