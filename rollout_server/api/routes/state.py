"""`GET /v1/state`: what this server is and serves. `POST /v1/drain`: it is to leave; `/v1/sleep`, `/v1/wake`: it is the
learner's turn on a GPU that they share, or its own.
"""

from __future__ import annotations

from fastapi import APIRouter

from rollout_server.api.routes import ServiceDep
from shared.weights import ServerState

router = APIRouter()


@router.get("/v1/state")
async def get_state(service: ServiceDep) -> ServerState:
    """Everything a learner must know before it trusts this server with a run."""
    return service.state()


@router.post("/v1/drain", status_code=202)
async def drain(service: ServiceDep) -> ServerState:
    """Take nothing new from now on, finish what is under way, and stop: the same as SIGTERM."""
    service.proxy.capacity.drain()
    return service.state()


@router.post("/v1/sleep")
async def sleep(service: ServiceDep) -> ServerState:
    """Give the GPU's memory back (--share-gpu): requests wait until `/v1/wake`, or the next push."""
    await service.installer.sleep.fall_asleep()
    return service.state()


@router.post("/v1/wake")
async def wake(service: ServiceDep) -> ServerState:
    """Take the GPU's memory again, and go on with the requests that wait."""
    await service.installer.sleep.wake()
    return service.state()
