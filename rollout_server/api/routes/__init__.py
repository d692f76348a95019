"""One file per resource: HTTP in, HTTP out, and counting for `/metrics`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from rollout_server.service import Service
from shared.errors import InvalidRequest
from shared.wire import POLICY_HEADER


async def _service(request: Request) -> Service:
    return request.app.state.lockstep  # a coroutine, or FastAPI would ask a thread for it at every request


ServiceDep = Annotated[Service, Depends(_service)]


async def _refuse_policy_header(request: Request) -> None:
    if POLICY_HEADER in request.headers:
        raise InvalidRequest(f'{POLICY_HEADER} is for vLLM\'s routes: send the version in the body, as "policy"')


#: Of routes whose body says which version it wants.
POLICY_IN_BODY = Depends(_refuse_policy_header)
