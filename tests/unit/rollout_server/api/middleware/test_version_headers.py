"""Versions in headers around routes that know nothing of them, over the real `EngineProxy`."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from rollout_server.api.middleware.version_headers import VersionHeaderMiddleware
from rollout_server.engine.capacity import Capacity
from rollout_server.engine.proxy import CALL_CONTEXT, EngineProxy
from rollout_server.runs.table import RunTable
from rollout_server.settings import ServerSettings
from rollout_server.vllm_compat import versions
from shared.errors import InternalError, SessionEnded
from shared.weights import WeightVersion
from tests.support.runs import open_run


class _Engine:
    errored = False

    async def generate(self, prompt, params, request_id, **kwargs):
        for index in range(2):
            yield SimpleNamespace(index=index, outputs=[])


@pytest.fixture
async def served():
    """A proxy with one run at step 3, and an app with routes as vLLM writes them."""
    table = RunTable(2, 2)
    proxy = EngineProxy(_Engine(), table, Capacity(ServerSettings()))
    run = open_run(table)
    await _flip(table, 3)
    app = FastAPI()

    def outputs(model: str) -> Any:
        lora = None if model == "base" else SimpleNamespace(lora_name=model)
        return proxy.generate({"prompt_token_ids": [1]}, None, "a", lora_request=lora)

    @app.post("/whole/{model}")
    async def whole(model: str) -> dict[str, int]:
        return {"outputs": len([output async for output in outputs(model)])}

    @app.post("/stream/{model}")
    async def stream(model: str, request: Request) -> StreamingResponse:
        async def chunks():
            try:
                async for output in outputs(model):
                    yield f"{output.index};"
            except Exception as error:  # as vLLM's generators do
                yield f"error {error};"

        return StreamingResponse(chunks())

    def streamed(begin: str, form: str, media_type: str | None = None) -> Any:
        async def route(model: str) -> StreamingResponse:
            async def chunks():
                yield begin
                async for output in outputs(model):
                    yield form.format(output.index)

            return StreamingResponse(chunks(), media_type=media_type)

        return route

    app.post("/early/{model}")(streamed("created;", "{};"))
    app.post("/events/{model}")(streamed("data: created\n\n", "data: {}\n\n", "text/event-stream"))

    @app.get("/models")
    async def models() -> list[str]:
        return ["policy"]

    @app.post("/missing/{model}")
    async def missing(model: str) -> JSONResponse:
        proxy.note_missing(model)
        return JSONResponse("Valid aliases: base.", 404)

    client = httpx.AsyncClient(transport=httpx.ASGITransport(VersionHeaderMiddleware(app)), base_url="http://server")
    return SimpleNamespace(table=table, run=run, client=client)


async def _flip(table: RunTable, step: int) -> None:
    run = table.get("r")
    slot = await run.reserve(time.monotonic() + 1)
    run.flip(slot, WeightVersion(run_id="r", step=step), table.next_install_seq(), "sum")


@pytest.mark.parametrize("kind", ["whole", "stream", "early"])
async def test_the_version_is_in_the_header(served, kind: str) -> None:
    for model, version in (("policy", "r@0.3"), ("policy:r", "r@0.3"), ("base", "base")):
        answer = await served.client.post(f"/{kind}/{model}")
        assert answer.status_code == 200
        assert answer.headers["lockstep-version"] == version
    await _flip(served.table, 4)
    assert (await served.client.post(f"/{kind}/policy")).headers["lockstep-version"] == "r@0.4"
    assert CALL_CONTEXT.get() is None
    assert "lockstep-version" not in (await served.client.get("/models")).headers


@pytest.mark.parametrize("kind", ["whole", "stream", "early"])
async def test_a_version_as_a_precondition(served, kind: str) -> None:
    ask = {"policy": "r@0.3"}
    assert (await served.client.post(f"/{kind}/policy", headers={"Lockstep-Policy": ask["policy"]})).status_code == 200
    for model, wanted in (("policy", "r@0.2"), ("policy", "r@1.3"), ("policy", "other@0.3"), ("base", "r@0.3")):
        answer = await served.client.post(f"/{kind}/{model}", headers={"Lockstep-Policy": wanted})
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"]["code"] == "version_not_active", answer.text
    for wanted in ("r", "r@3", "r@0.-1", "../r@0.3", "r@0.3\u00b2", "", "r@0." + "9" * 40):
        headers = {"Lockstep-Policy": wanted.encode()}
        answer = await served.client.post(f"/{kind}/policy", headers=headers)
        assert answer.status_code == 400, wanted
        assert answer.json()["error"]["code"] == "invalid_request", wanted
    assert served.run.active.requests == 0


async def test_events_before_the_first_output_are_not_lost(served) -> None:
    assert (await served.client.post("/early/policy")).text == "created;0;1;"


@pytest.mark.parametrize("kind", ["stream", "early"])
@pytest.mark.parametrize("error", [versions.own_refusals()[0], ValueError])  # the latter in earlier versions
async def test_what_vllm_refuses_is_an_error_in_streams_too(served, kind: str, error: Any, monkeypatch) -> None:
    async def refuse(*args, **kwargs):
        raise error("no such token")
        yield

    monkeypatch.setattr(_Engine, "generate", refuse)
    answer = await served.client.post(f"/{kind}/policy")
    assert answer.status_code == 400
    assert "no such token" in answer.json()["error"]["message"]
    assert served.run.active.requests == 0


def _wrapped(error: Exception) -> Exception:
    """As AsyncLLM raises what is no class of vLLM's own."""
    from vllm.v1.engine.exceptions import EngineGenerateError

    wrapped = EngineGenerateError()
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize("kind", ["stream", "early"])
async def test_errors_before_the_first_token_have_their_status_in_streams(served, kind: str, monkeypatch) -> None:
    busy = [error() for error in versions.overload_errors()]
    cases = [(error, 429, "overloaded", "--max-num-queued") for error in busy]
    cases.append((_wrapped(ValueError("no such form")), 400, "invalid_request", "no such form"))
    cases.append((_wrapped(KeyError("of vLLM")), 500, "internal_error", "KeyError: 'of vLLM'"))
    for error, status, code, text in cases:

        async def fail(*args, error=error, **kwargs):
            raise error
            yield

        monkeypatch.setattr(_Engine, "generate", fail)
        with pytest.raises(type(error)) if kind == "early" and status == 500 else nullcontext():
            answer = await served.client.post(f"/{kind}/policy")
            assert answer.status_code == status, error
            assert answer.json()["error"]["code"] == code
            assert text in answer.json()["error"]["message"]
        assert served.run.active.requests == 0


async def test_what_nobody_has_foreseen_is_answered_and_raised_for_the_log() -> None:
    sent: list[Any] = []

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        CALL_CONTEXT.get().rejection = InternalError("the engine failed")  # type: ignore[union-attr]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await _sent(fail, "POST", sent)
    assert [message.get("status") for message in sent] == [500, None]


async def test_a_stream_of_events_that_a_route_breaks_off_ends_with_an_error(served, monkeypatch) -> None:
    """As that of `/v1/responses` would, without a word."""

    async def end(*args, **kwargs):
        yield SimpleNamespace(index=0, outputs=[])
        yield SimpleNamespace(index=1, outputs=[])
        raise SessionEnded("its time is over")

    monkeypatch.setattr(_Engine, "generate", end)
    answer = await served.client.post("/events/policy")
    assert answer.status_code == 200
    events = answer.text.split("\n\n")
    assert events[:3] == ["data: created", "data: 0", "data: 1"]
    assert events[3].startswith("event: error\ndata: ")
    error = json.loads(events[3].partition("data: ")[2])
    assert error["type"] == "error"
    assert error["error"]["code"] == "session_ended"
    assert events[4:] == [""]
    assert served.run.active.requests == 0


@pytest.mark.parametrize("kind", ["whole", "stream", "early"])
async def test_refusals_keep_their_status_in_streams(served, kind: str) -> None:
    answer = await served.client.post(f"/{kind}/policy:nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_run"
    assert "lockstep-version" not in answer.headers


async def test_a_model_that_is_a_run_which_is_not_served(served) -> None:
    """vLLM's own refusal names the base alone."""
    answer = await served.client.post("/missing/policy:nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_run"
    assert "(r)" in answer.json()["error"]["message"]
    assert (await served.client.post("/missing/polizy")).json() == "Valid aliases: base."


def test_versions_are_read_as_they_are_written() -> None:
    version = WeightVersion(run_id="a.b-c_1", fence=3, step=120)
    assert WeightVersion.parse(str(version)) == version


def _scope(method: str) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": "/", "headers": []}


async def _sent(app: Any, method: str, sent: list[Any]) -> None:
    """Call an ASGI app through the middleware; append what it sends."""
    app.routes = []

    async def send(message: Any) -> None:
        sent.append(message)

    await VersionHeaderMiddleware(app)(_scope(method), None, send)  # type: ignore[arg-type]


async def test_the_stream_of_a_response_that_runs_already_is_not_held_back() -> None:
    sent: list[Any] = []

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            assert sent[-1]["body"] == part
        await send({"type": "http.response.body"})

    await _sent(stream, "GET", sent)
    assert len(sent) == 4


async def test_what_vllm_refuses_after_it_has_begun_an_answer() -> None:
    """As the stream of a response that it has not kept as one."""
    sent: list[Any] = []

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("response already started") from versions.own_refusals()[0]("Unknown response_id")

    await _sent(refuse, "GET", sent)
    assert [message.get("status") for message in sent] == [400, None]
    assert json.loads(sent[1]["body"])["error"]["message"] == "Unknown response_id"


async def test_an_answer_without_an_end_is_sent() -> None:
    sent: list[Any] = []

    async def cut(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})

    await _sent(cut, "POST", sent)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
