"""`GET /v1/state`: what this server is and serves. `POST /v1/drain`: it is to leave."""

from __future__ import annotations

from fastapi import APIRouter

from rollout_server.routes import ServiceDep
from shared.weights import ServerState

router = APIRouter()


@router.get("/v1/state")
async def get_state(service: ServiceDep) -> ServerState:
    """Everything a learner must know before it trusts this server with a run."""
    return service.state()


@router.post("/v1/drain", status_code=202)
async def drain(service: ServiceDep) -> ServerState:
    """Take nothing new from now on, finish what is under way, and stop: the same as SIGTERM."""
    service.door.capacity.drain()
    return service.state()
