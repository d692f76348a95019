"""Roles that requests need: the only table of all routes. A route that is not in it needs the strongest role.

It is also the list of vLLM's routes that are served at all: development endpoints, runtime LoRA, elastic scaling,
weight transfer and what a plugin or a later version adds are not in it.
"""

from __future__ import annotations

import re
from enum import StrEnum

from starlette.routing import compile_path

from shared import wire


class Role(StrEnum):
    """What a token may do."""

    #: Completions, scores, vLLM's OpenAI routes, and looking at what is served.
    GENERATE = "generate"
    #: Everything: pushes, groups, ends of runs, and what the other roles may do. A learner needs it.
    WEIGHTS = "weights"
    #: `/metrics` and nothing else.
    METRICS = "metrics"


#: Served without a token, with an empty body.
OPEN = frozenset({wire.HEALTH, wire.READY})

#: Of a scope: the session that a request to a route of vLLM is a call of.
SESSION_KEY = "lockstep.session"
#: Routes of vLLM below a session, which its token opens, too.
SESSION_CALLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
)
_MODELS = "/v1/models"
_REWARD = "/reward"
_SESSION_PATH = re.compile(r"/v1/sessions/([^/]+)(/.*)?")

_OURS = {
    ("POST", wire.SESSIONS): Role.GENERATE,
    ("GET", wire.SESSION): Role.GENERATE,
    ("DELETE", wire.SESSION): Role.GENERATE,
    ("POST", wire.SESSION_REWARD): Role.GENERATE,
    ("GET", wire.SESSION + _MODELS): Role.GENERATE,
    ("GET", wire.STATE): Role.GENERATE,
    ("GET", wire.RUN): Role.GENERATE,
    ("POST", wire.GENERATE): Role.GENERATE,
    ("POST", wire.SCORE): Role.GENERATE,
    ("GET", "/openapi.json"): Role.GENERATE,
    ("GET", "/docs"): Role.GENERATE,
    ("GET", "/redoc"): Role.GENERATE,
}
#: Of vLLM, those that are served at all.
VLLM_ROUTES = {
    ("GET", "/v1/models"): Role.GENERATE,
    ("POST", "/v1/completions"): Role.GENERATE,
    ("POST", "/v1/chat/completions"): Role.GENERATE,
    ("POST", "/v1/responses"): Role.GENERATE,
    ("GET", "/v1/responses/{response_id}"): Role.GENERATE,
    ("POST", "/v1/responses/{response_id}/cancel"): Role.GENERATE,
    ("POST", "/v1/messages"): Role.GENERATE,
    ("POST", "/v1/messages/count_tokens"): Role.GENERATE,
    ("POST", "/tokenize"): Role.GENERATE,
    ("POST", "/detokenize"): Role.GENERATE,
    ("GET", "/tokenizer_info"): Role.GENERATE,
    ("GET", "/version"): Role.GENERATE,
    ("GET", "/metrics"): Role.METRICS,
    ("GET", "/metrics/"): Role.METRICS,
    # Only there with --profiler-config.
    ("POST", "/start_profile"): Role.WEIGHTS,
    ("POST", "/stop_profile"): Role.WEIGHTS,
}
VLLM_PATHS = frozenset(path for _, path in VLLM_ROUTES)
_VLLM_TABLE = [(compile_path(path)[0], role) for (_, path), role in VLLM_ROUTES.items()]

_TABLE = [(method, compile_path(path)[0], role) for (method, path), role in {**_OURS, **VLLM_ROUTES}.items()]


def role_needed(method: str, path: str) -> Role:
    """Return the role that a request needs; `path` is percent-decoded, as in ASGI."""
    for listed, pattern, role in _TABLE:
        if method == listed and pattern.fullmatch(path):
            return role
    return Role.WEIGHTS


def session_call(path: str) -> tuple[str, str] | None:
    """Return id and route of vLLM of a path below a session; None for all other paths."""
    found = _SESSION_PATH.fullmatch(path)
    return (found[1], found[2]) if found and found[2] in SESSION_CALLS else None


def rewarded_session(path: str) -> str | None:
    """Return the id of a session whose reward a path sets; None for all other paths."""
    found = _SESSION_PATH.fullmatch(path)
    return found[1] if found and found[2] == _REWARD else None


def opened_by_session(method: str, path: str, session_id: str) -> str | None:
    """Return the path, that of vLLM for its routes, on which a session's token answers a request; None if it does not.

    A session's token opens the session's calls, by its own paths or the plain ones, its list of models, and its reward.
    """
    found = _SESSION_PATH.fullmatch(path)
    if found and found[1] != session_id:
        return None
    inner = (found[2] or "") if found else path
    if method == "POST" and (inner in SESSION_CALLS or (found and inner == _REWARD)):
        return inner if inner in SESSION_CALLS else path
    if method == "GET" and inner == _MODELS:
        return wire.SESSION.format(session_id=session_id) + _MODELS
    return None


def meant(method: str, path: str) -> str | None:
    """Return the path of a route of vLLM, below a session or not, from which this one differs by a `/v1`."""
    found = _SESSION_PATH.fullmatch(path)
    session, inner = (path[: found.start(2)], found[2]) if found and found[2] else ("", path)
    other = inner.removeprefix("/v1") if inner.startswith("/v1/v1/") else f"/v1{inner}"
    below = (method, other) == ("GET", _MODELS) or (method == "POST" and other in SESSION_CALLS)
    return session + other if (below if session else (method, other) in VLLM_ROUTES) else None


def no_route(method: str, path: str) -> str:
    """Return what to say where there is no such route."""
    other = meant(method, path)
    if other is None:
        but = "; "
    else:
        but = f", but {method} {other}: OpenAI's clients take a base_url with /v1 at its end, Anthropic's one without; "
    return f"there is no {method} {path} here{but}GET /openapi.json lists this server's own routes, docs/http.md all"


def is_vllm_path(path: str, role: Role | None = None) -> bool:
    """Return whether vLLM's app answers at `path`; with `role`, whether on a route that this role opens."""
    return any(pattern.fullmatch(path) and role in (None, needed) for pattern, needed in _VLLM_TABLE)
