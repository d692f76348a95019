"""Sessions: the version they hold, their limits, and their ends."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

import pytest

from rollout_server.runs import slots
from rollout_server.sessions import records
from rollout_server.sessions.records import RecordedSession
from shared.errors import (
    LockstepError,
    NoFreeSlot,
    Overloaded,
    SessionEnded,
    UnknownSession,
    VersionNotActive,
)
from shared.sessions import SessionRequest
from tests.unit.rollout_server.sessions.conversing import Served, record_of


def _steps(session: RecordedSession) -> list[list[int]]:
    return [[span.version.step for span in each.spans if span.version] for each in record_of(session).trajectories]


async def test_a_session_keeps_its_version_until_it_ends(served: Served) -> None:
    session = await served.open()
    await served.flip(1)
    await served.call(session, [1])
    assert _steps(session) == [[0]]
    push = asyncio.ensure_future(served.flip(2))
    await asyncio.sleep(0)
    served.sessions.delete(session.session_id)
    await push
    assert served.run.active is not None
    assert not served.run.active.held


async def test_a_session_between_two_calls_gives_way_to_a_push_that_cannot_wait_longer(served: Served) -> None:
    sessions = [await served.open() for _ in range(2)]
    await served.flip(1)
    newer = await served.open()
    await served.flip(2, seconds=0.01)
    assert [record_of(session).ended for session in (*sessions, newer)] == ["superseded", "superseded", None]
    with pytest.raises(SessionEnded, match="a push needed its slot"):
        await served.call(sessions[0], [1])


async def test_a_session_with_a_call_under_way_gives_way_when_that_has_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_PATIENCE", 0.0)
    session = await served.open()
    await served.flip(1)
    call = await _under_way(served, session)
    with pytest.raises(NoFreeSlot, match="1 requests, 1 sessions"):
        await served.flip(2, seconds=0.01)
    assert record_of(session).ended is None
    push = asyncio.ensure_future(served.flip(2))
    assert served.engine.gate is not None
    served.engine.gate.set()
    await asyncio.gather(call, push)
    assert (record_of(session).ended, record_of(session).calls) == ("superseded", 1)


async def test_a_session_that_follows_goes_on_with_the_newest(served: Served) -> None:
    session = await served.open(follow=True)
    prompt = [1]
    for step in (1, 2, 3):
        await served.flip(step)
        await served.call(session, prompt)
        prompt = record_of(session).trajectories[0].token_ids
    assert _steps(session) == [[1, 2, 3]]


async def test_a_push_that_moves_requests_moves_sessions(served: Served) -> None:
    session = await served.open()
    version = session.version
    assert version is not None
    newer = version.model_copy(update={"step": 5})
    served.run.move(newer, served.table.next_install_seq(), "sum", {}, "fresh")
    await served.call(session, [1])
    assert _steps(session) == [[5]]


async def test_weights_that_change_in_place_refuse_what_began_before() -> None:
    """--apply merge."""
    served = Served(merged=True)
    await served.flip(0)
    session, following = await served.open(), await served.open(follow=True)
    await served.flip(1)
    with pytest.raises(VersionNotActive, match="--apply merge"):
        await served.call(session, [1])
    await served.call(following, [1])
    assert _steps(following) == [[1]]


async def test_the_base(served: Served) -> None:
    session = await served.open(policy="base")
    await served.flip(1)
    await served.call(session, [1])
    (trajectory,) = record_of(session).trajectories
    assert [span.version for span in trajectory.spans] == [None]
    assert record_of(session).run_id is None


@pytest.mark.parametrize("follow", [False, True])
async def test_a_run_that_ends_ends_its_sessions(served: Served, follow: bool) -> None:
    finished, closed = await served.open(follow=follow), await served.open(follow=follow)
    served.run.finished = None
    version = finished.version
    assert version is not None
    served.table.finish("r", "lease", version, 60.0)
    with pytest.raises(SessionEnded, match="run has ended"):
        await served.call(finished, [1])
    later = await served.open(follow=follow)  # a finished run is served on
    await served.call(later, [1])
    served.table.close("r")
    for session in (later, closed):
        assert record_of(session).ended == "run_ended"
    assert not any(slot.held for slot in served.run.slots)


async def test_a_learner_that_starts_again_is_not_kept_waiting(served: Served) -> None:
    """Nobody will end the sessions of the one before."""
    session = await served.open()
    for step in range(1, 4):
        await served.flip(step, fence=1)
    assert record_of(session).ended == "run_ended"


async def test_limits_end_a_session(served: Served) -> None:
    by_calls = await served.open(max_calls=2)
    for _ in range(2):
        await served.call(by_calls, [1])
    with pytest.raises(SessionEnded, match="max_calls"):
        await served.call(by_calls, [1])
    assert (record_of(by_calls).ended, record_of(by_calls).calls) == ("max_calls", 2)
    by_tokens = await served.open(max_tokens=20)
    await served.call(by_tokens, [1] * 15)
    with pytest.raises(SessionEnded, match="max_tokens"):
        await served.call(by_tokens, [2] * 15)
    assert record_of(by_tokens).ended == "max_tokens"
    assert not any(slot.sessions for slot in served.run.slots)


async def _under_way(served: Served, session: RecordedSession) -> asyncio.Future[Any]:
    """Begin a call that the engine does not answer; return when it has it."""
    served.engine.gate = asyncio.Event()
    call = asyncio.ensure_future(served.call(session, [1]))
    await served.engine.began.wait()
    return call


async def _until_running(session: RecordedSession, calls: int) -> None:
    while len(session.running) < calls:  # noqa: ASYNC110 - what is waited for is the session's
        await asyncio.sleep(0)


async def test_time_ends_a_session_and_its_calls(served: Served) -> None:
    session = await served.open(max_seconds=0.01)
    call = await _under_way(served, session)
    (request_id,) = session.running
    await served.engine.stopped.wait()
    assert served.engine.aborted == [request_id]
    assert served.engine.gate is not None
    served.engine.gate.set()
    with pytest.raises(SessionEnded, match="max_seconds"):
        await call
    assert (record_of(session).ended, record_of(session).calls, record_of(session).running) == ("max_seconds", 0, 0)


async def test_a_client_that_goes_away_is_cut(served: Served) -> None:
    session = await served.open()
    call = await _under_way(served, session)
    assert record_of(session).running == 1
    call.cancel()
    await asyncio.wait({call})
    record = record_of(session)
    assert (record.calls, record.cut, record.running, record.trajectories) == (0, 1, 0, [])
    served.engine.gate = None
    await served.call(session, [1])
    assert record_of(session).trajectories[0].calls == [1]
    assert served.run.active is not None
    assert served.run.active.requests == 0


async def test_a_record_is_there_before_the_client_has_its_answer(served: Served) -> None:
    session = await served.open()
    stream = served.stream(session, [1])
    await anext(stream)
    assert record_of(session).calls == 1
    await stream.aclose()
    assert record_of(session).cut == 0


async def test_a_deleted_record_can_be_asked_for_again_and_does_not_change(served: Served) -> None:
    session = await served.open(metadata={"row": "7"})
    await served.call(session, [1])
    call = await _under_way(served, session)
    first = record_of(served.sessions.delete(session.session_id))
    assert served.engine.gate is not None
    served.engine.gate.set()
    with pytest.raises(SessionEnded):
        await call
    again = record_of(served.sessions.delete(session.session_id))
    assert again == first.model_copy(update={"running": 0})
    assert (first.ended, first.metadata) == ("deleted", {"row": "7"})
    with pytest.raises(SessionEnded):
        session.set_reward(1.0)


async def test_a_call_whose_session_is_deleted_before_the_engine_has_it_is_not_begun(served: Served) -> None:
    session = await served.open()
    served.run.not_moving.clear()
    call = asyncio.ensure_future(served.call(session, [1]))
    await _until_running(session, 1)
    served.sessions.delete(session.session_id)
    served.run.not_moving.set()
    with pytest.raises(SessionEnded):
        await call
    assert not served.engine.asked


async def test_a_call_whose_session_is_deleted_while_its_text_is_compared_is_not_begun(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await served.open()
    compare = session._continued

    async def delete_meanwhile(asked: Any) -> Any:
        served.sessions.delete(session.session_id)
        return await compare(asked)

    monkeypatch.setattr(session, "_continued", delete_meanwhile)
    with pytest.raises(SessionEnded):
        await served.call(session, [1])
    assert not served.engine.asked


async def test_rewards(served: Served) -> None:
    session = await served.open(max_calls=1)
    session.set_reward(0.5)
    session.end("max_calls")
    session.set_reward(1.0)
    assert record_of(session).reward == 1.0


async def test_all_sessions_together_are_bounded() -> None:
    served = Served(max_sessions=2, max_session_tokens=100)
    await served.flip(0)
    one, two = await served.open(), await served.open()
    with pytest.raises(Overloaded, match="--max-sessions"):
        await served.open()
    await served.call(one, [1] * 80)
    with pytest.raises(Overloaded, match="--max-session-tokens"):
        await served.call(two, [1] * 40)
    served.sessions.delete(one.session_id)
    await served.call(two, [1] * 40)
    with pytest.raises(UnknownSession):  # its record made room
        served.sessions.get(one.session_id)
    await served.open()


async def test_a_call_for_which_there_is_no_room_drops_norecord_of() -> None:
    """Others have not read them yet."""
    served = Served(max_session_tokens=100)
    await served.flip(0)
    ended, deleted, going_on = [await served.open() for _ in range(3)]
    for session in (ended, deleted, going_on):
        await served.call(session, [1] * 25)
    ended.end("max_seconds")
    served.sessions.delete(deleted.session_id)
    with pytest.raises(LockstepError, match="--max-session-tokens 100") as refusal:
        await served.call(going_on, [1] * 25, n=50)
    assert refusal.value.status == 413
    with pytest.raises(Overloaded):  # its own 25 tokens stay
        await served.call(going_on, [1] * 25, n=3)
    assert record_of(served.sessions.get(ended.session_id)).calls == 1
    assert served.sessions.get(deleted.session_id).tokens == deleted.trajectories.tokens
    await served.call(going_on, [1] * 25, n=1)
    with pytest.raises(UnknownSession):
        served.sessions.get(deleted.session_id)
    assert record_of(served.sessions.get(ended.session_id)).calls == 1
    assert served.sessions.reserved == 0


async def test_the_ids_that_a_sampling_lists_count_as_tokens() -> None:
    served = Served(max_session_tokens=100)
    await served.flip(0)
    one = await served.open(sampling={"allowed_token_ids": list(range(60)), "max_tokens": 6})
    listed = {"allowed_token_ids": [4], "logit_bias": dict.fromkeys(range(60), 1.0), "max_tokens": 6}
    with pytest.raises(Overloaded, match="hold 60 tokens"):
        await served.open(sampling=listed)
    served.sessions.delete(one.session_id)
    two = await served.open(sampling=listed)
    await served.call(two, [5] * 8)
    assert served.sessions.tokens == 61 + two.trajectories.tokens
    served.sessions.delete(two.session_id)
    served.sessions.forget(two.session_id)
    assert (served.sessions.tokens, served.sessions.reserved) == (0, 0)


async def test_calls_side_by_side_do_not_go_beyond_the_tokens_of_their_session(served: Served) -> None:
    session = await served.open(max_tokens=100)
    calls = [served.call(session, [3 + number] * 15) for number in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert {type(answer) for answer in refused} == {SessionEnded}
    assert len(refused) == 20 - record_of(session).calls
    assert 80 < session.trajectories.tokens <= 100 + 6
    assert record_of(session).ended == "max_tokens"
    assert served.sessions.reserved == 0


async def test_a_call_that_waits_for_room_ends_with_its_session(served: Served) -> None:
    session = await served.open(max_tokens=20)
    calls = [await _under_way(served, session)]
    calls.append(asyncio.ensure_future(served.call(session, [5] * 15)))
    await _until_running(session, 2)
    served.sessions.delete(session.session_id)
    with pytest.raises(SessionEnded):
        await calls[1]
    assert served.engine.gate is not None
    served.engine.gate.set()
    await asyncio.wait(calls)
    assert served.sessions.reserved == 0


async def test_calls_under_way_count_for_all_sessions_together() -> None:
    served = Served(max_session_tokens=100)
    await served.flip(0)
    one, two = await served.open(), await served.open()
    served.engine.gate = asyncio.Event()
    call = asyncio.ensure_future(served.call(one, [1] * 60, max_tokens=30))
    await served.engine.began.wait()
    with pytest.raises(Overloaded, match="calls under way may add 90"):
        await served.call(two, [1] * 8)
    served.engine.gate.set()
    await call
    await served.call(two, [1] * 8, max_tokens=2)
    assert served.sessions.reserved == 0


async def test_records_of_sessions_that_have_ended_are_as_few_as_may_be_open() -> None:
    served = Served(max_sessions=3)
    await served.flip(0)
    ids = []
    for _ in range(10):
        session = await served.open()
        session.end("max_seconds")
        ids.append(session.session_id)
    for session_id in ids[:-3]:
        with pytest.raises(UnknownSession):
            served.sessions.get(session_id)
    assert [record_of(served.sessions.get(session_id)).ended for session_id in ids[-3:]] == ["max_seconds"] * 3
    assert served.sessions.open_sessions == 0


async def test_records_of_sessions_that_have_ended_make_room_after_those_that_were_deleted() -> None:
    served = Served(max_session_tokens=200)
    await served.flip(0)
    ended, deleted, open_ = [await served.open() for _ in range(3)]
    for session in (ended, deleted):
        await served.call(session, [1] * 60)
    ended.end("max_calls")
    served.sessions.delete(deleted.session_id)
    for length, kept in ((80, [ended]), (60, [])):
        await served.call(open_, [length] * length)
        assert [session for session in (ended, deleted) if session.recording] == kept


def test_metadata_is_bounded_as_a_whole() -> None:
    SessionRequest(metadata={"row": "x" * 1024})
    with pytest.raises(ValueError, match="16 KiB"):
        SessionRequest(metadata={str(number): "x" * 1024 for number in range(16)})


async def test_records_expire(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_RECORD_SECONDS", 0.0)
    session = await served.open()
    await served.call(session, [1])
    session.end("max_calls")
    for _ in range(3):
        await asyncio.sleep(0)
    with pytest.raises(UnknownSession):
        served.sessions.get(session.session_id)
    assert served.sessions.tokens == served.sessions.open_sessions == 0


async def test_a_token_opens_its_session_only(served: Served) -> None:
    tokens = [(await served.sessions.open(SessionRequest(), served.proxy)).token.encode() for _ in range(2)]
    ids = [session.session_id for session in map(served.sessions.of_token, tokens) if session]
    assert len(set(ids)) == 2
    assert served.sessions.of_token(b"sk-something-else") is None
    one, two = tokens
    swapped = one[: one.rindex(b"-")] + two[two.rindex(b"-") :]
    for wrong in (one[:-1], one + b"x", swapped, b"lockstep-session-", b"lockstep-session-\xff-\xfe"):
        with pytest.raises(UnknownSession):
            served.sessions.of_token(wrong)


async def test_memory_is_flat_after_2000_sessions(served: Served) -> None:
    async def episodes(count: int) -> int:
        for _ in range(count):
            session = await served.open()
            await served.call(session, [1] * 200)
            served.sessions.delete(session.session_id)
        served.engine.asked.clear()
        gc.collect()
        return sys.getallocatedblocks()

    before = await episodes(200)
    assert await episodes(1800) - before < 1000
    assert served.sessions.open_sessions == 0
