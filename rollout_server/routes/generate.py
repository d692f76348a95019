"""`POST /v1/generate`: completions of prompts, with logprobs and the version that every token came from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from rollout_server.answers import Answer
from rollout_server.cancellation import until_disconnect
from rollout_server.generation import start
from rollout_server.routes import ServiceDep
from shared.errors import LockstepError
from shared.rollouts import GenerateRequest, GenerateResponse

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
    caller = request.scope.get("lockstep_principal", "")
    answer = service.answers.open(partial(start, service, body), body, caller, idempotency_key)
    answer.join()
    try:
        await until_disconnect(request, answer.started())
        if body.stream:
            return _Stream(answer, service.epoch)
        groups = await until_disconnect(request, answer.groups())
    except BaseException:
        answer.leave()
        raise
    answer.leave()
    whole = b'{"epoch":"%s","groups":[%s]}' % (service.epoch.encode(), b",".join(groups))
    return Response(whole, media_type="application/json")


class _Stream(StreamingResponse):
    """One line per group; then `{"done": true}`, or `{"error": ...}` if something failed.

    It leaves the answer also when it is never iterated, because the client went away first.
    """

    def __init__(self, answer: Answer, epoch: str) -> None:
        super().__init__(_ndjson(answer, epoch), media_type="application/x-ndjson")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


async def _ndjson(answer: Answer, epoch: str) -> AsyncIterator[bytes]:
    try:
        async for line in answer.lines():
            yield line + b"\n"
        yield b'{"done":true,"epoch":"%s"}\n' % epoch.encode()
    except LockstepError as error:
        yield error.body().model_dump_json().encode() + b"\n"
