"""The FastAPI app: our routes, and vLLM's own app with its OpenAI routes under them."""

from __future__ import annotations

import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import Scope

from rollout_server.api.middleware.version_headers import VersionHeaderMiddleware
from rollout_server.api.responses import error_response, unforeseen
from rollout_server.api.routes import generate, runs, sessions, state
from rollout_server.api.security.roles import VLLM_PATHS, is_vllm_path, no_route
from rollout_server.service import Service
from shared.errors import (
    ErrorBody,
    InternalError,
    InvalidRequest,
    LockstepError,
    MethodNotAllowed,
    UnknownRoute,
    sendable,
)


def build_app(service: Service, openai_app: FastAPI) -> FastAPI:
    """Return our app with vLLM's mounted below it: a path of ours never reaches vLLM's handlers or middleware, nor the
    other way round.
    """
    app = FastAPI(
        title="Lockstep rollout server",
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        redirect_slashes=False,
    )
    app.state.lockstep = service
    for module in (generate, runs, sessions, state):
        app.include_router(module.router)
    app.add_exception_handler(LockstepError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unforeseen)
    openai_app.add_exception_handler(LockstepError, _answer_error)  # what `EngineProxy` refuses to vLLM's routes, too
    openai_app.add_exception_handler(HTTPException, _answer_http)  # of its router; vLLM handles FastAPI's own class
    for kind in (AttributeError, LookupError, RecursionError):
        openai_app.add_exception_handler(kind, _answer_unreadable)
    theirs = openai_app.router.routes
    theirs[:] = [route for route in theirs if getattr(route, "path", None) in VLLM_PATHS]
    app.router.routes.append(_VllmMount("/", VersionHeaderMiddleware(openai_app)))
    return app


class _VllmMount(Mount):
    """vLLM's app at its own paths. Others are ours, whatever their method, preflights of browsers included."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches(scope) if is_vllm_path(scope["path"]) else (Match.NONE, {})


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LockstepError)
    return error_response(error)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """Answer with our body where Starlette or FastAPI has refused a request."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        refusal: LockstepError = UnknownRoute(no_route(request.method, request.url.path))
    elif error.status_code == 405:
        allowed = ", ".join(_methods(request))
        return error_response(MethodNotAllowed(f"there is no {where}, but {allowed}"), {"Allow": allowed})
    else:
        refusal = (InvalidRequest if error.status_code < 500 else InternalError)(f"{where}: {error.detail}")
    return error_response(refusal, dict(error.headers or {}))


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes of a path. Starlette knows those of the first one."""
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return sorted({method for route in matching for method in getattr(route, "methods", None) or ()})


async def _answer_unforeseen(request: Request, error: Exception) -> JSONResponse:
    """Answer with our body to what nobody has caught; uvicorn logs its traceback."""
    return error_response(unforeseen(error))


async def _answer_unreadable(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 where vLLM's request models stumble over JSON of a type that they did not expect."""
    if not any(frame.f_code.co_name == "solve_dependencies" for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    message = f"a field of the request has a type that it cannot have: {type(error).__name__}: {error}"
    return error_response(InvalidRequest(message))


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems: list[dict[str, Any]] = [_problem(problem) for problem in error.errors()]
    text = "; ".join(f"{p['field'] or 'body'}: {p['problem']}" for p in problems[:5])
    return error_response(InvalidRequest(text, problems=problems[:20]))


def _problem(error: dict[str, Any]) -> dict[str, Any]:
    if error["type"] == "json_invalid":  # FastAPI's, whose place is a character's and no field's
        return {"field": "", "problem": f"no JSON: {sendable(error['ctx']['error'])} at character {error['loc'][-1]}"}
    return {"field": sendable(".".join(map(str, error["loc"][1:]))), "problem": sendable(error["msg"])}
