"""`/v1/runs/{run_id}`: the state of a run, and pushes of its adapter."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response

from rollout_server.api import metrics
from rollout_server.api.routes import ServiceDep
from shared.errors import InvalidRequest
from shared.weights import RUN_ID_PATTERN, InFlight, PushReceipt, RunState

router = APIRouter()
RunId = Annotated[str, Path(pattern=RUN_ID_PATTERN)]
Lease = Annotated[str, Header(min_length=8, max_length=256, description="the secret of the learner that holds the run")]
InFlightHeader = Annotated[InFlight, Header(description="what becomes of running requests")]
Takeover = Annotated[bool, Header(description="take the run over from another learner")]


@router.get("/v1/runs/{run_id}")
async def get_run(run_id: RunId, service: ServiceDep) -> RunState:
    """The version being served, and the slots."""
    return service.runs.get(run_id).state()


@router.put("/v1/runs/{run_id}/adapter")
async def put_adapter(
    run_id: RunId,
    request: Request,
    service: ServiceDep,
    lockstep_lease: Lease,
    lockstep_takeover: Takeover = False,
    lockstep_in_flight: InFlightHeader = "drain",
) -> PushReceipt:
    """Install a new version of the run's adapter; the body is one safetensors blob with our manifest."""
    with metrics.counted_push() as count:
        receipt = await service.installer.push(
            run_id, lockstep_lease, lockstep_takeover, request.stream(), lockstep_in_flight
        )
        count(receipt)
    service.list_policies()
    return receipt


@router.delete("/v1/runs/{run_id}", status_code=204)
async def delete_run(run_id: RunId, service: ServiceDep, lockstep_lease: Lease) -> Response:
    """End a run: its running requests finish, its slots become free (and a base it was merged into is restored)."""
    run = service.runs.get(run_id)
    service.runs.check_open(run_id, lockstep_lease, takeover=False)
    if run.push_lock.locked():
        raise InvalidRequest(f"run {run_id} is receiving a push; stop its learner first")
    await service.installer.end(run_id)
    service.list_policies()
    return Response(status_code=204)
