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
from rollout_server.api.security.roles import (
    OPEN,
    SESSION_CALLS,
    SESSION_KEY,
    Role,
    is_vllm_path,
    meant,
    no_route,
    opened_by_session,
    rewarded_session,
    role_needed,
    session_call,
)
from rollout_server.sessions.records import RecordedSession, Sessions, is_session_token
from rollout_server.settings import ServerSettings
from shared.bearer_tokens import TOKEN_VARIABLE
from shared.errors import Forbidden, LockstepError, Unauthenticated, UnknownRoute, UnknownSession
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
        sessions: whose tokens and paths are known. Their calls go on with vLLM's path, and the session in the scope.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens | None,
        local: LocalAccess | None = None,
        origins: Collection[str] = (),
        sessions: Sessions | None = None,
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._local = local or LocalAccess()
        self._origins = origins
        self._sessions = sessions or Sessions(ServerSettings())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: LockstepError | None = None
        try:
            scope = self._admitted(scope)
        except LockstepError as error:
            refusal = error
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

    def _admitted(self, scope: Scope) -> Scope:
        """Return the scope of a request that may pass; raises `unauthenticated`, `forbidden`, `unknown_session`, or
        `unknown_route` where only the `/v1` of a path is wrong.
        """
        if scope["type"] == "http" and scope["path"] in OPEN:
            return scope
        method, path = scope.get("method", "websocket"), scope["path"]
        call = session_call(path)
        served = call[1] if call else path
        if self._tokens is None and (refusal := self._page_refusal({**scope, "path": served})):
            raise refusal
        presented = _presented(scope)
        try:
            session = self._sessions.of_token(presented) if presented else None
        except UnknownSession as error:
            raise error if self._tokens is None else Unauthenticated(error.message) from None
        rewarded = rewarded_session(path)
        if session is not None:
            opened = opened_by_session(method, path, session.session_id)
            if opened is None and opened_by_session(method, meant(method, path) or "", session.session_id):
                raise UnknownRoute(no_route(method, path))
            if opened is None or (rewarded and not session.request.accept_reward):
                raise Forbidden(
                    "this token opens the calls of its session and nothing else; its reward only where it was opened "
                    "with accept_reward"
                )
            return scope if opened == path and opened not in SESSION_CALLS else _call(scope, opened, session)
        if self._tokens is None and rewarded and not self._sessions.get(rewarded).request.accept_reward:
            raise Forbidden("without tokens anyone may be the agent: this session was opened without accept_reward")
        self._check_role(presented, method, served)
        return _call(scope, served, self._sessions.get(call[0])) if call else scope

    def _check_role(self, presented: bytes | None, method: str, path: str) -> None:
        if self._tokens is None:
            return
        role = self._tokens.role_of(presented) if presented else None
        if role is None:
            what = "this token is not known here" if presented else "a bearer token is needed"
            raise Unauthenticated(f"{what}: {_HOW}")
        needed = role_needed(method, path)
        if role not in (needed, Role.WEIGHTS):
            if role is Role.GENERATE and meant(method, path):
                raise UnknownRoute(no_route(method, path))
            raise Forbidden(f"this token has the role {role.value}, and this needs {needed.value}")

    def _page_refusal(self, scope: Scope) -> LockstepError | None:
        hosts, origins, sites = (
            [value.decode("latin-1").strip() for value in _values(scope, name)]
            for name in (b"host", b"origin", b"sec-fetch-site")
        )
        trusted = self._origins if is_vllm_path(scope["path"], Role.GENERATE) else ()
        refusal = self._local.refusal(hosts, origins, sites, trusted)
        return Forbidden(f"{refusal}; {_HOW_WITHOUT}") if refusal else None


def _call(scope: Scope, path: str, session: RecordedSession) -> Scope:
    """Return the scope of a session's call, as the layers below see it."""
    session.check_open()
    return {**scope, "path": path, "raw_path": path.encode(), SESSION_KEY: session}


def _presented(scope: Scope) -> bytes | None:
    """Return the bearer token of a request; of a session also as clients of Anthropic send it."""
    values = _values(scope, b"authorization")
    bearer = _BEARER.fullmatch(values[0].strip()) if len(values) == 1 else None
    if bearer or values:
        return bearer[1] if bearer else None
    keys = _values(scope, b"x-api-key")
    return keys[0].strip() if len(keys) == 1 and is_session_token(keys[0].strip()) else None


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope.get("headers", ()) if key.lower() == name]
