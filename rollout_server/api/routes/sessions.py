"""`/v1/sessions`: conversations of agents. Their calls go to vLLM's routes; see `AuthMiddleware`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from rollout_server.api.bodies import BoundedRoute
from rollout_server.api.routes import POLICY_IN_BODY, ServiceDep
from rollout_server.engine.proxy import POLICY_MODEL
from rollout_server.engine.turns import in_turn
from rollout_server.sessions.records import RecordedSession
from shared import wire
from shared.errors import Timeout
from shared.sessions import SessionOpened, SessionRecord, SessionRequest, SessionReward

router = APIRouter(route_class=BoundedRoute)
SessionId = Annotated[str, Path(max_length=128)]


@router.post(wire.SESSIONS, dependencies=[POLICY_IN_BODY])
async def open_session(body: SessionRequest, request: Request, service: ServiceDep) -> SessionOpened:
    """Open a session: calls below its `path`, or with its token, are recorded as the engine saw them."""
    opened = await service.sessions.open(body, service.proxy)
    if await request.is_disconnected():  # nobody knows it
        service.sessions.delete(opened.session_id)
        raise Timeout("the client went away")
    return opened


@router.get(wire.SESSION, response_model=SessionRecord)
async def get_session(session_id: SessionId, service: ServiceDep) -> Response:
    """What a session has recorded so far, as trajectories."""
    return await _record(service.sessions.get(session_id))


@router.delete(wire.SESSION, response_model=SessionRecord)
async def delete_session(session_id: SessionId, service: ServiceDep) -> Response:
    """End a session and its calls under way; answers its record, and once more to whoever asks again soon."""
    return await _record(service.sessions.delete(session_id))


@router.post(wire.SESSION_REWARD, status_code=204)
async def set_session_reward(session_id: SessionId, body: SessionReward, service: ServiceDep) -> Response:
    """Set the reward of a session; without a token of a role, where it was opened with `accept_reward`."""
    service.sessions.get(session_id).set_reward(body.reward)
    return Response(status_code=204)


@router.get(f"{wire.SESSION}/v1/models")
async def list_session_models(session_id: SessionId, service: ServiceDep) -> dict[str, Any]:
    """The one model of a session, in the forms of OpenAI and Anthropic; calls may name any other."""
    service.sessions.get(session_id).check_open()
    model = {
        "id": POLICY_MODEL,
        "object": "model",
        "created": 0,
        "owned_by": "lockstep",
        "type": "model",
        "display_name": POLICY_MODEL,
        "created_at": "1970-01-01T00:00:00Z",
    }
    return {"object": "list", "data": [model], "has_more": False, "first_id": POLICY_MODEL, "last_id": POLICY_MODEL}


async def _record(session: RecordedSession) -> Response:
    """Return a session's record, which may be large, made beside the event loop."""
    made = session.snapshot()
    content = await in_turn(lambda: made().model_dump_json().encode())
    return Response(content, media_type="application/json")
