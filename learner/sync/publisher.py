"""Publisher of adapters: who owns the run, the last push, and which servers have it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from peft import PeftModel

from learner.adapters.exporter import AdapterExport, AdapterExporter
from learner.cluster.relay import Relays, Response
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.servers.replica import Replica
from learner.sync.transport import Choice, Transport
from learner.utils.distributed import OnMain, on_one_rank
from learner.utils.threads import all_of, one_after_the_other
from learner.utils.wording import option
from shared.errors import Draining, ErrorCode, LockstepError, ProtocolMismatch, UnknownRun
from shared.weights import AdapterManifest, InFlight, PushReceipt, ServerState, WeightVersion

logger = logging.getLogger("lockstep.sync")

#: Pushes to so many servers, or more, go through relays where there are any: docs/scaling.md has the figures.
RELAY_FROM = 8


@dataclass(eq=False)
class Publisher:
    """Pushes the adapter of one model to all rollout servers.

    With several ranks each has a publisher of the same lease: all take part in an export, rank 0 sends it.

    Args:
        pool: the servers; at least one is up.
        base_weights: fingerprint of the model's base.
        takeover: take the run from the learner that holds its lease.
        transport, in_flight: as for `learner.sync.transport.Transport`.
        relays: send on what is pushed to `relay_from` servers or more, except with `transport="collective"`; None:
            there are none.

    Attributes:
        receipts: one per push, including the initial adapter (step 0): that of the slowest server.
        seconds: wall-clock seconds of every push, from export to the last receipt.
    """

    pool: ServerPool
    model: PeftModel
    lease: Lease
    base_weights: str | None = None
    takeover: bool = False
    transport: Choice = "auto"
    in_flight: InFlight = "drain"
    on_main: OnMain = on_one_rank
    relays: Relays | None = None
    relay_from: int = RELAY_FROM
    receipts: list[PushReceipt] = field(default_factory=list, init=False)
    seconds: list[float] = field(default_factory=list, init=False)
    _taken_over: set[str] = field(default_factory=set, init=False)
    _exporter: AdapterExporter | None = field(default=None, init=False)
    _export: AdapterExport | None = field(default=None, init=False)
    _transports: dict[str, Transport] = field(default_factory=dict, init=False)
    #: Servers that come back are sent the last export from threads of their own.
    _exporting: threading.Lock = field(default_factory=threading.Lock, init=False)
    #: Seconds for which the run is kept, once its training has ended.
    _kept: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        states, run_id = [replica.known for replica in self.pool.up()], self.lease.run_id
        # The kept lease may be older than a served version.
        served = [run.version for state in states for run in state.runs if run.run_id == run_id and run.version]
        lease = replace(self.lease, fence=max([self.lease.fence, *(version.fence + 1 for version in served)]))
        self.lease = self.on_main(lambda: lease)
        self.lora_dtype: str = self.on_main(lambda: states[0].lora_dtype)

    @property
    def last(self) -> PushReceipt | None:
        """Receipt of the last push."""
        return self.receipts[-1] if self.receipts else None

    def version(self, step: int) -> WeightVersion:
        """Return this learner's version of `step`."""
        return WeightVersion(run_id=self.lease.run_id, fence=self.lease.fence, step=step)

    def next_fence(self) -> None:
        """Outrank all earlier pushes: another training of the same adapter counts its steps from 0."""
        self.lease = replace(self.lease, fence=self.lease.fence + 1)

    def push(self, step: int) -> PushReceipt:
        """Export the adapter, send it to all servers at once, check the receipts. Collective.

        Afterwards at least one server samples from it; servers that do not are lost to the pool until they do.

        Raises:
            ProtocolMismatch: a receipt is not for what was sent.
            LockstepError: a server refuses the adapter, or none can be reached.
        """
        started = time.perf_counter()
        with self._exporting:
            if self._exporter is None:  # only now the trainer has put the model where it stays
                self._exporter = AdapterExporter(self.model, dtype=self.lora_dtype, base_weights=self.base_weights)
            self._kept = None
            export = self._export = self._exporter.export(self.version(step))
            replicas = self.pool.up()
        receipt: PushReceipt = self.on_main(lambda: self._send(export, replicas))
        self.receipts.append(receipt)
        self.seconds.append(time.perf_counter() - started)
        return receipt

    def pieces(self) -> list[bytes | memoryview]:
        """Return the body of the last push, in host memory of its own."""
        with self._exporting:
            assert self._export
            return self._export.pieces()

    def ensure(self, step: int) -> PushReceipt:
        """Push `step` unless it was the last push, and the training goes on: after its end the run may have given way,
        and must not do so while it is needed. Collective."""
        last = self.last
        return last if last and self._kept is None and last.version == self.version(step) else self.push(step)

    def catch_up(self, replica: Replica, admit: Callable[[RolloutClient, ServerState], None]) -> None:
        """Push the last export over HTTP to a server that is new, or has failed, and mark it up. Not collective.

        Args:
            admit: raises if a server that is new, or has restarted, is incompatible.

        Raises:
            LockstepError: as `push`.
        """
        state = replica.client.state()
        if state.draining:
            raise Draining(f"{replica.url} is about to leave")
        if replica.state is None or state.epoch != replica.state.epoch:
            admit(replica.client, state)
            if (transport := self._transports.pop(replica.url, None)) is not None:
                transport.close()  # its workers are gone
            replica.state, replica.receipt = state, None
        elif not replica.serves_receipt(state):
            replica.receipt = None
        pushed = False
        while True:
            with self._exporting:
                export = self._export
                if export is None or (replica.receipt and replica.receipt.version == export.manifest.version):
                    self.pool.mark_up(replica)  # before the next push can choose its servers
                    kept = self._kept
                    break
                pieces = export.pieces()
            with _remedies(replica):
                receipt = replica.client.push(
                    self.lease.run_id,
                    pieces,
                    self.lease.secret,
                    takeover=self._takes_over(replica),
                    in_flight=self.in_flight,
                )
            self._accept(replica, receipt, export.manifest)
            pushed = True
        if pushed and export is not None and kept is not None:  # the push has undone what `finish` said, or came first
            self._finish_on(replica, export.manifest.version, kept)

    def finish(self, keep_s: float) -> None:
        """Tell every server that the training has ended with the last push, or, before the first one, with what they
        serve of it; warn of those that do not hear it.
        """
        with self._exporting:
            self._kept = keep_s
        for replica in list(self.pool.replicas.values()):
            runs = replica.state.runs if replica.state else []
            served = next((run.version for run in runs if run.run_id == self.lease.run_id), None)
            if version := self.last.version if self.last else served:
                self._finish_on(replica, version, keep_s)

    def _finish_on(self, replica: Replica, version: WeightVersion, keep_s: float) -> None:
        try:
            replica.client.finish_run(version, self.lease.secret, keep_s=keep_s)
        except LockstepError as error:
            if error.code is not ErrorCode.UNKNOWN_RUN:  # it has restarted, or the run has been ended
                run_id = self.lease.run_id
                logger.warning(
                    "%s was not told that run %s has finished, and keeps its place (%s); free it with "
                    "`learner runs --rollout-url %s --end %s --takeover`",
                    *(replica.url, run_id, error, replica.url, run_id),
                )

    def delete_run(self) -> None:
        """End the run on all servers that are up and have it; its slots become free.

        Raises:
            LockstepError: the first error, after all servers have been asked.
        """
        with self._exporting:
            self._export = None  # no server is caught up with it any more
        errors = []
        for replica in self.pool.up():
            try:
                replica.client.delete_run(self.lease.run_id, self.lease.secret)
            except LockstepError as error:
                if error.code is not ErrorCode.UNKNOWN_RUN:
                    errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Close transports; pushed adapters stay served."""
        for transport in list(self._transports.values()):
            transport.close()

    def _send(self, export: AdapterExport, replicas: list[Replica]) -> PushReceipt:
        """Push to all `replicas` at once; return the receipt of the slowest."""
        version, incarnations = export.manifest.version, {replica.url: replica.incarnation for replica in replicas}
        for replica in replicas:
            replica.pushing = True

        def one(replica: Replica, receive: Callable[[], PushReceipt]) -> None:
            try:
                with _remedies(replica):
                    receipt = receive()
                self._accept(replica, receipt, export.manifest)
            except LockstepError as error:
                self.pool.lost_or_raise(replica, error, incarnations[replica.url])
            finally:
                replica.pushing = False

        def direct(replica: Replica) -> PushReceipt:
            transport = self._transports.get(replica.url)
            if transport is None:
                transport = Transport(replica, self.lease, export.flat.device, self.transport, self.in_flight)
                self._transports[replica.url] = transport
            return transport.send(export, takeover=self._takes_over(replica))

        relayed = self._relay(export, replicas)
        calls = [partial(one, r, partial(direct, r)) for r in replicas if r.url not in relayed]
        if relayed:
            answered = [r for r in replicas if r.url in relayed]
            checks = [partial(one, r, partial(r.client.relayed_receipt, relayed[r.url])) for r in answered]
            calls.insert(0, partial(one_after_the_other, checks))
        all_of(calls, "push")
        # If all of them failed, one that has come back since has been caught up.
        serving = self.pool.available(lambda r: r.receipt is not None and r.receipt.version == version)
        receipts = [replica.receipt for replica in serving if replica.receipt]
        return max(receipts, key=lambda receipt: receipt.transfer_seconds + receipt.install_seconds)

    def _relay(self, export: AdapterExport, replicas: list[Replica]) -> Mapping[str, Response]:
        """Return what servers have answered to relays, by their URLs; those without an answer are left."""
        if self.relays is None or self.transport == "collective" or len(replicas) < self.relay_from:
            return {}
        pieces = export.pieces()
        size, lease = sum(len(piece) for piece in pieces), self.lease
        requests = {
            replica.url: replica.client.relayed_push(
                lease.run_id, size, lease.secret, takeover=self._takes_over(replica), in_flight=self.in_flight
            )
            for replica in replicas
        }
        return self.relays.put(pieces, requests, max(replica.client.push_timeout_s for replica in replicas))

    def _takes_over(self, replica: Replica) -> bool:
        """Take over once on each server: a learner that is taken over itself must not take the run back."""
        return self.takeover and replica.url not in self._taken_over

    def _accept(self, replica: Replica, receipt: PushReceipt, manifest: AdapterManifest) -> None:
        if receipt.epoch != replica.known.epoch:  # it has to be admitted again first
            raise UnknownRun(f"{replica.url} has restarted")
        expected = (manifest.version, manifest.checksum, len(manifest.modules), replica.known.workers)
        received = (receipt.version, receipt.checksum, receipt.modules, receipt.workers)
        names = ("version", "checksum", "modules written", "workers that acknowledged")
        wrong = [f"{n}: {r} instead of {e}" for n, e, r in zip(names, expected, received, strict=True) if e != r]
        if wrong:
            raise ProtocolMismatch(
                f"the receipt of {replica.url} for {manifest.version} is not for what was sent ({'; '.join(wrong)}); "
                "restart that rollout server"
            )
        self._taken_over.add(replica.url)
        replica.receipt = receipt
        replica.heard()


@contextlib.contextmanager
def _remedies(replica: Replica) -> Iterator[None]:
    """Add to a server's refusal what the user of this learner can do about it."""
    try:
        yield
    except LockstepError as error:
        take_over = option("takeover", True)
        if error.code is ErrorCode.LEASE_MISMATCH:
            remedy = f"stop that learner, give another {option('run_id')}, or take the run over with {take_over}"
        elif error.code is ErrorCode.NO_FREE_RUN:
            most = replica.known.max_runs
            remedy = f"end one (`learner runs --rollout-url {replica.url} --end RUN_ID`), "
            remedy += f"take its place with {take_over}, " if most == 1 else ""
            remedy += f"or start the server with --max-runs {most + 1}"
        else:
            raise
        raise type(error)(f"{error.message}; {remedy}", **error.detail) from error
