"""Pushes by broadcast: meeting in a collective group, and announcing what comes over it.

Both answer NDJSON, because both sides act in between: the first line says that the learner may go on, the last one what
came of it. What is refused before the first line is an ordinary error response.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from rollout_server.api import metrics
from rollout_server.api.routes import ServiceDep
from rollout_server.api.routes.runs import InFlightHeader, Lease, RunId
from rollout_server.api.streaming import Ndjson
from rollout_server.service import Service
from shared.collective import Announcement
from shared.errors import LockstepError
from shared.weights import PushReceipt

router = APIRouter()


@router.post("/v1/runs/{run_id}/group", response_class=StreamingResponse)
async def join_group(run_id: RunId, service: ServiceDep, lockstep_lease: Lease) -> StreamingResponse:
    """Meet the workers in a collective group: first a `GroupInvitation`, then `{"joined": true}`."""
    run = service.runs.get(run_id)
    service.runs.check_open(run_id, lockstep_lease, takeover=False)
    return await _lines(service.installer.groups.join(run), end=b'{"joined":true}')


@router.post("/v1/runs/{run_id}/broadcast", response_class=StreamingResponse)
async def broadcast(
    run_id: RunId,
    announced: Announcement,
    service: ServiceDep,
    lockstep_lease: Lease,
    lockstep_in_flight: InFlightHeader = "drain",
) -> StreamingResponse:
    """Install an adapter that comes by broadcast: first `{"receiving": true}`, then the `PushReceipt`."""
    events = service.installer.broadcast(run_id, lockstep_lease, announced, lockstep_in_flight)
    return await _lines(_counted(service, events), b'{"receiving":true}')


async def _counted(
    service: Service, events: AsyncGenerator[PushReceipt | None, None]
) -> AsyncGenerator[PushReceipt | None, None]:
    with metrics.counted_push() as count:
        async with aclosing(events):
            async for receipt in events:
                if receipt is not None:
                    count(receipt)
                    service.list_policies()
                yield receipt


async def _lines(events: AsyncGenerator[BaseModel | None, None], end: bytes) -> StreamingResponse:
    """Events as lines; `end` stands for None. What fails before the first line is raised here."""

    def line(event: BaseModel | None) -> bytes:
        return (end if event is None else event.model_dump_json().encode()) + b"\n"

    first = await anext(events)

    async def body() -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            try:
                yield line(first)
                async for event in events:
                    yield line(event)
            except LockstepError as error:
                yield error.body().model_dump_json().encode() + b"\n"

    return Ndjson(body(), events.aclose)
