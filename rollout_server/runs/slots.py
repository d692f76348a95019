"""State of a run's slots: reserve, flip, free. No other module changes it.

A run owns a ring of adapter slots. At any time one of them is active (new requests get it), others may be draining
(running requests finish on them) or being filled. All calls come from one event loop, so no lock is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from shared.adapter_file import AdapterHeader
from shared.errors import NoFreeSlot, StepNotReached, UnknownRun
from shared.weights import PushReceipt, RunState, WeightVersion

#: Of the time that a push may wait for a slot, the share after which sessions between two calls give way to it.
_PATIENCE = 0.5

#: Why a session is told to end.
Recall = Literal["run_ended", "superseded"]


class SlotState(StrEnum):
    """`lost`: a worker may still be writing it; free again when the worker has ended."""

    FREE = "free"
    FILLING = "filling"
    ACTIVE = "active"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(eq=False)
class Slot:
    """One adapter slot of vLLM, known there by `slot_id` (its LoRA id). 0: the live weights, for `--apply merge`."""

    slot_id: int
    state: SlotState = SlotState.FREE
    version: WeightVersion | None = None
    install_seq: int = 0
    checksum: str = ""
    receipt: PushReceipt | None = None  # of the push that it serves; complete when that push is answered
    requests: int = 0
    sessions: set[SessionHolder] = field(default_factory=set)

    @property
    def held(self) -> bool:
        """Whether it must not be refilled."""
        return self.requests > 0 or bool(self.sessions)

    @property
    def salt(self) -> str:
        """Prefix-cache salt, unique to each install."""
        return f"lockstep:{self.install_seq}"


@dataclass(eq=False)
class Ring:
    """Slots of one run at a time; of the next one too, while its first push is under way."""

    slots: list[Slot]
    push_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # While it is not set no request may be admitted (`--apply merge`: the weights are about to change).
    admits: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.admits.set()

    def notify(self) -> None:
        """Wake all that wait for a slot."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, reached: Callable[[], bool], deadline: float) -> bool:
        """Wait until `reached`, checked at every change of a slot; False if `deadline` (monotonic seconds) passes."""
        try:
            async with asyncio.timeout_at(loop_time(deadline)):
                while not reached():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


class Holder(Protocol):
    """Request that holds a slot: an `engine.admission.Admission`."""

    def move(self, tokens: dict[tuple[str, int], int], version: WeightVersion, kv: Any) -> None: ...


class SessionHolder(Holder, Protocol):
    """Session that holds a slot: an `engine.admission.SessionHold`."""

    def recall(self, reason: Recall) -> None: ...


@dataclass(frozen=True)
class Finished:
    """End of a run's training, and how long nobody else gets its place; monotonic seconds."""

    at: float
    kept_until: float


@dataclass(eq=False)
class Run:
    """One training run on this server, in the table from its first flip on.

    Attributes:
        lease: secret of the learner whose push flipped last.
        finished: None while its learner trains, or may come back.
    """

    run_id: str
    lease: str
    ring: Ring
    active: Slot | None = None
    header: AdapterHeader | None = None  # of its last install
    finished: Finished | None = None
    last_push: float | None = None  # in monotonic seconds
    not_moving: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def __post_init__(self) -> None:
        self.not_moving.set()
        self.slots = self.ring.slots
        self._holders: dict[Slot, set[Holder]] = {slot: set() for slot in self.slots}

    @property
    def gives_way(self) -> bool:
        """Whether another run may have its place."""
        return self.finished is not None and time.monotonic() >= self.finished.kept_until

    def acquire(self, slot: Slot, holder: Holder) -> None:
        """Keep `slot` from being refilled until `release`."""
        slot.requests += 1
        self._holders[slot].add(holder)

    def release(self, slot: Slot, holder: Holder) -> None:
        """End a request's hold on `slot`."""
        slot.requests -= 1
        self._holders[slot].discard(holder)
        self._released(slot)

    def acquire_for_session(self, slot: Slot, holder: SessionHolder) -> None:
        """Keep `slot` from being refilled until `release_by_session`, also while no request runs."""
        slot.sessions.add(holder)

    def release_by_session(self, slot: Slot, holder: SessionHolder) -> None:
        """End a session's hold on `slot`."""
        slot.sessions.discard(holder)
        self._released(slot)

    def _released(self, slot: Slot) -> None:
        if slot.state is SlotState.DRAINING and not slot.held:
            slot.state = SlotState.FREE
        if slot.requests == 0:
            self.ring.notify()

    def recall(self, before: int | None = None, *, draining: bool = False) -> None:
        """End the sessions of this run.

        Args:
            before: only those of learners with an earlier fence: whoever opened them is gone.
            draining: only those that keep a slot from being refilled.
        """
        for slot in self.slots:
            version = slot.version
            if version is None or version.run_id != self.run_id or (draining and slot.state is not SlotState.DRAINING):
                continue
            if before is None or version.fence < before:
                _end_sessions(slot, "run_ended")

    async def reserve(self, deadline: float, fence: int | None = None) -> Slot:
        """Wait for a free slot and take it for filling; raises `no_free_slot` at `deadline` (monotonic seconds).

        Sessions of learners before `fence` give way at once, others after a part of that time, as soon as no request
        runs on their slot.
        """

        def free() -> Slot | None:
            return next((slot for slot in self.slots if slot.state is SlotState.FREE), None)

        def reached() -> bool:
            return self.closed or free() is not None

        def made_free() -> bool:
            idle = [slot for slot in self.slots if slot.state is SlotState.DRAINING and not slot.requests]
            if not reached() and idle:
                _end_sessions(min(idle, key=lambda slot: slot.install_seq), "superseded")
            return reached()

        if fence is not None and not reached():
            self.recall(fence, draining=True)
        now = time.monotonic()
        patient = await self.ring.wait_for(reached, now + _PATIENCE * (deadline - now))
        if not patient and not await self.ring.wait_for(made_free, deadline):
            busy = {
                slot.slot_id: f"{slot.state.value}, {slot.requests} requests, {len(slot.sessions)} sessions"
                for slot in self.slots
            }
            raise NoFreeSlot(
                f"run {self.run_id}: no slot came free before the push's deadline ({busy}); requests still run on "
                "older versions: wait for them, push with in_flight = keep, or start the server with more "
                "--slots-per-run"
            )
        slot = free()
        if slot is None or self.closed:
            raise UnknownRun(f"run {self.run_id} was deleted while a push was waiting")
        slot.state = SlotState.FILLING
        slot.version = slot.receipt = None
        return slot

    def flip(self, slot: Slot, version: WeightVersion, install_seq: int, checksum: str) -> None:
        """Give `slot` to new requests; running ones finish on theirs."""
        slot.version, slot.install_seq, slot.checksum = version, install_seq, checksum
        previous, self.active = self.active, slot
        slot.state, self.last_push = SlotState.ACTIVE, time.monotonic()
        if previous is not None and previous is not slot:
            previous.state = SlotState.DRAINING if previous.held else SlotState.FREE
        self.ring.notify()

    def move(
        self, version: WeightVersion, install_seq: int, checksum: str, tokens: dict[tuple[str, int], int], kv: Any
    ) -> None:
        """Move running requests to another version in the active slot; `tokens`, `kv`: see `Admission.move`."""
        slot = self.active
        assert slot is not None
        slot.version, slot.install_seq, slot.checksum = version, install_seq, checksum
        self.last_push = time.monotonic()
        for holder in (*self._holders[slot], *slot.sessions):
            holder.move(tokens, version, kv)
        self.ring.notify()

    def give_back(self, slot: Slot, *, lost: bool = False) -> None:
        """Return a slot that was reserved and does not serve; `lost` while a worker may still be writing it."""
        slot.state = SlotState.LOST if lost else SlotState.FREE
        self.ring.notify()

    async def wait_for_step(self, step: int, wait_s: float) -> None:
        """Wait until `step` or a later one is served; raises `step_not_reached` after `wait_s` seconds."""

        def served() -> WeightVersion | None:
            return self.active.version if self.active else None

        def reached() -> bool:
            return self.closed or ((version := served()) is not None and version.step >= step)

        if not await self.ring.wait_for(reached, time.monotonic() + wait_s):
            raise StepNotReached(f"run {self.run_id} serves {served()}, step {step} did not arrive within {wait_s} s")

    def state(self) -> RunState:
        """Return the run's state for clients."""
        active, serving, now = self.active, (SlotState.ACTIVE, SlotState.DRAINING), time.monotonic()
        return RunState(
            run_id=self.run_id,
            version=active.version if active else None,
            checksum=active.checksum if active else None,
            install_seq=active.install_seq if active else None,
            slots=[
                {
                    "slot_id": slot.slot_id,
                    "state": slot.state.value,
                    "version": slot.version.model_dump() if slot.version and slot.state in serving else None,
                    "requests": slot.requests,
                    "sessions": len(slot.sessions),
                }
                for slot in self.slots
            ],
            running_requests=sum(slot.requests for slot in self.slots),
            finished=self.finished is not None,
            kept_seconds=max(self.finished.kept_until - now, 0.0) if self.finished else None,
            seconds_since_push=None if self.last_push is None else now - self.last_push,
        )


def _end_sessions(slot: Slot, reason: Recall) -> None:
    for holder in tuple(slot.sessions):
        holder.recall(reason)


def loop_time(deadline: float) -> float:
    """Convert monotonic seconds to the event loop's clock."""
    return asyncio.get_running_loop().time() + deadline - time.monotonic()
