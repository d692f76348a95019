"""Answers that several clients join, that outlive a client, and that are forgotten in time."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from rollout_server.api.idempotency import Answer, Answers
from rollout_server.api.routes.generate import _lines
from rollout_server.api.streaming import Ndjson
from rollout_server.settings import ServerSettings
from shared.errors import ErrorCode, LockstepError, UnknownRun
from shared.rollouts import GenerateRequest, Prompt, RolloutGroup

SETTINGS = replace(ServerSettings(), orphan_seconds=0.8, idempotency_ttl=1.0)
BODY = GenerateRequest(prompts=[Prompt(token_ids=[1]), Prompt(token_ids=[2])])


class _Work:
    """Two groups, the second one first; counts how often it was begun and how much of it was cancelled."""

    def __init__(self, error: LockstepError | None = None, tokens: int = 1) -> None:
        self.begun = self.cancelled = 0
        self.error, self.tokens = error, tokens
        self.release = asyncio.Event()

    async def start(self) -> list[asyncio.Future[RolloutGroup]]:
        self.begun += 1
        if self.error:
            raise self.error
        return [asyncio.ensure_future(self._group(index)) for index in (0, 1)]

    async def _group(self, index: int) -> RolloutGroup:
        try:
            if index == 0:
                await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return RolloutGroup(prompt_index=index, prompt_token_ids=[index] * self.tokens, completions=[])


@pytest.fixture
def answers() -> Answers:
    return Answers(SETTINGS)


async def _read(answer: Answer) -> list[bytes]:
    answer.join()
    try:
        return await answer.groups()
    finally:
        answer.leave()


async def test_a_second_request_joins_the_first(answers: Answers) -> None:
    work = _Work()
    first = answers.open(work.start, BODY, "me", "k")
    second = answers.open(work.start, BODY.model_copy(update={"stream": True}), "me", "k")
    assert second is first
    first.join()
    lines = first.lines()
    early = await anext(lines)
    reading = asyncio.ensure_future(_read(second))
    work.release.set()
    late = await anext(lines)
    assert await reading == [late, early], "in the order of the prompts"
    first.leave()
    assert await _read(answers.open(work.start, BODY, "me", "k")) == [late, early]
    assert work.begun == 1
    assert answers.open(work.start, BODY, "you", "k") is not first, "keys are each caller's own"
    assert answers.open(work.start, BODY) is not first
    with pytest.raises(LockstepError) as conflict:
        answers.open(work.start, BODY.model_copy(update={"policy": "base"}), "me", "k")
    assert conflict.value.code is ErrorCode.IDEMPOTENCY_CONFLICT
    assert conflict.value.status == 409
    await asyncio.sleep(1.3)
    assert answers.open(work.start, BODY, "me", "k") is not first, "its time to live has passed"


async def test_a_stream_is_never_silent_for_long(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_server.api.idempotency.HEARTBEAT_SECONDS", 0.02)
    work = _Work()
    answer = answers.open(work.start, BODY)
    answer.join()
    lines = answer.lines()
    assert await anext(lines)
    assert await anext(lines) == b"" == await anext(lines)
    work.release.set()
    assert b"prompt_index" in await anext(lines)
    answer.leave()


async def test_a_failed_request_is_not_kept(answers: Answers) -> None:
    work = _Work(error=UnknownRun("no such run"))
    for begun in (1, 2):
        with pytest.raises(LockstepError, match="no such run"):
            await _read(answers.open(work.start, BODY, "", "k"))
        assert work.begun == begun
    answer = answers.open(work.start, BODY)
    with pytest.raises(LockstepError, match="no such run"):
        await answer.started()


async def test_without_a_key_work_ends_with_its_client(answers: Answers) -> None:
    work = _Work()
    answer = answers.open(work.start, BODY)
    answer.join()
    await answer.started()
    answer.leave()
    await asyncio.sleep(0.02)
    assert answer.task.done()
    assert work.cancelled == 1
    at_once = answers.open(work.start, BODY)
    at_once.join()
    at_once.leave()
    with pytest.raises(LockstepError, match="no client"):
        await at_once.groups()
    assert work.begun == 1, "it was ended before it began"


async def test_with_a_key_it_waits_for_another_try(answers: Answers) -> None:
    work = _Work()
    answer = answers.open(work.start, BODY, "", "k")
    answer.join()
    await answer.started()
    for _ in range(3):  # a client that comes back in time
        answer.leave()
        await asyncio.sleep(0.35)  # thrice that is longer than an orphan lives
        answer.join()
    assert not answer.task.done()
    answer.leave()
    await asyncio.sleep(1.2)
    assert work.cancelled == 1
    assert answers.open(work.start, BODY, "", "k") is not answer


async def test_kept_answers_are_bounded() -> None:
    answers, work = Answers(replace(SETTINGS, idempotency_mib=1, idempotency_ttl=60.0)), _Work(tokens=120_000)
    work.release.set()
    for index in range(4):  # of half a MiB each
        await _read(answers.open(work.start, BODY, "", f"k{index}"))
    known = [key for _, key in answers._keyed]
    assert known == ["k2", "k3"] == [key for _, key in answers._kept]
    large = _Work(tokens=300_000)
    large.release.set()
    await _read(answers.open(large.start, BODY, "", "large"))
    assert not answers._keyed, "one that is larger than all the room is not kept at all"


async def test_a_stream_that_is_never_read_ends_its_work(answers: Answers) -> None:
    """The client is gone when the response begins, so its body is cancelled before the first line."""
    work = _Work()
    answer = answers.open(work.start, BODY)
    answer.join()
    await answer.started()
    stream = Ndjson(_lines(answer, "epoch"), answer.leave)

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        await asyncio.Event().wait()

    with contextlib.suppress(asyncio.CancelledError):
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    await asyncio.sleep(0.02)
    assert work.cancelled == 1
    assert answer.task.done()
