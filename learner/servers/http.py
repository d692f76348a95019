"""Requests to one server and what may become of them: JSON, lines of JSON, and errors as `LockstepError`."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
from pydantic import ValidationError

from learner.servers.credentials import tls_refusal, trust, warn_if_exposed
from shared.bearer_tokens import TOKEN_VARIABLE
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


class Channel:
    """HTTP connections to a server; safe to use from several threads.

    Args:
        token, ca_file: as for `learner.servers.client.RolloutClient`.
    """

    def __init__(self, url: str, token: str | None, ca_file: str | None, transport: httpx.BaseTransport | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"rollout_url {url!r} must start with http:// or https://")
        warn_if_exposed(url, token)
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            # A refused connection is retried before anything was sent, so this is safe for every request.
            transport=transport or httpx.HTTPTransport(retries=2, verify=trust(ca_file)),
            timeout=httpx.Timeout(STATE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lines(self, path: str, timeout_s: float, **request: Any) -> Iterator[dict[str, Any]]:
        """The lines of an NDJSON answer, blank ones aside; one with an error is raised."""
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                with self._http.stream("POST", path, **request) as answer:
                    if answer.is_error:
                        answer.read()
                        if _waited(answer, deadline):
                            continue
                        raise self._error(answer)
                    for line in answer.iter_lines():
                        if time.monotonic() > deadline:
                            raise httpx.ReadTimeout("the whole answer took too long")
                        if not line:
                            continue
                        document = self._line(line)
                        if "error" in document:
                            raise self._told(document)
                        yield document
                    return
        except httpx.HTTPError as error:
            raise self._unreachable(error, path) from error

    def _told(self, document: dict[str, Any]) -> LockstepError:
        try:
            return _from_body(document)
        except ValidationError:
            return self._foreign(f"answered an error that this learner does not know: {str(document)[:200]}")

    def _line(self, line: str) -> dict[str, Any]:
        try:
            document = json.loads(line)
        except ValueError as error:  # a proxy has ended the answer
            raise NotReady(f"{self.url} cut off an answer: {line[:80]!r}") from error
        if not isinstance(document, dict):
            raise self._foreign(f"answered a line that is no object: {line[:80]!r}")
        return document

    def _json(
        self,
        method: str,
        path: str,
        *,
        content: str | None = None,
        timeout: float = STATE_TIMEOUT_S,
        **kw: Any,
    ) -> Any:
        if content is not None:
            kw |= self._body(content, timeout)
        else:
            kw["timeout"] = self._timeout(timeout)
        deadline = time.monotonic() + timeout
        try:
            answer = self._http.request(method, path, **kw)
            while _waited(answer, deadline):
                answer = self._http.request(method, path, **kw)
            return self._checked(answer)
        except httpx.HTTPError as error:
            raise self._unreachable(error, path) from error

    def _body(self, content: str, timeout: float) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        return {"content": content, "headers": headers, "timeout": self._timeout(timeout)}

    def _timeout(self, seconds: float) -> httpx.Timeout:
        return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_S)

    def _checked(self, answer: httpx.Response) -> Any:
        if answer.is_error:
            raise self._error(answer)
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise self._foreign(f"answered {answer.status_code} without JSON") from error

    def _error(self, answer: httpx.Response) -> LockstepError:
        try:
            return _from_body(answer.json())
        except (ValueError, ValidationError):
            if answer.status_code in (401, 403):  # of a proxy, say
                refusal = Unauthenticated if answer.status_code == 401 else Forbidden
                return refusal(
                    f"{self.url} refuses this learner (HTTP {answer.status_code}); give the server's token with "
                    f"--token_file or ${TOKEN_VARIABLE}",
                )
            if answer.status_code in (502, 503, 504):  # a proxy's: nothing answers behind it
                return NotReady(f"{self.url} answers HTTP {answer.status_code}: {answer.text[:200]!r}")
            return self._foreign(f"answered HTTP {answer.status_code}: {answer.text[:200]!r}")

    def _parse(self, model: Any, document: Any) -> Any:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            raise self._foreign(f"answered something else than a {model.__name__}: {error}") from error

    def _foreign(self, what: str) -> LockstepError:
        return ProtocolMismatch(
            f"{self.url} {what}; is a rollout-server of the same lockstep-rl version running there?"
        )

    def _unreachable(self, error: httpx.HTTPError, path: str) -> LockstepError:
        if refusal := tls_refusal(self.url, error):
            return refusal
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            return Timeout(f"{self.url}{path} did not answer within its deadline; see the server's log")
        return NotReady(
            f"cannot reach the rollout server at {self.url}{path} ({reason(error)}); "
            "is rollout-server running there, and is rollout_url right?"
        )


def _waited(answer: httpx.Response, deadline: float) -> bool:
    """Whether the server has too much to do (429) and it is time to ask again: after the seconds it names, and a
    little more, so that not all who were refused come back at once.
    """
    if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
        return False
    named = answer.headers.get("Retry-After", "")
    seconds = (float(named) if named.isdecimal() else 1.0) * random.uniform(1.0, 1.5)
    if time.monotonic() + seconds > deadline:
        return False
    time.sleep(seconds)
    return True


def _from_body(document: Any) -> LockstepError:
    """Raises pydantic's ValueError for what is no error of ours."""
    error = ErrorBody.model_validate(document).error
    return LockstepError.from_detail(error)


def reason(error: Exception) -> str:
    """What an error of httpx says, or is called."""
    return str(error) or type(error).__name__
