"""An engine that samples at random and remembers it, a served run, and calls as vLLM's routes make them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.sampling_params import RequestOutputKind

from rollout_server.engine.proxy import CALL_CONTEXT, CallContext, EngineProxy
from rollout_server.runs.table import RunTable
from rollout_server.sessions.records import RecordedSession, Sessions
from rollout_server.settings import ServerSettings
from shared.sessions import SessionRecord, SessionRequest
from shared.weights import WeightVersion
from tests.support.runs import open_run
from tests.support.tiny_model import make_tiny_tokenizer

EOS = 2
TOKENIZER = make_tiny_tokenizer()


@dataclass
class Asked:
    """One request as it reached the engine, and what was sampled for it: by choice, token ids."""

    prompt: list[int]
    params: Any
    sampled: dict[int, list[int]] = field(default_factory=dict)


def logprob(request: int, choice: int, position: int) -> float:
    """Return the logprob of a sampled token, unlike that of any other."""
    return -(request + choice / 8 + position / 1024)


class SamplingEngine:
    """Samples up to 6 tokens, of which the last one may be EOS; `gate` holds all of them back."""

    errored = False
    model_config = SimpleNamespace(max_model_len=4096, get_vocab_size=lambda: len(TOKENIZER))

    def __init__(self, seed: int = 0) -> None:
        self.asked: list[Asked] = []
        self.aborted: list[str] = []
        self.gate: asyncio.Event | None = None
        self.began, self.stopped = asyncio.Event(), asyncio.Event()
        self._random = random.Random(seed)

    def get_tokenizer(self) -> Any:
        return TOKENIZER

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.stopped.set()

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncGenerator[Any, None]:
        asked = Asked(list(prompt["prompt_token_ids"]), params)
        self.asked.append(asked)
        number, draw = len(self.asked) - 1, self._random
        allowed = params.allowed_token_ids or range(3, len(TOKENIZER))
        for choice in range(params.n):
            ids = [draw.choice(allowed) for _ in range(draw.randint(1, params.max_tokens or 6))]
            ends = draw.random() < 0.5 and params.allowed_token_ids is None
            asked.sampled[choice] = [*ids[:-1], EOS] if ends else ids
        await asyncio.sleep(0)
        if self.gate is not None:
            self.began.set()
            await self.gate.wait()
        if params.output_kind is not RequestOutputKind.DELTA:
            yield _output([_completion(params, number, i, ids, 0, len(ids)) for i, ids in asked.sampled.items()], True)
            return
        pieces = [
            _completion(params, number, choice, ids, at, at + 1)
            for choice, ids in asked.sampled.items()
            for at in range(len(ids))
        ]
        for piece in pieces:
            await asyncio.sleep(0)
            yield _output([piece], piece is pieces[-1])


def _output(completions: list[Any], finished: bool) -> Any:
    return SimpleNamespace(outputs=completions, finished=finished)


def _completion(params: Any, request: int, choice: int, ids: list[int], start: int, end: int) -> Any:
    logprobs: Any = FlatLogprobs() if params.flat_logprobs else []
    for position in range(start, end):
        value = logprob(request, choice, position)
        logprobs.append({ids[position]: Logprob(value, -position, None)})
    ended = ("stop" if ids[-1] == EOS else "length") if end == len(ids) else None
    return SimpleNamespace(
        index=choice,
        token_ids=ids[start:end],
        logprobs=logprobs if params.logprobs is not None else None,
        finish_reason=ended,
        text="",
    )


class Served:
    """A server's proxy and sessions around a `SamplingEngine`, with run `r` at step 0."""

    def __init__(self, seed: int = 0, *, merged: bool = False, **settings: Any) -> None:
        self.engine, self.table = SamplingEngine(seed), RunTable(2, 2 - merged, merged=merged)
        self.settings = ServerSettings(**settings)
        self.proxy: Any = EngineProxy(self.engine, self.table)
        self.sessions = Sessions(self.settings)
        self.run = open_run(self.table)

    async def flip(self, step: int, fence: int = 0, seconds: float = 5.0) -> None:
        """Serve another version, as a push that drains does."""
        version = WeightVersion(run_id="r", fence=fence, step=step)
        slot = self.run.slots[0] if self.table.base else await self.run.reserve(time.monotonic() + seconds, fence)
        self.run.recall(fence)
        self.run.flip(slot, version, self.table.next_install_seq(), "sum")

    async def open(self, **fields: Any) -> RecordedSession:
        """Open a session."""
        opened = await self.sessions.open(SessionRequest.model_validate(fields), self.proxy)
        return self.sessions.get(opened.session_id)

    async def call(self, session: RecordedSession, prompt: list[int], **params: Any) -> list[Any]:
        """Call as a route of vLLM does; return all outputs."""
        return [output async for output in self.stream(session, prompt, **params)]

    async def stream(self, session: RecordedSession, prompt: list[int], **params: Any) -> AsyncGenerator[Any, None]:
        """Call as a route of vLLM does."""
        call = CallContext(session=session)
        token = CALL_CONTEXT.set(call)
        given = {"max_tokens": 6, "output_kind": RequestOutputKind.FINAL_ONLY, **params}
        engine_prompt = {"type": "token", "prompt_token_ids": prompt}
        stream = self.proxy.generate(engine_prompt, SamplingParams(**given), "client's", lora_request=None)
        CALL_CONTEXT.reset(token)
        async with aclosing(stream):
            while True:
                token = CALL_CONTEXT.set(call)
                try:
                    output = await anext(stream)
                except StopAsyncIteration:
                    return
                except Exception:
                    if call.refusal is not None:
                        raise call.refusal from None
                    raise
                finally:
                    CALL_CONTEXT.reset(token)
                yield output


def record_of(session: RecordedSession) -> SessionRecord:
    """Return what has been recorded so far."""
    return session.snapshot()()
