"""`/v1/runs/{run_id}`: the state of a run, and pushes of its adapter over HTTP or by broadcast.

Broadcasts are answered with NDJSON, because both sides act in between: the first line says that the learner may go on,
the last one how it ended. Errors before the first line are ordinary error responses.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from rollout_server.api import metrics
from rollout_server.api.bodies import BoundedRoute
from rollout_server.api.responses import Ndjson
from rollout_server.api.routes import ServiceDep
from shared import wire
from shared.collective import Announcement
from shared.errors import Timeout
from shared.weights import RUN_ID_PATTERN, InFlight, PushReceipt, RunState, TrainingEnd

router = APIRouter(route_class=BoundedRoute)
RunId = Annotated[str, Path(pattern=RUN_ID_PATTERN)]
Lease = Annotated[
    str,
    Header(
        alias=wire.LEASE_HEADER,
        min_length=8,
        max_length=256,
        description="the secret of the learner that holds the run",
    ),
]
InFlightHeader = Annotated[
    InFlight, Header(alias=wire.IN_FLIGHT_HEADER, description="what happens to running requests when the push lands")
]
Takeover = Annotated[bool, Header(alias=wire.TAKEOVER_HEADER, description="take the run over from another learner")]


@router.get(wire.RUN)
async def get_run(run_id: RunId, service: ServiceDep) -> RunState:
    """The version being served, and the slots."""
    return service.runs.get(run_id).state()


@router.put(wire.ADAPTER)
async def put_adapter(
    run_id: RunId,
    request: Request,
    service: ServiceDep,
    lease: Lease,
    takeover: Takeover = False,
    in_flight: InFlightHeader = "drain",
) -> PushReceipt:
    """Install a new version of the run's adapter; the body is one safetensors blob with our manifest."""
    with metrics.counted_push() as count:
        receipt = await service.push(run_id, lease, takeover, _body(request), in_flight)
        count(receipt)
    return receipt


async def _body(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes; raises `timeout` where its client goes away."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise Timeout("the client went away") from None


@router.delete(wire.RUN, status_code=204)
async def delete_run(run_id: RunId, service: ServiceDep, lease: Lease, takeover: Takeover = False) -> Response:
    """End a run: its running requests finish, its slots become free (and a base it was merged into is restored).

    Its own learner's lease ends it, or `Lockstep-Takeover`; a finished run that is not kept, any lease.
    """
    await service.end_run(run_id, lease, takeover)
    return Response(status_code=204)


@router.post(wire.FINISH)
async def finish_run(run_id: RunId, ended: TrainingEnd, service: ServiceDep, lease: Lease) -> RunState:
    """Say that a run's training has ended: it is served until another run needs its place, or pushed to again."""
    return service.finish_run(run_id, lease, ended)


@router.post(wire.GROUP, response_class=StreamingResponse)
async def join_group(run_id: RunId, service: ServiceDep, lease: Lease) -> StreamingResponse:
    """Meet the workers in a collective group: first a `GroupInvitation`, then `{"joined": true}`."""
    return await Ndjson.begin(_lines(service.join_group(run_id, lease), wire.JOINED))


@router.post(wire.BROADCAST, response_class=StreamingResponse)
async def broadcast(
    run_id: RunId, announced: Announcement, service: ServiceDep, lease: Lease, in_flight: InFlightHeader = "drain"
) -> StreamingResponse:
    """Install an adapter that comes by broadcast: first `{"receiving": true}`, then the `PushReceipt`."""
    events = service.broadcast(run_id, lease, announced, in_flight)
    return await Ndjson.begin(_lines(_counted(events), wire.RECEIVING))


async def _counted(events: AsyncGenerator[PushReceipt | None, None]) -> AsyncGenerator[PushReceipt | None, None]:
    with metrics.counted_push() as count:
        async with aclosing(events):
            async for receipt in events:
                if receipt is not None:
                    count(receipt)
                yield receipt


async def _lines(events: AsyncGenerator[BaseModel | None, None], marker: str) -> AsyncGenerator[bytes, None]:
    """Yield events as lines; `marker` stands for None."""
    async with aclosing(events):
        async for event in events:
            yield event.model_dump_json().encode() if event else wire.marker(marker)
