"""One file per resource; no logic beyond HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from rollout_server.service import Service


def _service(request: Request) -> Service:
    return request.app.state.lockstep


ServiceDep = Annotated[Service, Depends(_service)]
