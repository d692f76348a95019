"""`RolloutClient`: one method per route of a rollout server."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

from learner.servers.credentials import tls_error
from learner.servers.http import STATE_TIMEOUT_S, BaseClient, request_timeout
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
#: Longest silence of a stream of groups: after that its server hangs, or the connection is cut off.
SILENCE_TIMEOUT_S = 6 * HEARTBEAT_SECONDS


class RolloutClient(BaseClient):
    """Synchronous, thread-safe client of one rollout server.

    Every method raises a `LockstepError` with the server's code and message, `Timeout` after its deadline, `NotReady`
    if the server cannot be reached, and `ProtocolMismatch` if something else answers at this URL.

    Args:
        url: `http(s)://HOST:PORT`.
        token: bearer token of every request.
        ca_file: CA of the server's certificate, in PEM. Default: the well-known CAs, or those of $SSL_CERT_FILE.
        push_timeout_s: deadline of a push, of joining a group, and of `sleep` and `wake`, in seconds.
        generate_timeout_s: deadline of `generate`, `iter_groups` and `score`, in seconds.
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
        super().__init__(url, token, ca_file, transport)
        self.push_timeout_s = push_timeout_s
        self.generate_timeout_s = generate_timeout_s

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
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                response = self._http.get(wire.READY)
                if response.status_code == 200:
                    return self.state()
                if response.status_code in (401, 403):
                    raise self._response_error(response)
                last = f"answers {response.status_code} on /ready"
            except httpx.HTTPError as error:
                if refusal := tls_error(self.url, error):
                    raise refusal from error
                last = str(error) or type(error).__name__
            if time.monotonic() >= deadline:
                raise NotReady(
                    f"the rollout server at {self.url} was not ready within {timeout_s:g} s ({last}); start "
                    "it with `rollout-server MODEL`, check rollout_url, or raise ready_timeout_s"
                )
            time.sleep(min(poll_s, max(deadline - time.monotonic(), 0.01)))

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
        for line in self._stream(wire.GENERATE, body, timeout_s=self.generate_timeout_s, silence_s=silence_s):
            if line.get(wire.DONE):
                return
            yield self._parse(RolloutGroup, line)
        raise NotReady(f"{self.url} cut off a stream of completions before its end")

    def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreResponse:
        """`POST /v1/score`: teacher-forced logprobs at temperature 1, without truncation.

        Args:
            timeout_s: deadline in seconds, where it is to be shorter than `generate_timeout_s`.

        Returns:
            `logprobs[i][t]` = ln p(sequence i's token t + 1 | its tokens up to t): T - 1 values for T tokens.

        Raises:
            UnknownRun, VersionNotActive, StepNotReached, BaseNotServed: the requested policy is not served.
        """
        timeout_s = min(timeout_s or self.generate_timeout_s, self.generate_timeout_s)
        return self._parse(ScoreResponse, self._json("POST", wire.SCORE, request, timeout_s=timeout_s))

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
        headers = _push_headers(lease, in_flight) | {
            "content-type": "application/octet-stream",
            "content-length": str(sum(len(piece) for piece in pieces)),
        }
        if takeover:
            headers[wire.TAKEOVER_HEADER] = "1"
        path, timeout = wire.ADAPTER.format(run_id=run_id), request_timeout(self.push_timeout_s)
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

    def delete_run(self, run_id: str, lease: str) -> None:
        """`DELETE /v1/runs/{run_id}`: end the run and free its slots.

        Raises:
            UnknownRun, LeaseMismatch: the server does not have it, or another learner holds it.
        """
        self._json("DELETE", wire.RUN.format(run_id=run_id), headers={wire.LEASE_HEADER: lease})


def _push_headers(lease: str, in_flight: InFlight = "drain") -> dict[str, str]:
    return {wire.LEASE_HEADER: lease} | ({} if in_flight == "drain" else {wire.IN_FLIGHT_HEADER: in_flight})
