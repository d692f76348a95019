"""Which slot of a run serves: reserve, flip, free. The only place that changes it.

A run owns a ring of adapter slots. At any time one of them is active (new requests get it), others may be draining
(running requests finish on them) or being filled. All calls come from one event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from shared.adapter_file import AdapterHeader
from shared.errors import NoFreeSlot, StepNotReached, UnknownRun
from shared.weights import RunState, WeightVersion


class SlotState(StrEnum):
    """`lost`: a worker may still be writing it; it comes back when the worker says that it is done."""

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
    requests: int = 0

    @property
    def serves(self) -> bool:
        """Whether any request can be sampling from it."""
        return self.state in (SlotState.ACTIVE, SlotState.DRAINING)

    @property
    def salt(self) -> str:
        """Prefix-cache salt: never the same for two installs, whatever their names."""
        return f"lockstep:{self.install_seq}"


@dataclass(eq=False)
class Ring:
    """The slots of one run after another; whoever waits for one of them waits on `changed`.

    While `admits` is not set nobody may become a holder (`--apply merge`: the weights are about to change).
    """

    slots: list[Slot]
    admits: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self.admits.set()


Holder = Any  # of a slot: an `admission.Admission`


@dataclass(eq=False)
class Run:
    """One training run on this server."""

    run_id: str
    lease: str
    ring: Ring
    active: Slot | None = None
    header: AdapterHeader | None = None  # of its last install
    push_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    not_moving: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def __post_init__(self) -> None:
        self.not_moving.set()
        self._holders: dict[Slot, set[Holder]] = {slot: set() for slot in self.slots}

    @property
    def slots(self) -> list[Slot]:
        """The slots of this run's ring."""
        return self.ring.slots

    @property
    def changed(self) -> asyncio.Condition:
        """Notified whenever a slot changes its state."""
        return self.ring.changed

    def acquire(self, slot: Slot, holder: Holder) -> None:
        """Keep `slot` from being refilled until `release`."""
        slot.requests += 1
        self._holders[slot].add(holder)

    def release(self, slot: Slot, holder: Holder) -> None:
        """A request that held `slot` has ended."""
        slot.requests -= 1
        self._holders[slot].discard(holder)
        if slot.requests == 0:
            if slot.state is SlotState.DRAINING:
                slot.state = SlotState.FREE
            notify_soon(self.changed)

    async def reserve(self, deadline: float) -> Slot:
        """Take a free slot for filling; waits for running requests to leave one.

        Raises:
            LockstepError: `no_free_slot` when `deadline` (monotonic seconds) passes first.
        """

        def free() -> Slot | None:
            return next((slot for slot in self.slots if slot.state is SlotState.FREE), None)

        async with self.changed:
            try:
                async with asyncio.timeout_at(loop_time(deadline)):
                    await self.changed.wait_for(lambda: free() is not None or self.closed)
            except TimeoutError:
                busy = {slot.slot_id: f"{slot.state.value}, {slot.requests} requests" for slot in self.slots}
                raise NoFreeSlot(
                    f"run {self.run_id}: no slot came free before the push's deadline ({busy}); requests still run on "
                    "older versions: wait for them, or start the server with more --slots-per-run"
                ) from None
        slot = free()
        if slot is None or self.closed:
            raise UnknownRun(f"run {self.run_id} was deleted while a push was waiting")
        slot.state = SlotState.FILLING
        slot.version = None
        return slot

    async def flip(self, slot: Slot, version: WeightVersion, install_seq: int, checksum: str) -> None:
        """From now on new requests get `slot`; running ones finish where they are."""
        slot.version, slot.install_seq, slot.checksum = version, install_seq, checksum
        previous, self.active = self.active, slot
        slot.state = SlotState.ACTIVE
        if previous is not None and previous is not slot:
            previous.state = SlotState.DRAINING if previous.requests else SlotState.FREE
        async with self.changed:
            self.changed.notify_all()

    async def move_to(
        self,
        spare: Slot | None,
        version: WeightVersion,
        install_seq: int,
        checksum: str,
        moved: Callable[[Holder], None],
    ) -> None:
        """The active slot holds another adapter, for running requests too: `moved` tells each of them.

        `spare`, where that adapter was, is free.
        """
        slot = self.active
        assert slot is not None
        slot.version, slot.install_seq, slot.checksum = version, install_seq, checksum
        for holder in self._holders[slot]:
            moved(holder)
        if spare is not None:
            spare.state = SlotState.FREE
        async with self.changed:
            self.changed.notify_all()

    async def give_back(self, slot: Slot, *, lost: bool = False) -> None:
        """A fill failed: nothing is served from `slot`; `lost` while a worker may still be writing it."""
        slot.state = SlotState.LOST if lost else SlotState.FREE
        async with self.changed:
            self.changed.notify_all()

    async def wait_for_step(self, step: int, wait_s: float) -> None:
        """Wait until `step` or a later one is served.

        Raises:
            LockstepError: `step_not_reached` after `wait_s` seconds.
        """

        def reached() -> bool:
            served = self.active.version if self.active else None
            return (served is not None and served.step >= step) or self.closed

        async with self.changed:
            try:
                async with asyncio.timeout(wait_s):
                    await self.changed.wait_for(reached)
            except TimeoutError:
                served = self.active.version if self.active else None
                raise StepNotReached(
                    f"run {self.run_id} serves {served}, step {step} did not arrive within {wait_s} s"
                ) from None

    def state(self) -> RunState:
        """The run as told to clients."""
        active = self.active
        return RunState(
            run_id=self.run_id,
            version=active.version if active else None,
            checksum=active.checksum if active else None,
            install_seq=active.install_seq if active else None,
            slots=[
                {
                    "slot_id": slot.slot_id,
                    "state": slot.state.value,
                    "version": slot.version.model_dump() if slot.version and slot.serves else None,
                    "requests": slot.requests,
                }
                for slot in self.slots
            ],
            running_requests=sum(slot.requests for slot in self.slots),
        )


def loop_time(deadline: float) -> float:
    """Monotonic seconds as the event loop counts them."""
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


def notify_soon(condition: asyncio.Condition) -> None:
    """Wake waiters from code that cannot await."""

    async def notify() -> None:
        async with condition:
            condition.notify_all()

    task = asyncio.get_running_loop().create_task(notify())
    _NOTIFIERS.add(task)
    task.add_done_callback(_NOTIFIERS.discard)


# The loop keeps only weak references to tasks.
_NOTIFIERS: set[asyncio.Task[None]] = set()
