"""Pushes as a whole, over workers that only answer: what a push that fails must leave, and what a repeated one gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.sleep import Sleep
from rollout_server.installs.broadcast_groups import BroadcastGroups
from rollout_server.installs.installer import Installer
from rollout_server.installs.slot_install import InstallContext
from rollout_server.ipc.client import Reply, WorkerCall
from rollout_server.ipc.memory import SharedMemory
from rollout_server.runs.slots import SlotState
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from shared.adapter_file import Layout, lay_out
from shared.collective import Announcement
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import PolicyRequest
from shared.weights import AdapterManifest, ModuleSpec, PushReceipt, WeightVersion

OWNER, STRANGER = "the owner's lease", "a stranger's lease"
LAYOUT = Layout(lay_out({"m.lora_A.weight": (2, 4), "m.lora_B.weight": (4, 2)}, "float32"))
_RESULTS = {
    "fill": {"modules": 1, "receive_seconds": 0.0, "write_seconds": 0.0},
    "host_group": {"port": 1},
    "apply": {"arrived": [0.5, 1.0, 0.25]},
}


class _Engine:
    """Pauses at once, and resumes when `goes_on` is set."""

    errored = False

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.broken: Exception | None = None
        self.output_processor = SimpleNamespace(request_states={}, propagate_error=lambda error: None)

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None: ...

    async def resume_generation(self) -> None:
        await self.goes_on.wait()
        if self.broken:
            raise self.broken


class _Workers:
    """One worker. `refused`: operation -> code that it answers next; `held`: operation -> until when it does not."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.holding: set[str] = set()
        self.begun: list[tuple[str, dict[str, Any]]] = []

    def __len__(self) -> int:
        return 1

    def begin(self, op: str, **arguments: Any) -> WorkerCall:
        self.begun.append((op, arguments))
        reply = Reply()

        async def answer() -> None:
            reply.acknowledged.set_result(None)
            if op in self.held:
                self.holding.add(op)
                await self.held[op].wait()
                self.holding.discard(op)
            if code := self.refused.pop(op, None):
                reply.result.set_result({"ok": False, "code": code, "message": "refused"})
            else:
                reply.result.set_result({"ok": True, **_RESULTS.get(op, {})})

        reply.task = asyncio.ensure_future(answer())  # type: ignore[attr-defined]
        return WorkerCall(op, [reply])

    def begin_each(self, op: str, arguments: list[dict[str, Any]]) -> WorkerCall:
        return self.begin(op, **arguments[0])

    host: str | None = None

    async def readable(self, memory: SharedMemory, size: int, timeout: float) -> list[tuple[str, int]]:
        return [(memory.path, memory.number)]

    async def call(self, op: str, timeout: float, **arguments: Any) -> list[dict[str, Any]]:
        return await self.begin(op, **arguments).results(timeout)

    def left(self) -> list[str]:
        return [arguments["group"] for op, arguments in self.begun if op == "leave_group"]


class _Server:
    """An installer over `engine` and `workers`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ServerSettings(**{"push_timeout": 5.0, **settings})
        self.engine, self.workers = _Engine(), _Workers()
        self.runs = RunTable(self.settings.slots_per_run, self.settings.max_runs, merged=self.settings.merges)
        self.proxy = EngineProxy(self.engine, self.runs)
        served = SimpleNamespace(
            base=SimpleNamespace(weights=None), model="m", max_lora_rank=8, lora_dtype="float32", boot_id="boot"
        )
        self.installer = Installer(
            InstallContext(self.proxy, self.workers, self.runs, "boot"),  # type: ignore[arg-type]
            BroadcastGroups(self.workers, self.settings, "gloo", "127.0.0.1"),  # type: ignore[arg-type]
            served,  # type: ignore[arg-type]
            self.settings,
            Sleep(self.proxy, self.workers, enabled=False),  # type: ignore[arg-type]
        )

    async def push(
        self,
        step: int,
        lease: str = OWNER,
        run_id: str = "r",
        *,
        fence: int = 0,
        takeover: bool = False,
        in_flight: Any = "drain",
    ) -> PushReceipt:
        manifest = AdapterManifest(
            version=WeightVersion(run_id=run_id, fence=fence, step=step),
            base_weights=None,
            dtype="float32",
            modules={"m": ModuleSpec(rank=2, scaling=1.0)},
            peft_config={},
            checksum=f"sum {step}",
        )
        blob = LAYOUT.header(manifest) + bytes(LAYOUT.nbytes)

        async def body() -> AsyncIterator[bytes]:
            yield blob

        return await self.installer.push(run_id, lease, takeover, body(), in_flight)

    async def join(self, lease: str = OWNER) -> None:
        run = self.runs.get("r")
        async for _ in self.installer.groups.join(run, lease):
            pass

    async def broadcast(self, step: int, lease: str = OWNER) -> PushReceipt:
        version = WeightVersion(run_id="r", step=step)
        announced = Announcement(version=version, checksum=f"sum {step}", layout=LAYOUT.key)
        events = [event async for event in self.installer.broadcast("r", lease, announced)]
        assert events[-1] is not None
        return events[-1]

    def owners(self) -> dict[str, tuple[str, Any]]:
        return {run_id: (run.lease, run.active.version) for run_id, run in self.runs.runs.items() if run.active}


@pytest.fixture(params=["adapter", "merge"])
async def server(request: pytest.FixtureRequest) -> _Server:
    return _Server(apply=request.param)


async def _refused(push: Any) -> ErrorCode:
    with pytest.raises(LockstepError) as refusal:
        await push
    return refusal.value.code


async def _until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not reached():  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(0.001)


async def _until_held(server: _Server, op: str) -> None:
    await _until(lambda: op in server.workers.holding)


async def _until_waiting(server: _Server, pushes: int) -> None:
    (lock,) = {run.ring.push_lock for run in server.runs._opening.values()}
    await _until(lambda: len(lock._waiters or ()) == pushes)


async def test_the_receipt_of_a_merge_says_how_much_of_the_update_arrived() -> None:
    receipt = await _Server(apply="merge").push(5)
    assert (receipt.update_share, receipt.update_error) == (0.5, 0.5)
    assert (await _Server(apply="columns").push(5)).update_share is None


@pytest.mark.parametrize("run_id", ["r", "another"])
@pytest.mark.parametrize("in_flight", ["drain", "keep"])
async def test_a_takeover_owns_nothing_before_its_flip(server: _Server, run_id: str, in_flight: str) -> None:
    await server.push(5)
    before, slot = server.owners(), server.runs.get("r").active
    server.workers.held["fill"] = asyncio.Event()
    server.workers.refused["fill"] = "checksum_mismatch"
    takeover = asyncio.ensure_future(server.push(6, STRANGER, run_id, takeover=True, in_flight=in_flight))
    await _until_held(server, "fill")
    assert server.owners() == before
    server.workers.held.pop("fill").set()
    assert await _refused(takeover) is ErrorCode.CHECKSUM_MISMATCH
    assert server.owners() == before
    assert server.runs.get("r").active is slot
    with server.proxy.admit(PolicyRequest()) as admission:
        assert admission.version.step == 5
    assert await _refused(server.push(7, STRANGER)) is ErrorCode.LEASE_MISMATCH
    assert (await server.push(7)).version.step == 7


@pytest.mark.parametrize("in_flight", ["drain", "keep"])
async def test_sessions_of_the_learner_before_end_when_its_successor_is_served(server: _Server, in_flight: str) -> None:
    await server.push(5)
    recalled: list[str] = []
    hold = server.proxy.hold(PolicyRequest(), recalled.append)
    assert hold is not None
    server.workers.refused["fill"] = "not_finite"
    refused = server.push(6, STRANGER, fence=1, takeover=True, in_flight=in_flight)
    assert await _refused(refused) is ErrorCode.NOT_FINITE
    assert recalled == []
    server.proxy.admit_held(hold).release()
    await server.push(6, STRANGER, fence=1, takeover=True, in_flight=in_flight)
    assert recalled == ["run_ended"]


@pytest.mark.parametrize("op", ["apply", "swap"])
async def test_a_takeover_that_fails_as_late_as_can_be(op: str) -> None:
    server = _Server(apply="merge" if op == "apply" else "adapter")
    await server.push(5)
    before = server.owners()
    server.workers.refused[op] = "install_failed"
    with server.proxy.admit(PolicyRequest()):
        takeover = server.push(6, STRANGER, takeover=True, in_flight="keep")
        assert await _refused(takeover) is ErrorCode.INSTALL_FAILED
    assert server.owners() == before


@pytest.mark.parametrize("run_id", ["r", "another"])
async def test_a_takeover_that_lands_owns_the_place_alone(server: _Server, run_id: str) -> None:
    await server.push(5)
    old = server.proxy.admit(PolicyRequest()) if not server.settings.merges else None
    await server.push(6, STRANGER, run_id, takeover=True)
    assert server.owners() == {run_id: (STRANGER, WeightVersion(run_id=run_id, step=6))}
    assert server.proxy.admit(PolicyRequest()).version.step == 6
    if old is not None:
        old.release()
        states = [slot.state for slot in server.runs.get(run_id).slots]
        assert sorted(states) == [SlotState.ACTIVE, SlotState.FREE]
    code = ErrorCode.LEASE_MISMATCH if run_id == "r" else ErrorCode.NO_FREE_RUN
    assert await _refused(server.push(7)) is code


async def test_a_push_that_waits_while_its_run_is_taken_over_is_refused(server: _Server) -> None:
    await server.push(5)
    await server.join()
    server.workers.held["fill"] = asyncio.Event()
    takeover = asyncio.ensure_future(server.push(6, STRANGER, takeover=True))
    await _until_held(server, "fill")
    late = [asyncio.ensure_future(server.push(7)), asyncio.ensure_future(server.broadcast(8))]
    end = asyncio.ensure_future(server.installer.end("r", OWNER))
    await _until_waiting(server, 3)
    server.workers.held.pop("fill").set()
    await takeover
    assert [await _refused(push) for push in (*late, end)] == [ErrorCode.LEASE_MISMATCH] * 3
    assert server.owners()["r"][0] == STRANGER


async def test_a_takeover_ends_the_other_learners_group(server: _Server) -> None:
    await server.push(5)
    await server.join()
    assert (await server.broadcast(6)).transport == "collective"
    server.workers.refused["fill"] = "checksum_mismatch"
    await _refused(server.push(7, STRANGER, takeover=True))
    assert (await server.broadcast(7)).transport == "collective", "a takeover that fails leaves it"
    await server.push(8, STRANGER, takeover=True)
    assert len(server.workers.left()) == 1
    assert await _refused(server.broadcast(9, STRANGER)) is ErrorCode.NO_GROUP


async def test_a_learner_that_is_taken_over_while_it_joins_shares_no_group(server: _Server) -> None:
    await server.push(5)
    server.workers.held["join_group"] = asyncio.Event()
    joining = asyncio.ensure_future(server.join())
    await _until_held(server, "join_group")
    await server.push(6, STRANGER, takeover=True)
    server.workers.held["join_group"].set()
    assert await _refused(joining) is ErrorCode.LEASE_MISMATCH
    assert len(server.workers.left()) == 1
    assert await _refused(server.broadcast(7, STRANGER)) is ErrorCode.NO_GROUP


async def test_the_checksum_of_what_is_served_makes_nobody_its_owner(server: _Server) -> None:
    await server.push(5)
    assert await _refused(server.push(5, STRANGER, takeover=True)) is ErrorCode.STALE_VERSION
    assert (await server.push(5)).repeated


async def test_the_same_push_again_makes_it_a_run_in_training_again(server: _Server) -> None:
    version = (await server.push(5)).version
    run = server.runs.get("r")
    server.runs.finish("r", run.lease, version, 0.0)
    assert run.finished
    assert (await server.push(5)).repeated
    assert run.finished is None


async def test_a_first_push_that_fails_makes_room_for_those_that_wait(server: _Server) -> None:
    server.workers.held["fill"] = asyncio.Event()
    server.workers.refused["fill"] = "not_finite"
    first = asyncio.ensure_future(server.push(0))
    await _until_held(server, "fill")
    second = asyncio.ensure_future(server.push(1))
    await _until_waiting(server, 1)
    other = asyncio.ensure_future(server.push(0, STRANGER, "another"))
    await _until_waiting(server, 2)
    server.workers.held.pop("fill").set()
    assert await _refused(first) is ErrorCode.NOT_FINITE
    assert (await second).version.step == 1
    assert await _refused(other) is ErrorCode.NO_FREE_RUN
    assert list(server.owners()) == ["r"]


@pytest.mark.parametrize("in_flight", ["keep", "carried"])
@pytest.mark.parametrize("resuming", [False, True])
async def test_the_same_push_again_gets_the_receipt_whatever_the_first_one_does(
    in_flight: str, resuming: bool, server: _Server
) -> None:
    """It resumes, or the workers are still changing what is served."""
    await server.push(0)
    running = server.proxy.admit(PolicyRequest())
    op = "apply" if server.settings.merges else "swap"
    if resuming:
        server.engine.goes_on.clear()
    else:
        server.workers.held[op] = asyncio.Event()
    first = asyncio.ensure_future(server.push(1, in_flight=in_flight))
    run = server.runs.get("r")
    await _until(lambda: run.active.version.step == 1 if resuming else op in server.workers.holding)
    again = [asyncio.ensure_future(server.push(1, in_flight=in_flight)) for _ in range(3)]
    await _until_waiting(server, 3)
    server.engine.goes_on.set()
    for held in server.workers.held.values():
        held.set()
    receipt = await first
    assert not receipt.repeated
    for push in again:
        assert await push == receipt.model_copy(update={"repeated": True})
    assert running.version.step == 1


@pytest.mark.parametrize("in_flight", ["drain", "keep", "carried"])
async def test_a_push_that_is_cancelled_after_its_flip_has_left_a_receipt(server: _Server, in_flight: str) -> None:
    await server.push(0)
    running = server.proxy.admit(PolicyRequest()) if in_flight != "drain" else None
    server.engine.goes_on.clear()
    first = asyncio.ensure_future(server.push(1, in_flight=in_flight))
    await _until(lambda: server.runs.get("r").active.version.step == 1)
    first.cancel()
    server.engine.goes_on.set()
    await asyncio.wait({first})
    assert (await server.push(1)).repeated
    assert not server.proxy.errored
    if running:
        running.release()
    assert (await server.push(2)).version.step == 2


@pytest.mark.parametrize("in_flight", ["keep", "carried"])
async def test_a_push_that_is_cancelled_while_weights_change_lands(server: _Server, in_flight: str) -> None:
    await server.push(0)
    running = server.proxy.admit(PolicyRequest())
    op = "apply" if server.settings.merges else "swap"
    server.workers.held[op] = asyncio.Event()
    first = asyncio.ensure_future(server.push(1, in_flight=in_flight))
    await _until_held(server, op)
    for _ in range(5):  # as Starlette does it
        first.cancel()
        await asyncio.sleep(0)
    assert not first.done()
    server.workers.held.pop(op).set()
    await asyncio.wait({first})
    assert not server.proxy.errored
    assert running.version.step == 1
    assert (await server.push(1)).repeated
    running.release()
    assert (await server.push(2)).version.step == 2


async def test_a_deadline_does_not_end_a_swap_half_way() -> None:
    server = _Server(push_timeout=0.2)
    await server.push(0)
    running = server.proxy.admit(PolicyRequest())
    server.workers.held["swap"] = asyncio.Event()
    push = asyncio.ensure_future(server.push(1, in_flight="keep"))
    await asyncio.sleep(0.4)
    assert not push.done()
    server.workers.held["swap"].set()
    assert (await push).version.step == 1
    assert running.version.step == 1
    assert not server.proxy.errored


@pytest.mark.parametrize("late", [False, True])
async def test_an_engine_that_does_not_resume_ends_the_server(
    server: _Server, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout_server.engine.proxy._RESUME_SECONDS", 0.01)
    await server.push(0)
    running = server.proxy.admit(PolicyRequest())
    server.engine.broken = RuntimeError("CUDA error")
    if late:
        server.engine.goes_on.clear()
        await server.push(1, in_flight="keep")
        assert not server.proxy.errored
        server.engine.goes_on.set()
        await _until(lambda: server.proxy.errored)
    else:
        with pytest.raises(RuntimeError):
            await server.push(1, in_flight="keep")
    assert server.proxy.errored
    running.release()


async def test_a_new_run_takes_a_finished_ones_place(server: _Server) -> None:
    """With its flip, and not before; the finished run's learner may come back where there is a place."""
    first = await server.push(5)
    server.runs.finish("r", OWNER, first.version, 0.0)
    server.workers.refused["fill"] = ErrorCode.CHECKSUM_MISMATCH
    assert await _refused(server.push(0, STRANGER, "next")) is ErrorCode.CHECKSUM_MISMATCH
    assert server.owners() == {"r": (OWNER, first.version)}
    second = await server.push(0, STRANGER, "next")
    assert server.owners() == {"next": (STRANGER, second.version)}
    assert await _refused(server.push(6)) is ErrorCode.NO_FREE_RUN
    server.runs.finish("next", STRANGER, second.version, 0.0)
    assert (await server.push(6)).version.step == 6
    assert list(server.owners()) == ["r"]


async def test_anyone_may_end_a_finished_run_and_only_its_learner_another(server: _Server) -> None:
    receipt = await server.push(5)
    assert await _refused(server.installer.end("r", STRANGER)) is ErrorCode.LEASE_MISMATCH
    server.runs.finish("r", OWNER, receipt.version, 0.0)
    await server.installer.end("r", STRANGER)
    assert server.owners() == {}
    await server.push(6)
    await server.installer.end("r", STRANGER, takeover=True)
    assert server.owners() == {}


async def test_workers_of_several_hosts_meet_the_learner_at_the_first_ones() -> None:
    server = _Server()
    await server.push(0)
    groups, run = server.installer.groups, server.runs.get("r")
    for host in (None, "10.0.0.1"):
        server.workers.host = host
        joining = groups.join(run, OWNER)
        invitation = await anext(joining)
        assert invitation
        assert invitation.host == host
        await joining.aclose()
