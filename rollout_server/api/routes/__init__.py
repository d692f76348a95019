"""One file per resource: HTTP in, HTTP out, and counting for `/metrics`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from rollout_server.service import Service


async def _service(request: Request) -> Service:
    return request.app.state.lockstep  # a coroutine, or FastAPI would ask a thread for it at every request


ServiceDep = Annotated[Service, Depends(_service)]
