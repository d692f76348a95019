"""Salt, slot and version for every route, and the calls that are closed to them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from rollout_server.engine.capacity import BODY_BYTES, Capacity
from rollout_server.engine.proxy import CALL_CONTEXT, CallContext, EngineProxy
from rollout_server.runs.slots import SlotState
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from shared.errors import EngineDead, ErrorCode, InvalidRequest, LockstepError, Overloaded
from shared.rollouts import GenerateRequest, PolicyRequest
from shared.weights import WeightVersion
from tests.support.runs import open_run

HttpError: Any = type(versions.http_error(400, ""))


def _status(error: Any) -> int:
    return int(getattr(error, "http_status", None) or error.status_code)


class _Engine:
    """Records what reaches the engine."""

    errored = False

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    async def generate(self, prompt, params, request_id, *, lora_request=None, **kwargs):
        self.calls.append((prompt, lora_request))
        for index in range(3):
            yield SimpleNamespace(index=index, outputs=[])

    async def sleep(self, level: int) -> None: ...

    async def is_sleeping(self) -> bool:
        return False


@pytest.fixture
async def served():
    engine, table = _Engine(), RunTable(2, 2)
    proxy = EngineProxy(engine, table)
    run = open_run(table)
    slot = await run.reserve(time.monotonic() + 1)
    run.flip(slot, WeightVersion(run_id="r", step=0), table.next_install_seq(), "sum")
    return SimpleNamespace(engine=engine, table=table, proxy=proxy, run=run)


async def _flip(served, step: int) -> None:
    slot = await served.run.reserve(time.monotonic() + 1)
    served.run.flip(slot, WeightVersion(run_id="r", step=step), served.table.next_install_seq(), "sum")


def _openai(name: str) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name)


async def test_openai_requests_get_salt_and_slot(served) -> None:
    prompt = {"type": "token", "prompt_token_ids": [1], "cache_salt": "own"}
    _ = [o async for o in served.proxy.generate(prompt, None, "a", lora_request=_openai("policy"))]
    await _flip(served, 1)
    _ = [o async for o in served.proxy.generate(prompt, None, "b", lora_request=_openai("policy:r"))]
    _ = [o async for o in served.proxy.generate(prompt, None, "c")]
    (first, lora_a), (second, lora_b), (third, lora_c) = served.engine.calls
    assert first["cache_salt"] != second["cache_salt"]
    assert first["cache_salt"].endswith(":own")
    assert lora_a.lora_int_id != lora_b.lora_int_id
    assert lora_c is None
    assert third is prompt
    assert prompt["cache_salt"] == "own", "the caller's prompt must stay as it is"


async def test_an_admission_holds_its_slot_before_it_runs(served) -> None:
    admission = served.proxy.admit(PolicyRequest())
    await _flip(served, 1)
    assert [slot.state for slot in served.run.slots].count(SlotState.DRAINING) == 1
    with pytest.raises(LockstepError):
        await served.run.reserve(time.monotonic() + 0.05)
    admission.release()
    admission.release()
    assert all(slot.requests == 0 for slot in served.run.slots)


async def test_an_abandoned_stream_gives_its_slot_back(served) -> None:
    stream = served.proxy.generate({"prompt_token_ids": [1]}, None, "a", lora_request=_openai("policy"))
    assert (await anext(stream)).index == 0
    assert served.run.active.requests == 1
    await stream.aclose()
    assert served.run.active.requests == 0


async def test_openai_requests_count_their_sequences(served) -> None:
    served.proxy.capacity = Capacity(replace(ServerSettings(), max_sequences=5))
    stream = served.proxy.generate({"prompt_token_ids": [1]}, SimpleNamespace(n=4), "a")
    assert (await anext(stream)).index == 0
    for n, status in ((2, 429), (6, 413)):
        with pytest.raises(HttpError) as refusal:
            await anext(served.proxy.generate({"prompt_token_ids": [1]}, SimpleNamespace(n=n), "b"))
        assert _status(refusal.value) == status
    unknown = served.proxy.generate({"prompt_token_ids": [1]}, None, "c", lora_request=_openai("policy:nobody"))
    with pytest.raises(HttpError):
        await anext(unknown)
    assert served.proxy.capacity.sequences == 4
    await stream.aclose()
    assert served.proxy.capacity.sequences == 0


async def test_prompts_of_one_call_that_could_never_run_together(served) -> None:
    """To ask again would not help."""
    served.proxy.capacity = Capacity(replace(ServerSettings(), max_sequences=5))
    token = CALL_CONTEXT.set(CallContext())
    try:
        streams = [served.proxy.generate({"prompt_token_ids": [1]}, SimpleNamespace(n=3), name) for name in "ab"]
        assert (await anext(streams[0])).index == 0
        with pytest.raises(HttpError, match="--max-sequences 5") as refusal:
            await anext(streams[1])
        assert _status(refusal.value) == 413
        await streams[0].aclose()
        later = served.proxy.generate({"prompt_token_ids": [1]}, SimpleNamespace(n=5), "c")  # one after the other
        assert (await anext(later)).index == 0
        await later.aclose()
    finally:
        CALL_CONTEXT.reset(token)
    assert served.proxy.capacity.sequences == 0


async def test_a_dead_engine_is_an_error_that_both_sides_know(served) -> None:
    async def dead(*args: Any, **kwargs: Any):
        raise EngineDeadError
        yield

    served.engine.generate = dead
    with pytest.raises(LockstepError) as ours, served.proxy.admit(PolicyRequest()) as admission:
        await anext(admission.generate({"prompt_token_ids": [1]}, None, "a"))
    assert ours.value.code is ErrorCode.ENGINE_DEAD
    with pytest.raises(HttpError) as theirs:
        await anext(served.proxy.generate({"prompt_token_ids": [1]}, None, "b"))
    assert _status(theirs.value) == 503


@pytest.mark.parametrize(("errored", "raised"), [(False, InvalidRequest), (True, EngineGenerateError)])
async def test_an_engine_that_is_dead_has_refused_nothing(served, errored: bool, raised: type[Exception]) -> None:
    """Its last error may be of the kind with which it refuses requests, and all that run get it."""

    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise EngineGenerateError from ValueError("of the output handler")
        yield

    served.engine.generate, served.engine.errored = fail, errored
    with pytest.raises(raised), served.proxy.admit(PolicyRequest()) as admission:
        await anext(admission.generate({"prompt_token_ids": [1]}, None, "a"))


async def test_the_reason_of_a_death_is_the_servers_and_the_engines(served, monkeypatch) -> None:
    """A worker's link breaks because the engine has died, or the other way round."""
    served.engine.dead_error = EngineDeadError()
    monkeypatch.setattr("rollout_server.vllm_compat.versions.fail_requests", lambda engine: None)
    served.proxy.give_up(EngineDead("a worker of the engine has ended"))
    assert str(served.proxy.dead_error) == str(EngineDead("a worker of the engine has ended"))
    served.engine.errored = True
    assert "a worker of the engine has ended" in str(served.proxy.dead_error)
    assert "EngineCore encountered an issue" in str(served.proxy.dead_error)


async def test_version_as_precondition(served) -> None:
    served.proxy.admit(PolicyRequest(policy=WeightVersion(run_id="r", step=0))).release()
    with pytest.raises(LockstepError) as refusal:
        served.proxy.admit(PolicyRequest(policy=WeightVersion(run_id="r", step=1)))
    assert refusal.value.code is ErrorCode.VERSION_NOT_ACTIVE
    assert refusal.value.status == 409


@pytest.mark.parametrize("name", ["add_lora", "sleep", "update_weights", "pause_generation", "collective_rpc"])
async def test_calls_that_would_change_weights_are_closed(served, name: str) -> None:
    with pytest.raises(LockstepError, match="closed"):
        getattr(served.proxy, name)


@pytest.mark.parametrize("stopped", ["pause_generation", "resume_generation"])
async def test_a_pause_ends_although_an_engine_does_not_answer(served, monkeypatch, stopped: str) -> None:
    """One of several data-parallel engines may have been stopped by a signal; the others go on without it."""
    asked: list[str] = []

    async def answer(name: str, **kwargs: Any) -> None:
        asked.append(name)
        if name == stopped:
            await asyncio.Event().wait()

    for name in ("pause_generation", "resume_generation"):
        setattr(served.engine, name, functools.partial(answer, name))
    served.engine.output_processor = SimpleNamespace(request_states={})
    monkeypatch.setattr("rollout_server.engine.proxy._RESUME_SECONDS", 0.05)
    inside = False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2), served.proxy.paused(clear_cache=True):
            inside = True
    assert inside == (stopped == "resume_generation")
    assert asked == ["pause_generation", "resume_generation"]


async def test_integers_that_vllm_cannot_send_are_refused_before_it_keeps_the_request(served) -> None:
    with pytest.raises(LockstepError, match="64 bits"), served.proxy.admit(PolicyRequest(policy="base")) as admission:
        _ = [o async for o in admission.generate({}, {"top_k": 2**70}, "a")]
    assert served.engine.calls == []


async def test_text_that_vllm_cannot_send_is_refused_before_it_keeps_the_request(served) -> None:
    with (
        pytest.raises(LockstepError, match="half a character"),
        served.proxy.admit(PolicyRequest(policy="base")) as admission,
    ):
        _ = [o async for o in admission.generate({}, {}, "\ud83d")]
    assert served.engine.calls == []


async def test_no_completion_loses_its_seed(served) -> None:
    with served.proxy.admit(PolicyRequest(policy="base")) as admission:
        for seed, n in ((-2, 1), (-5, 4), (0, 2)):
            assert [o async for o in admission.generate({}, SamplingParams(seed=seed, n=n), "a")]
        with pytest.raises(LockstepError, match=r"seed=-2 with n=2: .*-1 is no seed"):
            _ = [o async for o in admission.generate({}, SamplingParams(seed=-2, n=2), "a")]


@pytest.mark.parametrize("sampled", [[5], [5, 6], [0, 5]])
async def test_tokens_that_were_not_allowed_are_no_completion(served, sampled: list[int]) -> None:
    async def sample(*args, **kwargs):
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="stop", token_ids=sampled)])

    served.engine.generate = sample
    params = SamplingParams(allowed_token_ids=[5, 6])
    with served.proxy.admit(PolicyRequest(policy="base")) as admission:
        if set(sampled) <= {5, 6}:
            assert [o async for o in admission.generate({}, params, "a")]
            return
        with pytest.raises(LockstepError, match="none of allowed_token_ids") as refusal:
            _ = [o async for o in admission.generate({}, params, "a")]
    assert refusal.value.code is ErrorCode.INVALID_REQUEST


async def test_a_completion_that_the_engine_gave_up_is_a_bad_request(served) -> None:
    async def give_up(*args, **kwargs):
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error")])

    served.engine.generate = give_up
    with pytest.raises(HttpError) as refusal:
        _ = [o async for o in served.proxy.generate({"prompt_token_ids": [1]}, None, "a", lora_request=None)]
    assert _status(refusal.value) == 400


async def test_whoever_waits_for_a_step_holds_no_room(served) -> None:
    """Eight prompts of 4096 completions that wait for an hour, as many requests as there may be, and large bodies."""
    settings = replace(ServerSettings(), max_requests=2, max_bodies_mib=4)
    capacity = served.proxy.capacity = Capacity(settings)
    body = GenerateRequest.model_validate(
        {"prompts": [{"token_ids": [1]}] * 8, "sampling": {"n": 4096}, "min_step": 1, "wait_s": 3600}
    )
    requests = contextlib.ExitStack()
    waiting = []
    for _ in range(2):
        requests.enter_context(capacity.request())
        capacity.hold(2**19)
        context = contextvars.copy_context()
        context.run(BODY_BYTES.set, 2**19)
        waiting.append(asyncio.create_task(served.proxy.reached(body), context=context))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert capacity.sequences == capacity.requests == 0
    capacity.hold(4 * 2**20)  # all that others may hold
    capacity.hold(-4 * 2**20)
    with capacity.request(), pytest.raises(LockstepError, match="wait for a step already"):
        await served.proxy.reached(body)
    await _flip(served, 1)
    await asyncio.gather(*waiting)
    assert (capacity.requests, capacity.waiting) == (2, 0)
    requests.close()
    late = asyncio.create_task(served.proxy.reached(body.model_copy(update={"min_step": 9})))
    await asyncio.sleep(0.01)
    capacity.drain()
    with pytest.raises(LockstepError, match="about to leave"):
        await late
    assert (capacity.requests, capacity.waiting) == (0, 0)


@pytest.mark.parametrize("others", ["requests", "bodies"])
async def test_whoever_waited_counts_when_it_goes_on(served, others: str) -> None:
    """Others have come meanwhile, with their bodies: there may be no room for all who waited."""
    capacity = served.proxy.capacity = Capacity(replace(ServerSettings(), max_requests=3, max_bodies_mib=4))
    body = GenerateRequest.model_validate({"prompts": [{"token_ids": [1]}], "min_step": 1, "wait_s": 3600})

    async def ask(size: int) -> None:
        with capacity.request():
            capacity.hold(size)
            BODY_BYTES.set(size)
            try:
                await served.proxy.reached(body)
                await asyncio.Event().wait()
            finally:
                capacity.hold(-size)

    waiting = [asyncio.ensure_future(ask(2**18)) for _ in range(3)]
    await asyncio.sleep(0)
    taken = contextlib.ExitStack()
    if others == "requests":
        taken.enter_context(capacity.request())
    else:
        capacity.hold(2**22 - 2 * 2**18)
    await _flip(served, 1)
    ended, going_on = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert len(going_on) == 2
    with pytest.raises(LockstepError, match="leave no room") as refusal:
        ended.pop().result()
    assert refusal.value.code is ErrorCode.OVERLOADED
    assert capacity.requests == 2 + (others == "requests")
    taken.close()
    for task in going_on:
        task.cancel()
    await asyncio.wait(going_on)


@pytest.mark.parametrize("form", [{"json": {"maxItems": 10**6}}, {"structural_tag": '{"pattern": "a{100000}"}'}])
async def test_formats_that_vllms_routes_have_made_are_bounded_too(served, form: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    with pytest.raises(HttpError, match="too large to be compiled") as refusal:
        await anext(served.proxy.generate({"prompt_token_ids": [1]}, params, "x"))
    assert _status(refusal.value) == 400
    assert not served.engine.calls


async def test_a_probe_is_an_output(served) -> None:
    served.proxy.probe()
    served.proxy.probe()
    await asyncio.sleep(0.01)
    assert len(served.engine.calls) == 1
    assert served.proxy.outputs == 3


async def test_a_probe_that_changes_no_batch(served) -> None:
    """Of --deterministic: what a request gets depends on what is computed beside it."""
    served.proxy.probe(sampling=False)
    await asyncio.sleep(0.01)
    assert not served.engine.calls
    assert served.proxy.outputs == 1


@pytest.mark.parametrize("error", versions.overload_errors())
async def test_vllms_limits_are_ours_wherever_they_are_found(served, error: Any) -> None:
    """Its routes look at them before they prepare a request, its engine once more afterwards."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    async def refuse_later(*args: Any, **kwargs: Any) -> Any:
        raise error
        yield

    served.engine.check_admission, served.engine.generate = refuse, refuse_later
    for ask in (
        lambda: served.proxy.check_admission(3),
        lambda: anext(served.proxy.generate({"prompt_token_ids": [1]}, None, "a")),
    ):
        call = CallContext()
        token = CALL_CONTEXT.set(call)
        with pytest.raises(HttpError) as refusal:
            await ask()  # type: ignore[misc]
        CALL_CONTEXT.reset(token)
        assert _status(refusal.value) == 429
        assert isinstance(call.refusal, Overloaded)
        assert "--max-num-queued-reqs" in call.refusal.message
    assert served.proxy.capacity.sequences == 0


async def test_more_sequences_than_there_may_ever_be_are_too_many_at_once(served) -> None:
    """vLLM's own limit would say: ask again."""
    with pytest.raises(HttpError, match="--max-sequences") as refusal:
        served.proxy.check_admission(served.proxy.capacity._settings.max_sequences + 1)
    assert _status(refusal.value) == 413
