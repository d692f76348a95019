"""The outermost ASGI layer: without a token that has the role, no request gets further than this.

Where there are no tokens, requests of pages in a browser get no further.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from rollout_server.api.connections import ADMIT
from rollout_server.api.responses import error_response
from rollout_server.api.security.bearer_tokens import Tokens
from rollout_server.api.security.roles import OPEN, Role, is_vllm_path, role_needed
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import Forbidden, LockstepError, Unauthenticated
from shared.local_access import LocalAccess

_BEARER = re.compile(rb"bearer +([^\s]+)", re.IGNORECASE)
_HOW = f"a learner takes it from --token_file or ${TOKEN_VARIABLE}, other clients send `Authorization: Bearer TOKEN`"
_HOW_WITHOUT = "use its address, name it with --allowed-hosts, or give the server a token (--token-file) and send that"


class AuthMiddleware:
    """Denies by default: every method, path, mount and websocket but `/health` and `/ready`.

    Args:
        tokens: None lets everything through that is not a page's of another site.
        local: what this server answers to where it has no tokens.
        origins: sites whose pages may use vLLM's routes of the role generate without a token; "*" is every one.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens | None,
        local: LocalAccess | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._local = local or LocalAccess()
        self._origins = origins

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
        if scope["type"] == "http" and scope["path"] in OPEN:
            return None
        if self._tokens is None:
            return self._page_refusal(scope)
        values = _values(scope, b"authorization")
        presented = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
        role = self._tokens.role_of(presented[1]) if presented else None
        if role is None:
            what = "this token is not known here" if presented else "a bearer token is needed"
            return Unauthenticated(f"{what}: {_HOW}")
        needed = role_needed(scope.get("method", "websocket"), scope["path"])
        if role not in (needed, Role.WEIGHTS):
            return Forbidden(f"this token has the role {role.value}, and this needs {needed.value}")
        return None

    def _page_refusal(self, scope: Scope) -> LockstepError | None:
        hosts, origins, sites = (
            [value.decode("latin-1").strip() for value in _values(scope, name)]
            for name in (b"host", b"origin", b"sec-fetch-site")
        )
        trusted = self._origins if is_vllm_path(scope["path"], Role.GENERATE) else ()
        refusal = self._local.refusal(hosts, origins, sites, trusted)
        return Forbidden(f"{refusal}; {_HOW_WITHOUT}") if refusal else None


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope.get("headers", ()) if key.lower() == name]
