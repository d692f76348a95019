"""Sessions: what an agent's calls sample from, how, for how long, and what they have sampled.

All of it happens on one event loop, but for the comparison of text.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import time
import uuid
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.admission import Admission, SessionHold
from rollout_server.engine.capacity import too_large
from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.turns import in_turn
from rollout_server.generation.vllm_params import TRAINERS_FIELDS, check_vocabulary, overridden, to_vllm
from rollout_server.sessions.recording import Recording
from rollout_server.sessions.trajectories import Branch, Trajectories, continued
from rollout_server.settings import ServerSettings
from shared import wire
from shared.errors import InvalidRequest, Overloaded, SessionEnded, UnknownSession
from shared.rollouts import PolicyRequest
from shared.sessions import Ended, SessionOpened, SessionRecord, SessionRequest
from shared.weights import WeightVersion

#: How long a record can still be read after the end of its session, and (deleted) repeated to whoever lost the answer.
_RECORD_SECONDS, _DELETED_SECONDS = 900.0, 60.0
_DELETED_KEPT = 64
_TOKEN = "lockstep-session"
#: Fields of vLLM's routes that a session cannot record as the trainer's sampling, or that outlive the call.
_REFUSED = {
    "use_beam_search": "its tokens are searched for, not sampled",
    "echo": "prompts are recorded anyway",
    "background": "the response would outlive the call; wait for it, or stream it",
    "previous_response_id": "send the complete input instead",
    "logprob_token_ids": "ask for top logprobs instead",
    "thinking_token_budget": "it changes what is drawn",
    "watermarking": "it changes what is drawn",
    "vllm_xargs": "it may change what is drawn",
    "logits_processors": "they change what is drawn",
    "prompt_embeds": "it has no token ids",
}
_WHY_ENDED = {
    "deleted": "it has been deleted",
    "max_calls": "it has made as many calls as its max_calls allows",
    "max_tokens": "its trajectories hold as many tokens as its max_tokens allows",
    "max_seconds": "it has lasted as long as its max_seconds allows",
    "run_ended": "its run has ended, or its learner has started again",
    "superseded": "it kept an older version between two calls, and a push needed its slot",
}


@dataclass
class Counts:
    """Of all sessions since the start, for metrics."""

    opened: int = 0
    calls: int = 0
    cut: int = 0
    forks: int = 0
    repaired: int = 0


class RecordedSession:
    """One session; made by `Sessions.open`.

    Args:
        sessions: that it is one of.
    """

    def __init__(self, request: SessionRequest, sessions: Sessions, proxy: EngineProxy) -> None:
        self.request, self._sessions, self._proxy = request, sessions, proxy
        self._truncated = proxy.cuts(request.sampling)
        self.session_id = secrets.token_hex(16)
        self.ended: Ended | None = None
        self.reward: float | None = None
        self.trajectories = Trajectories()
        self.calls = self.cut = self.repaired = 0
        self.running: set[str] = set()  # ids of requests to the engine
        self.recording = True  # False when its record has been given away, or dropped
        self._stopped = False
        self._admitted = 0
        self._reserved = 0  # tokens that calls under way may add
        self._given_back = asyncio.Event()
        self._opened_at = time.monotonic()
        self._hold: SessionHold | None = proxy.hold(request, self.end)
        self.run = self._hold.run if self._hold else None
        self.version: WeightVersion | None = self._hold.version if self._hold else None
        if self._hold is not None and request.follow:
            self._hold.release()
            self._hold = None
        self._limit = asyncio.get_running_loop().call_later(request.max_seconds, self.end, "max_seconds")

    @property
    def tokens(self) -> int:
        """How many token ids it keeps: of its trajectories, and of the sampling that was asked for."""
        return _listed(self.request) + self.trajectories.tokens

    def check_open(self) -> None:
        """Raise `session_ended` if no call is taken any more."""
        if self.ended is None and self.run is not None:
            finished = self.run.finished
            if self.run.closed or (finished is not None and finished.at > self._opened_at):
                self.end("run_ended")
        if self.ended is not None:
            raise SessionEnded(f"session {self.session_id} takes no more calls: {_WHY_ENDED[self.ended]}")

    def check_call(self, document: dict[str, Any]) -> None:
        """Check the body of a call; raises `invalid_request` with the field that a session does not take."""
        for name, why in _REFUSED.items():
            if document.get(name):
                raise InvalidRequest(f"{name} cannot be used in a session: {why}; leave it out")
        if self.request.on_conflict == "override":
            return
        for name in (*TRAINERS_FIELDS, "min_tokens"):
            asked, own = document.get(name), getattr(self.request.sampling, name)
            if asked is not None and _plain(name, asked) != _plain(name, own):
                raise InvalidRequest(
                    f"{name}={json.dumps(asked):.200} contradicts the sampling of the session, whose trainer asks for "
                    f"{json.dumps(own):.200}; leave it out"
                )

    def admit(self) -> Admission:
        """Bind a call to the version that it samples from.

        Raises:
            LockstepError: `session_ended`, `version_not_active`, `base_not_served`, `unknown_run`.
        """
        self.check_open()
        if self._admitted >= self.request.max_calls:
            self.end("max_calls")
            self.check_open()
        if self._hold is not None:
            return self._proxy.admit_held(self._hold)
        if self.run is None:
            return self._proxy.admit(PolicyRequest(policy="base"))
        return self._proxy.admit(PolicyRequest(run_id=self.run.run_id))

    async def generate(
        self, admission: Admission, prompt: Any, sampling_params: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the engine's outputs as the client asked for them, and record the call when it has ended.

        Raises:
            LockstepError: as `Admission.generate`; `session_ended`, `overloaded`.
        """
        from vllm.sampling_params import RequestOutputKind

        call, request_id = self._admitted, f"session-{uuid.uuid4().hex}"
        self._admitted += 1
        self.running.add(request_id)
        own_logprobs, recorded, reserved = sampling_params.logprobs is None, False, 0
        try:
            params = overridden(sampling_params, self.request.sampling, self.session_id, truncated=self._truncated)
            asked = _token_ids(prompt)
            token_ids = await self._continued(asked)
            reserved = await self._reserve(token_ids, params)
            await admission.settled()
            self._check_going_on()
            recording = Recording(params.output_kind is RequestOutputKind.DELTA, self._truncated)
            own_prompt = {**prompt, "prompt_token_ids": token_ids.tolist()}
            async with aclosing(admission.generate(own_prompt, params, request_id, **kwargs)) as outputs:
                async for output in outputs:
                    self._check_going_on()
                    recording.see(output.outputs)
                    if own_logprobs:
                        for each in output.outputs:
                            each.logprobs = None
                    if output.finished:  # before the client has it, and may ask for the record
                        recorded = self._record(call, asked, token_ids, recording, admission, request_id)
                        reserved = self._give_back(reserved)
                        self.repaired += recorded and token_ids != asked
                        self._sessions.counts.repaired += recorded and token_ids != asked
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            if not recorded:
                self.cut += 1
                self._sessions.counts.cut += 1
            raise
        finally:
            self.running.discard(request_id)
            self._give_back(reserved)

    def _check_going_on(self) -> None:
        """Raise `session_ended` if calls under way end, too."""
        if self._stopped:
            self.check_open()

    async def _continued(self, asked: array[int]) -> array[int]:
        """Return the prompt on recorded ids, where it has the text of a trajectory and other ids."""
        context: int = self._proxy.model_config.max_model_len
        as_before = self.trajectories.as_before(asked)
        if len(as_before) >= context:
            as_before = asked
        if self.trajectories.match(as_before) is not None or not (similar := self.trajectories.similar(as_before)):
            return as_before
        recorded = [token_ids[:] for token_ids in similar]  # others may go on with them meanwhile
        tokenizer = self._proxy.turn_tokenizer or self._proxy.get_tokenizer()

        def decode(token_ids: list[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        built = await in_turn(continued, as_before, recorded, decode)
        return as_before if built is None or len(built) >= context else built

    async def _reserve(self, prompt: array[int], params: Any) -> int:
        """Return how many tokens a call may add, and keep room for them; wait for calls under way that may need it."""
        while True:
            needed = self.trajectories.needed(prompt, params.n)
            held = self.trajectories.tokens + needed
            if held > self.request.max_tokens:
                self.end("max_tokens")
                self.check_open()
            if held + self._reserved <= self.request.max_tokens:
                break
            self._given_back.clear()
            await self._given_back.wait()
            self._check_going_on()
        context: int = self._proxy.model_config.max_model_len
        reserved = needed + params.n * max(min(params.max_tokens or context, context - len(prompt)), 0)
        self._sessions.reserve(reserved)
        self._reserved += reserved
        return reserved

    def _give_back(self, reserved: int) -> int:
        """Let other calls have what one had reserved; return what it still has."""
        self._reserved -= reserved
        self._sessions.reserved -= reserved
        self._given_back.set()
        return 0

    def _record(
        self,
        call: int,
        asked: array[int],
        prompt: array[int],
        recording: Recording,
        admission: Admission,
        request_id: str,
    ) -> bool:
        choices = recording.choices(admission, request_id)
        if choices is None or not self.recording:
            return False
        before = self.trajectories.tokens
        forks = self.trajectories.add(call, prompt, choices, asked)
        self.calls += 1
        self._sessions.count_call(self.trajectories.tokens - before, forks)
        return True

    def end(self, reason: Ended) -> None:
        """Take no more calls; after its time, those under way end as well. Only the first reason counts."""
        if self.ended is not None:
            return
        self.ended = reason
        self._limit.cancel()
        if self._hold is not None:
            self._hold.release()
        if reason == "max_seconds":
            self._stop()
        self._sessions.see_end(self)

    def delete(self) -> None:
        """End it, and its calls under way; its record does not change any more."""
        self.end("deleted")
        self.recording = False
        self._stop()

    def _stop(self) -> None:
        if self.running and not self._stopped:
            self._sessions.abort(self._proxy, sorted(self.running))
        self._stopped = True
        self._given_back.set()

    def set_reward(self, reward: float) -> None:
        """Set its reward; raises `session_ended` when its record has been given away."""
        if not self.recording:
            raise SessionEnded(f"session {self.session_id} has been deleted: its reward is not read any more")
        self.reward = reward

    def snapshot(self) -> Callable[[], SessionRecord]:
        """Copy what is recorded so far; the function that is returned makes the record of it, on any thread."""
        with contextlib.suppress(SessionEnded):
            self.check_open()
        branches = [branch.copy() for branch in self.trajectories.branches]
        fields = {
            "session_id": self.session_id,
            "run_id": self.run.run_id if self.run else None,
            "ended": self.ended,
            "calls": self.calls,
            "running": len(self.running),
            "cut": self.cut,
            "repaired": self.repaired,
            "reward": self.reward,
            "metadata": self.request.metadata,
        }
        return lambda: _made(fields, branches, truncated=self._truncated)


class Sessions:
    """All sessions of this server, in bounded memory."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._known: dict[str, RecordedSession] = {}
        self._digests: dict[str, bytes] = {}
        self._ended = OrderedDict[str, asyncio.TimerHandle]()  # that are kept to be read
        self._deleted = OrderedDict[str, None]()
        self._aborts = set[asyncio.Future[None]]()
        self.tokens = 0  # that all of them hold
        self.reserved = 0  # that calls under way may add
        self.counts = Counts()

    @property
    def open_sessions(self) -> int:
        """How many take calls."""
        return len(self._known) - len(self._ended)

    async def open(self, request: SessionRequest, proxy: EngineProxy) -> SessionOpened:
        """Open a session on the version that serves the request.

        Raises:
            LockstepError: `overloaded`, `too_large`; `invalid_request` where vLLM would refuse the sampling of every
                call; and as `EngineProxy.reached` and `EngineProxy.admit`.
        """
        self._check_count()
        # The rest is the client's, call by call.
        sampling = request.sampling.model_copy(update={"n": 1, "stop": [], "structured_outputs": None})
        params = to_vllm(sampling)
        if _listed(request) or sampling.bad_words:
            await in_turn(check_vocabulary, params, proxy.model_config, proxy.turn_tokenizer)
        await proxy.reached(request)
        await proxy.runs.admitting()
        proxy.capacity.check(0)
        self._check_count()
        listed = _listed(request)
        self.reserve(listed)
        try:
            session = RecordedSession(request, self, proxy)
        finally:
            self.reserved -= listed
        self.tokens += listed
        token = f"{_TOKEN}-{session.session_id}-{secrets.token_hex(16)}"
        self._known[session.session_id] = session
        self._digests[session.session_id] = _digest(token.encode())
        self.counts.opened += 1
        path = f"{wire.SESSION.format(session_id=session.session_id)}/v1"
        return SessionOpened(session_id=session.session_id, token=token, path=path, version=session.version)

    def get(self, session_id: str) -> RecordedSession:
        """Return the session of that id; raises `unknown_session`."""
        session = self._known.get(session_id)
        if session is None:
            raise UnknownSession(
                f"there is no session {session_id!r:.100} here: its record has expired, or the server has restarted; "
                "run the episode again"
            )
        return session

    def of_token(self, presented: bytes) -> RecordedSession | None:
        """Return the session that a token opens; None if it is no session's. Raises `unknown_session`."""
        if not is_session_token(presented):
            return None
        session_id = presented.removeprefix(_TOKEN.encode() + b"-").partition(b"-")[0].decode("latin-1")
        if not hmac.compare_digest(self._digests.get(session_id, b""), _digest(presented)):
            raise UnknownSession(
                "this session's token is not known here: its record has expired, or the server restarted"
            )
        return self._known[session_id]

    def delete(self, session_id: str) -> RecordedSession:
        """End a session; its record can be asked for again for a while."""
        session = self.get(session_id)
        session.delete()
        if session_id not in self._deleted:
            self._deleted[session_id] = None
            self._keep(session_id, _DELETED_SECONDS)
            while len(self._deleted) > _DELETED_KEPT:
                self.forget(next(iter(self._deleted)))
        return session

    def see_end(self, session: RecordedSession) -> None:
        """Keep the record of a session that has ended, for a while, and of no more than may be open."""
        self._keep(session.session_id, _RECORD_SECONDS)
        while len(self._ended) > self._settings.max_sessions:
            self.forget(next(iter(self._ended)))

    def _keep(self, session_id: str, seconds: float) -> None:
        if (before := self._ended.pop(session_id, None)) is not None:
            before.cancel()
        self._ended[session_id] = asyncio.get_running_loop().call_later(seconds, self.forget, session_id)

    def forget(self, session_id: str) -> None:
        """Drop the record of a session that has ended."""
        self._ended.pop(session_id).cancel()
        self._deleted.pop(session_id, None)
        self._digests.pop(session_id, None)
        session = self._known.pop(session_id)
        session.recording = False
        self.tokens -= session.tokens

    def count_call(self, tokens: int, forks: int) -> None:
        """Count a call that was recorded."""
        self.tokens += tokens
        self.counts.calls += 1
        self.counts.forks += forks

    def reserve(self, tokens: int) -> None:
        """Keep room for so many tokens more, that of records that were deleted, then of others of sessions that have
        ended, the oldest first. Where all of them would not do, none is dropped.

        Raises:
            LockstepError: `overloaded`; `too_large` where there could never be room.
        """
        most = self._settings.max_session_tokens
        if tokens > most:
            raise too_large(f"{tokens} tokens of a session, given and asked for", "--max-session-tokens", most)
        limit = most - self.reserved - tokens
        ended = sum(self._known[session_id].tokens for session_id in self._ended) if self.tokens > limit else 0
        while self.tokens > limit >= self.tokens - ended:
            oldest = next(iter(self._deleted or self._ended))
            ended -= self._known[oldest].tokens
            self.forget(oldest)
        if self.tokens > limit:
            raise Overloaded(
                f"the sessions of this server hold {self.tokens} tokens, and calls under way may add {self.reserved}; "
                f"{tokens} more would go beyond --max-session-tokens {self._settings.max_session_tokens}: read and "
                "delete sessions whose episodes have ended, and ask for fewer max_tokens"
            )
        self.reserved += tokens

    def _check_count(self) -> None:
        limit = self._settings.max_sessions
        if self.open_sessions >= limit:
            raise Overloaded(
                f"{self.open_sessions} sessions are open, as many as --max-sessions allows; delete those whose "
                "episodes have ended, and ask again after the seconds of Retry-After"
            )

    def abort(self, proxy: EngineProxy, request_ids: list[str]) -> None:
        """End requests in the engine."""
        abort = asyncio.ensure_future(proxy.abort(request_ids))
        self._aborts.add(abort)
        abort.add_done_callback(self._aborts.discard)


def is_session_token(presented: bytes) -> bool:
    """Return whether a token is a session's, of whichever server."""
    return presented.startswith(_TOKEN.encode() + b"-")


def _made(fields: dict[str, Any], branches: list[Branch], *, truncated: bool) -> SessionRecord:
    return SessionRecord(**fields, trajectories=[branch.trajectory(truncated=truncated) for branch in branches])


def _listed(request: SessionRequest) -> int:
    """Return how many token ids the sampling of a session lists."""
    sampling = request.sampling
    return sum(len(ids or ()) for ids in (sampling.stop_token_ids, sampling.allowed_token_ids, sampling.logit_bias))


def _token_ids(prompt: Any) -> array[int]:
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if token_ids is None or prompt.get("type") == "multimodal":  # a record holds no images
        raise InvalidRequest("a session takes prompts of text or token ids only")
    try:
        return array("I", token_ids)
    except OverflowError as error:
        raise InvalidRequest(f"the prompt holds a token id outside the vocabulary: {error}") from error


def _plain(name: str, value: Any) -> Any:
    """Return a sampling parameter in one form: keys of `logit_bias` as in JSON, None for what changes nothing."""
    if not value or (name == "top_k" and value == -1):
        return None
    return {str(key): inner for key, inner in value.items()} if isinstance(value, dict) else value


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
