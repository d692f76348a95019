"""The outermost ASGI layer: without a token that has the role, no request gets further than this."""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.connections import ADMIT
from rollout_server.api.responses import error_response
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import OPEN, Role, role_needed
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import Forbidden, LockstepError, Unauthenticated

_BEARER = re.compile(rb"bearer +([^\s]+)", re.IGNORECASE)
_HOW = f"a learner takes it from --token_file or ${TOKEN_VARIABLE}, other clients send `Authorization: Bearer TOKEN`"


class AuthMiddleware:
    """Denies by default: every method, path, mount and websocket but `/health` and `/ready`.

    Args:
        tokens: None lets everything through.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is None:
            admit = scope.get("extensions", {}).get(ADMIT)
            if admit is not None and scope["path"] not in OPEN:
                admit()
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {"WWW-Authenticate": "Bearer"} if isinstance(refusal, Unauthenticated) else None
            await error_response(refusal, headers)(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: HTTP 403

    def _refusal(self, scope: Scope) -> LockstepError | None:
        if self._tokens is None or (scope["type"] == "http" and scope["path"] in OPEN):
            return None
        values = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        presented = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
        role = self._tokens.role_of(presented[1]) if presented else None
        if role is None:
            what = "this token is not known here" if presented else "a bearer token is needed"
            return Unauthenticated(f"{what}: {_HOW}")
        needed = role_needed(scope.get("method", "websocket"), scope["path"])
        if role not in (needed, Role.WEIGHTS):
            return Forbidden(f"this token has the role {role.value}, and this needs {needed.value}")
        return None
