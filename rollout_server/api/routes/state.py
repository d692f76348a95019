"""The state of the server, and orders to drain, sleep and wake."""

from __future__ import annotations

from fastapi import APIRouter

from rollout_server.api.routes import ServiceDep
from shared import wire
from shared.weights import ServerState

router = APIRouter()


@router.get(wire.STATE)
async def get_state(service: ServiceDep) -> ServerState:
    """Everything a learner must know before it trusts this server with a run."""
    return service.state()


@router.post(wire.DRAIN, status_code=202)
async def drain(service: ServiceDep) -> ServerState:
    """Take nothing new from now on, finish what is under way, and stop: the same as SIGTERM."""
    service.proxy.capacity.drain()
    return service.state()


@router.post(wire.SLEEP)
async def sleep(service: ServiceDep) -> ServerState:
    """Give the GPU's memory back (--share-gpu): requests wait until `/v1/wake`, or the next push."""
    await service.installer.sleep.fall_asleep()
    return service.state()


@router.post(wire.WAKE)
async def wake(service: ServiceDep) -> ServerState:
    """Take the GPU's memory again, and go on with the requests that wait."""
    await service.installer.sleep.wake()
    return service.state()
