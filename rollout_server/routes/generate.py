"""`POST /v1/generate`: completions of prompts, with logprobs and the version that every token came from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from rollout_server.cancellation import until_disconnect
from rollout_server.generation import start
from rollout_server.routes import ServiceDep
from rollout_server.service import Service
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import GenerateRequest, GenerateResponse, RolloutGroup

router = APIRouter()


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep) -> Any:
    """`sampling.n` completions for each prompt; one JSON answer, or NDJSON groups as they finish."""
    tasks = await start(service, body)
    if body.stream:
        return StreamingResponse(_ndjson(service, tasks), media_type="application/x-ndjson")
    groups = await until_disconnect(request, asyncio.gather(*tasks))
    return GenerateResponse(epoch=service.epoch, groups=groups)


async def _ndjson(service: Service, tasks: list[asyncio.Future[RolloutGroup]]) -> AsyncIterator[bytes]:
    """One line per group; then `{"done": true}`, or `{"error": ...}` if something failed."""
    try:
        for finished in asyncio.as_completed(tasks):
            yield (await finished).model_dump_json().encode() + b"\n"
        yield b'{"done":true,"epoch":"%s"}\n' % service.epoch.encode()
    except LockstepError as error:
        yield error.body().model_dump_json().encode() + b"\n"
    except Exception as error:
        failure = LockstepError(ErrorCode.ENGINE_DEAD, f"generation failed: {type(error).__name__}: {error}")
        yield failure.body().model_dump_json().encode() + b"\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
