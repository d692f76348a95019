"""The rollout server as an object: one method per route, errors as `LockstepError`."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

from learner.servers.credentials import tls_refusal
from learner.servers.http import STATE_TIMEOUT_S, Channel, reason
from shared import PROTOCOL_VERSION, wire
from shared.collective import Announcement, GroupInvitation
from shared.errors import NotReady, ProtocolMismatch
from shared.rollouts import (
    HEARTBEAT_SECONDS,
    GenerateRequest,
    GenerateResponse,
    RolloutGroup,
    ScoreRequest,
    ScoreResponse,
)
from shared.weights import InFlight, PushReceipt, RunState, ServerState

SLICE_BYTES = 2**20
#: A stream of groups that is silent for so long is cut off, or its server hangs.
SILENCE_TIMEOUT_S = 6 * HEARTBEAT_SECONDS


class RolloutClient(Channel):
    """Synchronous client of one rollout server; safe to use from several threads.

    Every method raises `LockstepError` with the server's own code and message, `timeout` when a deadline
    passes and `not_ready` when the server cannot be reached.

    Args:
        token: sent with every request.
        ca_file: the CA, in PEM, that the server's certificate must be from; by default the well-known ones,
            or those of $SSL_CERT_FILE.
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
        super().__init__(url, token, ca_file, transport)
        self.push_timeout_s = push_timeout_s
        self.generate_timeout_s = generate_timeout_s

    def __enter__(self) -> RolloutClient:
        return self

    def state(self, timeout_s: float = STATE_TIMEOUT_S) -> ServerState:
        """`GET /v1/state`.

        Raises:
            LockstepError: `protocol_mismatch` if the server speaks another protocol.
        """
        document = self._json("GET", wire.STATE, timeout=timeout_s)
        spoken = document.get("protocol") if isinstance(document, dict) else None
        if spoken != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"the server at {self.url} speaks protocol {spoken}, this learner {PROTOCOL_VERSION}; "
                "install the same lockstep-rl on both sides"
            )
        return self._parse(ServerState, document)

    def wait_ready(self, timeout_s: float, poll_s: float = 0.5) -> ServerState:
        """Poll `/ready` until the server has loaded and warmed up its model, then answer its state.

        Raises:
            LockstepError: `not_ready` after `timeout_s` seconds, with what the server last said.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._http.get(wire.READY)
                if answer.status_code == 200:
                    return self.state()
                if answer.status_code in (401, 403):
                    raise self._error(answer)
                last = f"answers {answer.status_code} on /ready"
            except httpx.HTTPError as error:
                if refusal := tls_refusal(self.url, error):
                    raise refusal from error
                last = reason(error)
            if time.monotonic() >= deadline:
                raise NotReady(
                    f"the rollout server at {self.url} was not ready within {timeout_s:g} s ({last}); start "
                    "it with `rollout-server MODEL`, check rollout_url, or raise ready_timeout_s"
                )
            time.sleep(min(poll_s, max(deadline - time.monotonic(), 0.01)))

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """`POST /v1/generate`, all groups in one answer, in the order of the prompts."""
        body = request.model_copy(update={"stream": False}).model_dump_json(exclude_defaults=True)
        document = self._json("POST", wire.GENERATE, content=body, timeout=self.generate_timeout_s)
        return self._parse(GenerateResponse, document)

    def iter_groups(self, request: GenerateRequest) -> Iterator[RolloutGroup]:
        """`POST /v1/generate` as NDJSON: groups in the order they finish.

        Raises:
            LockstepError: also when the stream ends without its closing line.
        """
        body = request.model_copy(update={"stream": True}).model_dump_json(exclude_defaults=True)
        sent = self._body(body, min(SILENCE_TIMEOUT_S, self.generate_timeout_s))
        for document in self._lines(wire.GENERATE, self.generate_timeout_s, **sent):
            if document.get(wire.DONE):
                return
            yield self._parse(RolloutGroup, document)
        raise NotReady(f"{self.url} cut off a stream of completions before its end")

    def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreResponse:
        """`POST /v1/score`: teacher-forced logprobs at temperature 1, within `timeout_s` if that is given."""
        body = request.model_dump_json(exclude_defaults=True)
        timeout = min(timeout_s or self.generate_timeout_s, self.generate_timeout_s)
        return self._parse(ScoreResponse, self._json("POST", wire.SCORE, content=body, timeout=timeout))

    def push(
        self,
        run_id: str,
        pieces: Sequence[bytes | memoryview],
        lease: str,
        *,
        takeover: bool = False,
        in_flight: InFlight = "drain",
    ) -> PushReceipt:
        """`PUT /v1/runs/{run_id}/adapter`.

        Pushing the same version and bytes again is safe and answers the same, so a push whose answer was lost
        on the way is sent a second time.
        """
        headers = _push_headers(lease, in_flight)
        if takeover:
            headers[wire.TAKEOVER_HEADER] = "1"
        headers["content-length"] = str(sum(len(piece) for piece in pieces))
        path = wire.ADAPTER.format(run_id=run_id)
        for attempt in (1, 2):
            try:
                answer = self._http.put(
                    path, content=_slices(pieces), headers=headers, timeout=self._timeout(self.push_timeout_s)
                )
                break
            except httpx.TimeoutException as error:
                raise self._unreachable(error, path) from error
            except httpx.HTTPError as error:
                if attempt == 2:
                    raise self._unreachable(error, path) from error
        return self._parse(PushReceipt, self._checked(answer))

    def join_group(self, run_id: str, lease: str) -> Generator[GroupInvitation | None]:
        """`POST /v1/runs/{run_id}/group`: the invitation, then None when all workers have joined."""
        timeout = self._timeout(self.push_timeout_s)
        for document in self._lines(
            wire.GROUP.format(run_id=run_id), self.push_timeout_s, headers=_push_headers(lease), timeout=timeout
        ):
            yield None if wire.JOINED in document else self._parse(GroupInvitation, document)

    def broadcast(
        self, run_id: str, announced: Announcement, lease: str, *, in_flight: InFlight = "drain"
    ) -> Generator[PushReceipt | None]:
        """`POST /v1/runs/{run_id}/broadcast`: None when the workers receive, then the receipt."""
        body = self._body(announced.model_dump_json(), self.push_timeout_s)
        body["headers"] = _push_headers(lease, in_flight) | body["headers"]
        for document in self._lines(wire.BROADCAST.format(run_id=run_id), self.push_timeout_s, **body):
            yield None if wire.RECEIVING in document else self._parse(PushReceipt, document)

    def sleep(self) -> ServerState:
        """`POST /v1/sleep`: the server gives its GPU's memory back and lets requests wait."""
        return self._parse(ServerState, self._json("POST", wire.SLEEP, timeout=self.push_timeout_s))

    def wake(self) -> ServerState:
        """`POST /v1/wake`: it takes the memory again and goes on."""
        return self._parse(ServerState, self._json("POST", wire.WAKE, timeout=self.push_timeout_s))

    def run(self, run_id: str) -> RunState:
        """`GET /v1/runs/{run_id}`."""
        return self._parse(RunState, self._json("GET", wire.RUN.format(run_id=run_id)))

    def delete_run(self, run_id: str, lease: str) -> None:
        """`DELETE /v1/runs/{run_id}`: frees the run's slots on the server."""
        self._json("DELETE", wire.RUN.format(run_id=run_id), headers={wire.LEASE_HEADER: lease})


def _push_headers(lease: str, in_flight: InFlight = "drain") -> dict[str, str]:
    headers = {wire.LEASE_HEADER: lease, "content-type": "application/octet-stream"}
    return headers if in_flight == "drain" else {**headers, wire.IN_FLIGHT_HEADER: in_flight}


def _slices(pieces: Sequence[bytes | memoryview]) -> Iterator[Any]:
    """The blob in parts that a socket takes at once: nothing is joined or copied."""
    for piece in pieces:
        for start in range(0, len(piece), SLICE_BYTES):
            yield piece[start : start + SLICE_BYTES]
