"""`POST /v1/score`: teacher-forced logprobs of given sequences."""

from __future__ import annotations

from fastapi import APIRouter, Request

from rollout_server.api.disconnect import until_disconnect
from rollout_server.api.routes import ServiceDep
from rollout_server.generation.scoring import _score
from shared.rollouts import ScoreRequest, ScoreResponse

router = APIRouter()


@router.post("/v1/score")
async def score(body: ScoreRequest, request: Request, service: ServiceDep) -> ScoreResponse:
    """Raw logprobs at temperature 1 under one version for all sequences."""
    return await until_disconnect(request, _score(body, service))
