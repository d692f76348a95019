"""HTTP to one rollout server: JSON, NDJSON streams, and every failure as a `LockstepError`."""

from __future__ import annotations

import json
import random
import time
import warnings
from collections.abc import Iterator
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from learner.servers.credentials import ssl_context, tls_error
from shared.bearer_tokens import TOKEN_VARIABLE, is_loopback
from shared.errors import (
    ErrorBody,
    Forbidden,
    InvalidRequest,
    LockstepError,
    NotReady,
    ProtocolMismatch,
    Timeout,
    Unauthenticated,
)

CONNECT_TIMEOUT_S = 10.0
STATE_TIMEOUT_S = 30.0

M = TypeVar("M", bound=BaseModel)
Body = BaseModel | None
Headers = dict[str, str] | None


class BaseClient:
    """Connections to one server; thread-safe. Arguments as for `learner.servers.client.RolloutClient`."""

    def __init__(self, url: str, token: str | None, ca_file: str | None, transport: httpx.BaseTransport | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"rollout_url {url!r} must start with http:// or https://")
        if token and url.startswith("http://") and not is_loopback(urlsplit(url).hostname):
            warnings.warn(f"the token goes to {url} unencrypted; use https://, or a network of your own", stacklevel=2)
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            # A refused connection is retried before anything was sent, so this is safe for every request.
            transport=transport or httpx.HTTPTransport(retries=2, verify=ssl_context(ca_file)),
            timeout=request_timeout(STATE_TIMEOUT_S),
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _json(
        self, method: str, path: str, body: Body = None, *, timeout_s: float = STATE_TIMEOUT_S, headers: Headers = None
    ) -> Any:
        """Return the decoded response. An overloaded server is asked again until the deadline."""
        deadline = time.monotonic() + timeout_s
        request = _request(body, timeout_s, headers)
        try:
            response = self._http.request(method, path, **request)
            while _waited(response, deadline):
                response = self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise self._connection_error(error, path) from error
        return self._decoded(response)

    def _stream(
        self, path: str, body: Body = None, *, timeout_s: float, silence_s: float | None = None, headers: Headers = None
    ) -> Iterator[dict[str, Any]]:
        """POST and yield the lines of the NDJSON response, without blank ones; raise the error that a line carries.

        Args:
            timeout_s: deadline of the last line.
            silence_s: longest wait for the next bytes; `timeout_s` by default.
        """
        deadline = time.monotonic() + timeout_s
        request = _request(body, silence_s or timeout_s, headers)
        try:
            while True:
                with self._http.stream("POST", path, **request) as response:
                    if response.is_error:
                        response.read()
                        if _waited(response, deadline):
                            continue
                        raise self._response_error(response)
                    for line in response.iter_lines():
                        if time.monotonic() > deadline:
                            raise httpx.ReadTimeout("the stream did not end before its deadline")
                        if line:
                            yield self._parsed_line(line)
                    return
        except httpx.HTTPError as error:
            raise self._connection_error(error, path) from error

    def _parsed_line(self, line: str) -> dict[str, Any]:
        try:
            document = json.loads(line)
        except ValueError as error:  # a proxy has ended the response
            raise NotReady(f"{self.url} cut off an answer: {line[:80]!r}") from error
        if not isinstance(document, dict):
            raise self._protocol_mismatch(f"answered a line that is no object: {line[:80]!r}")
        if "error" not in document:
            return document
        try:
            raise LockstepError.from_detail(ErrorBody.model_validate(document).error)
        except ValidationError as error:
            text = f"answered an error that this learner does not know: {str(document)[:200]}"
            raise self._protocol_mismatch(text) from error

    def _decoded(self, response: httpx.Response) -> Any:
        if response.is_error:
            raise self._response_error(response)
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise self._protocol_mismatch(f"answered {response.status_code} without JSON") from error

    def _parse(self, model: type[M], document: Any) -> M:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            raise self._protocol_mismatch(f"answered something else than a {model.__name__}: {error}") from error

    def _response_error(self, response: httpx.Response) -> LockstepError:
        try:
            return LockstepError.from_detail(ErrorBody.model_validate(response.json()).error)
        except ValueError:  # neither JSON nor one of our errors: a proxy's
            status = response.status_code
            if status in (401, 403):
                refusal = Unauthenticated if status == 401 else Forbidden
                return refusal(
                    f"{self.url} refuses this learner (HTTP {status}); give the server's token with --token_file or "
                    f"${TOKEN_VARIABLE}"
                )
            text = f"HTTP {status}: {response.text[:200]!r}"
            if status in (502, 503, 504):  # the proxy reaches no server
                return NotReady(f"{self.url} answers {text}")
            return self._protocol_mismatch(f"answered {text}")

    def _protocol_mismatch(self, what: str) -> LockstepError:
        return ProtocolMismatch(
            f"{self.url} {what}; is a rollout-server of the same lockstep-rl version running there?"
        )

    def _connection_error(self, error: httpx.HTTPError, path: str) -> LockstepError:
        if refusal := tls_error(self.url, error):
            return refusal
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return Timeout(f"{self.url}{path} did not answer within its deadline; see the server's log")
        return NotReady(
            f"cannot reach the rollout server at {self.url}{path} ({str(error) or type(error).__name__}); "
            "is rollout-server running there, and is rollout_url right?"
        )


def request_timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_S)


def _request(body: Body, timeout_s: float, headers: Headers) -> dict[str, Any]:
    """Return the keyword arguments of an httpx request."""
    request: dict[str, Any] = {"headers": headers or {}, "timeout": request_timeout(timeout_s)}
    if body is not None:
        request["headers"] |= {"content-type": "application/json"}
        request["content"] = body.model_dump_json(exclude_defaults=True)
    return request


def _waited(response: httpx.Response, deadline: float) -> bool:
    """Sleep before a retry if the server is overloaded (429); return False if there is nothing to retry, or no time.

    Sleeps for the `Retry-After` seconds and a random part more, so that refused clients do not return all at once.
    """
    if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return False
    retry_after = response.headers.get("Retry-After", "")
    seconds = (float(retry_after) if retry_after.isdecimal() else 1.0) * random.uniform(1.0, 1.5)
    if time.monotonic() + seconds > deadline:
        return False
    time.sleep(seconds)
    return True
