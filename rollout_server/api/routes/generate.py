"""`POST /v1/generate`: completions of prompts, with logprobs and the version that every token came from."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from rollout_server.api.disconnect import until_disconnect
from rollout_server.api.idempotency import Answer
from rollout_server.api.middleware.auth import PRINCIPAL
from rollout_server.api.routes import ServiceDep
from rollout_server.api.streaming import Ndjson
from rollout_server.generation.requests import start
from shared.errors import LockstepError
from shared.rollouts import HEARTBEAT_SECONDS, GenerateRequest, GenerateResponse

router = APIRouter()
Key = Annotated[
    str | None,
    Header(min_length=1, max_length=256, description="the same key and body again: the same answer, generated once"),
]


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep, idempotency_key: Key = None) -> Any:
    """`sampling.n` completions for each prompt; one JSON answer, or NDJSON groups as they finish."""
    caller = request.scope.get(PRINCIPAL, "")
    answer = service.answers.open(partial(start, service, body), body, caller, idempotency_key)
    answer.join()
    try:
        if body.stream:  # what has to wait for long says so by its blank lines
            with contextlib.suppress(TimeoutError):
                await until_disconnect(request, asyncio.wait_for(answer.started(), HEARTBEAT_SECONDS))
            return Ndjson(_lines(answer, service.epoch), answer.leave)
        groups = await until_disconnect(request, answer.groups())
    except BaseException:
        answer.leave()
        raise
    answer.leave()
    whole = b'{"epoch":"%s","groups":[%s]}' % (service.epoch.encode(), b",".join(groups))
    return Response(whole, media_type="application/json")


async def _lines(answer: Answer, epoch: str) -> AsyncIterator[bytes]:
    """One line per group, blank ones in between; then `{"done": true}`, or `{"error": ...}` if something failed."""
    try:
        async for line in answer.lines():
            yield line + b"\n"
        yield b'{"done":true,"epoch":"%s"}\n' % epoch.encode()
    except LockstepError as error:
        yield error.body().model_dump_json().encode() + b"\n"
