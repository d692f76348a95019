"""The FastAPI app: our routes, and vLLM's own app with its OpenAI routes under them."""

from __future__ import annotations

import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from rollout_server.api.middleware.version_headers import VersionHeaderMiddleware
from rollout_server.api.responses import error_response
from rollout_server.api.routes import generate, runs, state
from rollout_server.api.security.roles import VLLM_PATHS
from rollout_server.service import Service
from shared.errors import ErrorBody, InvalidRequest, LockstepError, sendable


def build_app(service: Service, openai_app: FastAPI) -> FastAPI:
    """Return our app with vLLM's mounted below it: a path of ours never reaches vLLM's handlers, nor the other way
    round.
    """
    app = FastAPI(title="Lockstep rollout server", responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})
    app.state.lockstep = service
    for module in (generate, runs, state):
        app.include_router(module.router)
    app.add_exception_handler(LockstepError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    openai_app.add_exception_handler(LockstepError, _answer_error)  # what `EngineProxy` refuses to vLLM's routes, too
    for kind in (AttributeError, LookupError, RecursionError):
        openai_app.add_exception_handler(kind, _answer_unreadable)
    theirs = openai_app.router.routes
    theirs[:] = [route for route in theirs if getattr(route, "path", None) in VLLM_PATHS]
    app.mount("/", VersionHeaderMiddleware(openai_app))
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LockstepError)
    return error_response(error)


async def _answer_unreadable(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 where vLLM's request models stumble over JSON of a type that they did not expect."""
    if not any(frame.f_code.co_name == "solve_dependencies" for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    message = f"a field of the request has a type that it cannot have: {type(error).__name__}: {error}"
    return error_response(InvalidRequest(message))


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems: list[dict[str, Any]] = [
        {"field": sendable(".".join(map(str, problem["loc"][1:]))), "problem": sendable(problem["msg"])}
        for problem in error.errors()
    ]
    text = "; ".join(f"{p['field'] or 'body'}: {p['problem']}" for p in problems[:5])
    return error_response(InvalidRequest(text, problems=problems[:20]))
