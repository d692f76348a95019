"""`RolloutClient`: one method per route of a rollout server, and every failure as a `LockstepError`."""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from learner.cluster.relay import Request, Response
from learner.servers.credentials import ssl_context, tls_error
from learner.utils.waits import waiting
from learner.utils.wording import option
from shared import PROTOCOL_VERSION, wire
from shared.bearer_tokens import TOKEN_VARIABLE, is_loopback
from shared.collective import Announcement, GroupInvitation
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
from shared.rollouts import (
    HEARTBEAT_SECONDS,
    GenerateRequest,
    GenerateResponse,
    RolloutGroup,
    ScoreRequest,
    ScoreResponse,
)
from shared.sessions import SessionOpened, SessionRecord, SessionRequest
from shared.weights import InFlight, PushReceipt, RunState, ServerState, TrainingEnd, WeightVersion

CONNECT_TIMEOUT_S = 10.0
STATE_TIMEOUT_S = 30.0
#: Longest silence of a stream of groups: after that its server hangs, or the connection is cut off.
SILENCE_TIMEOUT_S = 6 * HEARTBEAT_SECONDS
SLICE_BYTES = 2**20
#: A connection outlasts a step of some seconds, and ends before the server (75 s) or a usual proxy (60 s) would end it.
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=45.0)

M = TypeVar("M", bound=BaseModel)
Body = BaseModel | None
Headers = dict[str, str] | None


class _Tokens(BaseModel):
    tokens: list[int]


class RolloutClient:
    """Synchronous, thread-safe client of one rollout server.

    Every method raises a `LockstepError` with the server's code and message, `Timeout` after its deadline, `NotReady`
    if the server cannot be reached, and `ProtocolMismatch` if something else answers at this URL.

    Args:
        url: `http(s)://HOST:PORT`.
        token: bearer token of every request.
        ca_file: CA of the server's certificate, in PEM. Default: the well-known CAs, or those of $SSL_CERT_FILE.
        push_timeout_s: deadline of a push, of joining a group, and of `sleep` and `wake`, in seconds.
        generate_timeout_s: deadline of `generate`, `iter_groups` and `score` (or its `timeout_s`, if less), in seconds.
        transport: httpx transport; tests replace the network with it.

    Example:
        with RolloutClient("http://127.0.0.1:8000", token="...") as client:
            client.wait_ready(timeout_s=600)
            request = GenerateRequest(
                prompts=[Prompt(text="1 + 1 =")], sampling=SamplingParams(n=4, max_tokens=16), policy="base"
            )
            (group,) = client.generate(request).groups
            for completion in group.completions:
                print(completion.text, sum(completion.logprobs))
            tokens = group.prompt_token_ids + group.completions[0].token_ids
            (logprobs,) = client.score(ScoreRequest(sequences=[tokens], policy="base")).logprobs
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        ca_file: str | None = None,
        push_timeout_s: float = 120.0,
        generate_timeout_s: float = 1800.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"rollout_url {url!r} must start with http:// or https://")
        if token and url.startswith("http://") and not is_loopback(urlsplit(url).hostname):
            warnings.warn(f"the token goes to {url} unencrypted; use https://, or a network of your own", stacklevel=2)
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            # A refused connection is retried before anything was sent, so this is safe for every request.
            transport=transport or httpx.HTTPTransport(retries=2, verify=ssl_context(ca_file), limits=_LIMITS),
            timeout=_timeout(STATE_TIMEOUT_S),
        )
        self.push_timeout_s, self.generate_timeout_s = push_timeout_s, generate_timeout_s

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self, timeout_s: float = STATE_TIMEOUT_S) -> ServerState:
        """`GET /v1/state`: model, limits, and the runs it serves.

        Raises:
            ProtocolMismatch: the server speaks another protocol version.
        """
        document = self._json("GET", wire.STATE, timeout_s=timeout_s)
        spoken = document.get("protocol") if isinstance(document, dict) else None
        if spoken != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the server at {self.url} speaks protocol {spoken}, this learner {PROTOCOL_VERSION}; "
                "install the same lockstep-rl on both sides"
            )
        return self._parse(ServerState, document)

    def wait_ready(self, timeout_s: float, poll_s: float = 0.5) -> ServerState:
        """Poll `GET /ready` until the server has loaded and warmed up its model, then return its state.

        Raises:
            NotReady: it was not ready within `timeout_s` seconds; the message holds the last response.
            Unauthenticated, Forbidden: at once, since waiting brings no token.
        """
        last = "it has not answered yet"
        then = "it is given up: start it with `rollout-server MODEL`, or check its URL"
        with waiting(f"the rollout server at {self.url}", limit_s=timeout_s, then=then, detail=lambda: last):
            deadline = time.monotonic() + timeout_s
            while True:
                ready, last = self._look()
                if ready:
                    return self.state()
                if time.monotonic() >= deadline:
                    raise NotReady(
                        f"the rollout server at {self.url} was not ready within {timeout_s:g} s ({last}); start "
                        "it with `rollout-server MODEL`, check rollout_url, or raise ready_timeout_s"
                    )
                time.sleep(min(poll_s, max(deadline - time.monotonic(), 0.01)))

    def _look(self) -> tuple[bool, str]:
        """Ask whether the server is ready; return how it stands if not."""
        try:
            response = self._http.get(wire.READY)
            if response.status_code in (401, 403):
                raise self._response_error(response)
            if response.status_code == 503:
                return False, "it loads its model, or is about to leave: 503 on /ready"
            return response.status_code == 200, f"it answers {response.status_code} on /ready"
        except httpx.HTTPError as error:
            if refusal := tls_error(self.url, error):
                raise refusal from error
            return False, f"it cannot be reached: {error or type(error).__name__}"

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """`POST /v1/generate`: wait for all completions.

        Returns:
            One group per prompt, in the order of the prompts, each with `sampling.n` completions. A completion of T
            tokens has T `token_ids` and T `logprobs` (ln p, after temperature and truncation), and `spans` that name
            the weight version of every token.

        Raises:
            UnknownRun, VersionNotActive, StepNotReached, BaseNotServed: the requested policy is not served.
            Overloaded: still, at the deadline.
        """
        body = request.model_copy(update={"stream": False})
        return self._parse(GenerateResponse, self._json("POST", wire.GENERATE, body, timeout_s=self.generate_timeout_s))

    def iter_groups(self, request: GenerateRequest) -> Iterator[RolloutGroup]:
        """`POST /v1/generate` as a stream: yield the groups of `generate` in the order in which they finish.

        Raises:
            NotReady: the stream ended early. Others as `generate`, some of them after the first groups.
        """
        body = request.model_copy(update={"stream": True})
        silence_s = min(SILENCE_TIMEOUT_S, self.generate_timeout_s)
        lines = self._stream(wire.GENERATE, body, timeout_s=self.generate_timeout_s, silence_s=silence_s)
        for line in lines:
            if line.get(wire.DONE):
                with contextlib.suppress(LockstepError):
                    deque(lines, 0)  # only a response that was read to its end leaves its connection to the next one
                return
            yield self._parse(RolloutGroup, line)
        raise NotReady(f"{self.url} cut off a stream of completions before its end")

    def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreResponse:
        """`POST /v1/score`: teacher-forced logprobs at temperature 1, without truncation.

        Returns:
            `logprobs[i][t]` = ln p(sequence i's token t + 1 | its tokens up to t): T - 1 values for T tokens.

        Raises:
            UnknownRun, VersionNotActive, StepNotReached, BaseNotServed: the requested policy is not served.
        """
        timeout_s = self.generate_timeout_s if timeout_s is None else min(timeout_s, self.generate_timeout_s)
        return self._parse(ScoreResponse, self._json("POST", wire.SCORE, request, timeout_s=timeout_s))

    def open_session(self, request: SessionRequest) -> SessionOpened:
        """`POST /v1/sessions`: open a session for an agent, whose calls it records.

        Raises:
            UnknownRun, VersionNotActive, StepNotReached: the requested policy is not served.
            Overloaded: the server holds as many sessions as it may, still at the deadline.
        """
        document = self._json("POST", wire.SESSIONS, request, timeout_s=self.generate_timeout_s)
        return self._parse(SessionOpened, document)

    def close_session(self, session_id: str) -> SessionRecord:
        """`DELETE /v1/sessions/{session_id}`: end it, with its calls under way, and return what it has recorded."""
        path = wire.SESSION.format(session_id=session_id)
        return self._parse(SessionRecord, self._json("DELETE", path, timeout_s=self.generate_timeout_s))

    def detokenize(self, token_ids: list[int]) -> str:
        """`POST /detokenize`: return the text of token ids, special tokens included."""
        return str(self._json("POST", "/detokenize", _Tokens(tokens=token_ids))["prompt"])

    def push(
        self,
        run_id: str,
        pieces: Sequence[bytes | memoryview],
        lease: str,
        *,
        takeover: bool = False,
        in_flight: InFlight = "drain",
    ) -> PushReceipt:
        """`PUT /v1/runs/{run_id}/adapter`: install an adapter and return when it is served.

        Pushing the same version and bytes again is safe, so a push is retried once if its response was lost.

        Args:
            pieces: the safetensors blob, in parts; see `learner.adapters.exporter.AdapterExport.pieces`.
            lease: secret of the run's owner.
            takeover: take the run from the learner that holds its lease.
            in_flight: whether running requests finish on their version (`drain`) or go on with the new one.

        Raises:
            LeaseMismatch, StaleVersion: another learner holds the run, or has pushed a newer version.
            NoFreeRun, NoFreeSlot: the server has no room.
            LockstepError: the adapter does not fit the server (base, rank, shapes), or did not arrive intact.
        """
        size = sum(len(piece) for piece in pieces)
        headers = _push_headers(lease, in_flight, size=size, takeover=takeover)
        path, timeout = wire.ADAPTER.format(run_id=run_id), _timeout(self.push_timeout_s)
        for attempt in (1, 2):
            try:
                # Parts that a socket takes at once, without joining or copying.
                parts: Iterator[Any] = (
                    piece[i : i + SLICE_BYTES] for piece in pieces for i in range(0, len(piece), SLICE_BYTES)
                )
                response = self._http.put(path, content=parts, headers=headers, timeout=timeout)
                break
            except httpx.HTTPError as error:
                if attempt == 2 or isinstance(error, httpx.TimeoutException):
                    raise self._connection_error(error, path) from error
        return self._parse(PushReceipt, self._decoded(response))

    def relayed_push(
        self, run_id: str, size: int, lease: str, *, takeover: bool = False, in_flight: InFlight = "drain"
    ) -> Request:
        """Return the request of `push` without its body of `size` bytes, for a relay that makes it."""
        headers = _push_headers(lease, in_flight, size=size, takeover=takeover)
        if authorization := self._http.headers.get("Authorization"):
            headers["Authorization"] = authorization
        return Request(self.url + wire.ADAPTER.format(run_id=run_id), headers)

    def relayed_receipt(self, response: Response) -> PushReceipt:
        """Return the receipt that the server has answered to a relay. Raises as `push`."""
        if not httpx.codes.is_success(response.status):
            raise self._response_error(httpx.Response(response.status, content=response.content))
        try:
            return self._parse(PushReceipt, from_json(response.content))
        except ValueError as error:
            raise self._protocol_mismatch(f"answered {response.status} without JSON") from error

    def join_group(self, run_id: str, lease: str) -> Generator[GroupInvitation | None]:
        """`POST /v1/runs/{run_id}/group`: yield the invitation, then None when all workers have joined."""
        path, headers = wire.GROUP.format(run_id=run_id), _push_headers(lease)
        for line in self._stream(path, timeout_s=self.push_timeout_s, headers=headers):
            yield None if wire.JOINED in line else self._parse(GroupInvitation, line)

    def broadcast(
        self, run_id: str, announced: Announcement, lease: str, *, in_flight: InFlight = "drain"
    ) -> Generator[PushReceipt | None]:
        """`POST /v1/runs/{run_id}/broadcast`: yield None when the workers receive, then the receipt.

        Raises:
            NoGroup, UnknownLayout: push over HTTP first. Others as `push`.
        """
        path, headers = wire.BROADCAST.format(run_id=run_id), _push_headers(lease, in_flight)
        for line in self._stream(path, announced, timeout_s=self.push_timeout_s, headers=headers):
            yield None if wire.RECEIVING in line else self._parse(PushReceipt, line)

    def sleep(self) -> ServerState:
        """`POST /v1/sleep`: make a `--share-gpu` server release its GPU memory; requests wait until `wake`."""
        return self._parse(ServerState, self._json("POST", wire.SLEEP, timeout_s=self.push_timeout_s))

    def wake(self) -> ServerState:
        """`POST /v1/wake`: make it allocate its GPU memory and serve again."""
        return self._parse(ServerState, self._json("POST", wire.WAKE, timeout_s=self.push_timeout_s))

    def run(self, run_id: str) -> RunState:
        """`GET /v1/runs/{run_id}`: version, slots and running requests of one run.

        Raises:
            UnknownRun: the server does not have it.
        """
        return self._parse(RunState, self._json("GET", wire.RUN.format(run_id=run_id)))

    def finish_run(self, version: WeightVersion, lease: str, *, keep_s: float = 0.0) -> RunState:
        """`POST /v1/runs/{run_id}/finish`: say that the training has ended with `version`.

        The run goes on being served; after `keep_s` seconds another run may have its place.

        Raises:
            UnknownRun, LeaseMismatch, VersionNotActive: the server does not serve it, or serves another version.
        """
        ended = TrainingEnd(version=version, keep_seconds=keep_s)
        path = wire.FINISH.format(run_id=version.run_id)
        return self._parse(RunState, self._json("POST", path, ended, headers={wire.LEASE_HEADER: lease}))

    def delete_run(self, run_id: str, lease: str, *, takeover: bool = False) -> None:
        """`DELETE /v1/runs/{run_id}`: end the run and free its slots; with `takeover` also another learner's.

        Raises:
            UnknownRun, LeaseMismatch: the server does not have it, or another learner holds it.
        """
        headers = {wire.LEASE_HEADER: lease, **({wire.TAKEOVER_HEADER: "1"} if takeover else {})}
        self._json("DELETE", wire.RUN.format(run_id=run_id), headers=headers)

    def _json(
        self, method: str, path: str, body: Body = None, *, timeout_s: float = STATE_TIMEOUT_S, headers: Headers = None
    ) -> Any:
        """Return the decoded response. An overloaded server is asked again until the deadline."""
        deadline = time.monotonic() + timeout_s
        request = _request(body, timeout_s, headers)
        try:
            try:
                response = self._http.request(method, path, **request)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                # Kept from before the server was killed and came back, perhaps: a new connection tells.
                if method not in ("GET", "DELETE"):
                    raise
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
            document = from_json(line)
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
                    f"{self.url} refuses this learner (HTTP {status}); give the server's token with "
                    f"{option('token_file')} or ${TOKEN_VARIABLE}"
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


def _push_headers(
    lease: str, in_flight: InFlight = "drain", *, size: int | None = None, takeover: bool = False
) -> dict[str, str]:
    """Return the headers of a push; `size`: of its body in bytes, if it has one."""
    headers = {wire.LEASE_HEADER: lease} | ({} if in_flight == "drain" else {wire.IN_FLIGHT_HEADER: in_flight})
    if size is not None:
        headers |= {"content-type": "application/octet-stream", "content-length": str(size)}
    return headers | ({wire.TAKEOVER_HEADER: "1"} if takeover else {})


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_S)


def _request(body: Body, timeout_s: float, headers: Headers) -> dict[str, Any]:
    """Return the keyword arguments of an httpx request."""
    request: dict[str, Any] = {"headers": headers or {}, "timeout": _timeout(timeout_s)}
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
