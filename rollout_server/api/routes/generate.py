"""Completions of prompts, with logprobs and the version of every token; logprobs of given tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rollout_server.api.bodies import BoundedRoute
from rollout_server.api.responses import Ndjson
from rollout_server.api.routes import POLICY_IN_BODY, ServiceDep
from rollout_server.generation import requests, scoring
from shared import wire
from shared.errors import Timeout
from shared.rollouts import GenerateRequest, GenerateResponse, RolloutGroup, ScoreRequest, ScoreResponse

router = APIRouter(route_class=BoundedRoute, dependencies=[POLICY_IN_BODY])
Groups = AsyncGenerator[RolloutGroup | None, None]
T = TypeVar("T")


@router.post(
    wire.GENERATE,
    response_model=GenerateResponse,
    responses={200: {"content": {wire.NDJSON_TYPE: {"schema": {"type": "string"}}}}},
)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep) -> Any:
    """`sampling.n` completions for each prompt; one JSON answer, or NDJSON groups as they finish."""
    groups = requests.generate(body, service.proxy, service.exclusive)
    if body.stream:
        return await _until_disconnect(request, Ndjson.begin(_lines(groups, service.served.epoch)))
    content = b'{"epoch":"%s","groups":[%s]}'
    joined = b",".join(await _until_disconnect(request, _in_order(groups)))
    return Response(content % (service.served.epoch.encode(), joined), media_type="application/json")


async def _in_order(groups: Groups) -> list[bytes]:
    """Return all groups as JSON, each encoded when it finishes, in the order of the prompts."""
    async with aclosing(groups):
        encoded = {group.prompt_index: group.model_dump_json().encode() async for group in groups if group}
    return [encoded[index] for index in sorted(encoded)]


async def _lines(groups: Groups, epoch: str) -> AsyncGenerator[bytes, None]:
    """Yield an empty line for each None, then a line that says that all groups have been sent."""
    async with aclosing(groups):
        async for group in groups:
            yield group.model_dump_json().encode() if group else b""
    yield wire.marker(wire.DONE, epoch=epoch)


@router.post(wire.SCORE)
async def score(body: ScoreRequest, request: Request, service: ServiceDep) -> ScoreResponse:
    """Raw logprobs at temperature 1 under one version for all sequences."""
    scored = scoring.score(body, service.proxy, service.exclusive)
    version, logprobs, digests = await _until_disconnect(request, scored)
    return ScoreResponse(epoch=service.served.epoch, version=version, logprobs=logprobs, image_digests=digests)


async def _until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client disconnects: it must free the engine at once."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Timeout("the client went away")  # nobody reads it
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":  # the body has been read before
        pass
