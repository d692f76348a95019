"""`GET /v1/state`: what this server is and serves."""

from __future__ import annotations

from fastapi import APIRouter

from rollout_server.routes import ServiceDep
from shared.weights import ServerState

router = APIRouter()


@router.get("/v1/state")
async def get_state(service: ServiceDep) -> ServerState:
    """Everything a learner must know before it trusts this server with a run."""
    return service.state()
