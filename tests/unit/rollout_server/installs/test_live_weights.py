"""`--apply merge` on the server's side: which requests run while the weights change, and how a failure is undone."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from rollout_server.engine.proxy import EngineProxy
from rollout_server.installs.live_weights import LiveWeights, WeightUpdate
from rollout_server.ipc.client import WorkerCall
from rollout_server.runs.table import RunTable
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import PolicyRequest
from shared.weights import WeightVersion
from tests.support.runs import open_run


class _Engine:
    errored = False
    output_processor = SimpleNamespace(request_states={}, propagate_error=lambda error: None)

    def __init__(self) -> None:
        self.paused = False
        self.submitted: list = []

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.paused = True

    async def resume_generation(self) -> None:
        self.paused = False

    async def generate(self, prompt, params, request_id, **kwargs):
        self.submitted.append((prompt, kwargs))
        yield SimpleNamespace(request_id=request_id, outputs=[])


class _Workers:
    """Two workers; `broken` names what the second one cannot apply."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.weights: list[str | None] = [None, None]
        self.broken: set[str | None] = set()

    def begin(self, op: str, checksum: str | None) -> WorkerCall:
        assert op == "apply"
        assert self.engine.paused
        pending = []
        for index in (0, 1):
            result = asyncio.get_running_loop().create_future()
            if index and checksum in self.broken:
                self.weights[index] = "half of it"
                result.set_result({"ok": False, "code": "install_failed", "message": "broken"})
            else:
                self.weights[index] = checksum
                result.set_result({"ok": True, "arrived": [0.5, 1.0, 0.25]})
            pending.append(SimpleNamespace(result=result, acknowledged=result))
        return WorkerCall(op, pending)

    async def call(self, op: str, timeout: float, checksum: str | None):
        return await self.begin(op, checksum).results(timeout)


@pytest.fixture
async def served():
    engine = _Engine()
    table = RunTable(2, 1, merged=True)
    workers = _Workers(engine)
    proxy = EngineProxy(engine, table)
    weights = LiveWeights(proxy, workers)
    return SimpleNamespace(engine=engine, table=table, workers=workers, proxy=proxy, weights=weights)


async def _push(served, step: int, deadline: float = 5.0, kv=None) -> None:
    run = open_run(served.table)
    version, seq = WeightVersion(run_id="r", step=step), served.table.next_install_seq()

    def commit(update: WeightUpdate) -> None:
        if kv is None:
            run.flip(run.slots[0], version, seq, f"sum{step}")
        else:
            run.move(version, seq, f"sum{step}", update.tokens, kv)

    await served.weights.update(run, f"sum{step}", time.monotonic() + deadline, commit, kv)


async def test_the_base_is_served_until_a_push_and_after_the_run() -> None:
    table = RunTable(2, 1, merged=True)
    proxy = EngineProxy(_Engine(), table)
    first = proxy.admit(PolicyRequest(policy="base"))
    assert table.base.slots[0].requests == 1
    first.release()
    run = open_run(table)
    proxy.admit(PolicyRequest(policy="base")).release()
    run.flip(run.slots[0], WeightVersion(run_id="r", step=0), table.next_install_seq(), "sum")
    with pytest.raises(LockstepError) as refusal:
        proxy.admit(PolicyRequest(policy="base"))
    assert refusal.value.code is ErrorCode.BASE_NOT_SERVED
    assert refusal.value.status == 409
    salt = run.slots[0].salt
    table.close("r")
    proxy.admit(PolicyRequest(policy="base")).release()
    assert table.base.slots[0].salt != salt
    assert table.base.slots[0].checksum == ""


async def test_no_lora_request_but_a_salt(served) -> None:
    await _push(served, 0)
    with served.proxy.admit(PolicyRequest()) as admission:
        _ = [o async for o in admission.generate({"prompt_token_ids": [1]}, None, "a")]
    ((prompt, kwargs),) = served.engine.submitted
    assert prompt["cache_salt"]
    assert "lora_request" not in kwargs


@pytest.mark.parametrize("holder", ["base", "latest"])
async def test_drain_waits_for_running_requests_and_new_ones_queue(served, holder: str) -> None:
    if holder == "latest":
        await _push(served, 0)
    running = served.proxy.admit(PolicyRequest(policy=holder))
    push = asyncio.ensure_future(_push(served, 1))
    await asyncio.sleep(0.02)
    assert not push.done()
    assert not served.engine.paused
    queued = asyncio.ensure_future(served.table.admitting())
    await asyncio.sleep(0.02)
    assert not queued.done()
    running.release()
    await asyncio.gather(push, queued)
    assert served.workers.weights == ["sum1", "sum1"]
    assert not served.engine.paused
    assert served.proxy.admit(PolicyRequest()).version.step == 1


async def test_a_deadline_leaves_everything_as_it_was(served) -> None:
    await _push(served, 0)
    running = served.proxy.admit(PolicyRequest())
    with pytest.raises(LockstepError) as refusal:
        await _push(served, 1, deadline=0.05)
    assert refusal.value.code is ErrorCode.NO_FREE_SLOT
    await asyncio.wait_for(served.table.admitting(), 1)
    assert served.workers.weights == ["sum0", "sum0"]
    assert not served.engine.paused
    assert running.version.step == 0
    assert served.table.get("r").active.version.step == 0


async def test_kept_requests_are_moved_even_before_they_are_submitted(served) -> None:
    await _push(served, 0)
    admission = served.proxy.admit(PolicyRequest())
    waiting = asyncio.ensure_future(served.table.get("r").wait_for_step(1, wait_s=5))
    await asyncio.sleep(0.01)
    await _push(served, 1, kv="fresh")
    await asyncio.wait_for(waiting, 1)
    assert admission.version.step == 1
    assert not admission.moved


async def test_what_one_worker_cannot_apply_is_undone_on_all(served) -> None:
    await _push(served, 0)
    served.workers.broken = {"sum1"}
    with pytest.raises(LockstepError, match="broken"):
        await _push(served, 1)
    assert served.workers.weights == ["sum0", "sum0"]
    assert not served.engine.paused
    assert not served.proxy.errored
    assert served.table.get("r").active.version.step == 0
    served.workers.broken = {"sum0", "sum2"}
    with pytest.raises(LockstepError, match="broken"):
        await _push(served, 2)
    assert served.proxy.errored
    assert not served.engine.paused
