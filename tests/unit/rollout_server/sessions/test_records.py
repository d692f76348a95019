"""Sessions: the version they hold, the sampling they insist on, their limits, and their ends."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rollout_server.generation.vllm_params import overridden
from rollout_server.runs import slots
from rollout_server.sessions import records
from rollout_server.sessions.records import RecordedSession
from rollout_server.vllm_compat import vision
from shared.errors import (
    InvalidRequest,
    LockstepError,
    NoFreeSlot,
    Overloaded,
    SessionEnded,
    UnknownSession,
    VersionNotActive,
)
from shared.sampling import SamplingParams as TrainersSampling
from shared.sessions import SessionRecord, SessionRequest
from tests.support.tiny_model import make_tiny_tokenizer
from tests.unit.rollout_server.sessions.conversing import TOKENIZER, Served


@pytest.fixture
async def served() -> Served:
    made = Served()
    await made.flip(0)
    return made


def _record(session: RecordedSession) -> SessionRecord:
    return session.snapshot()()


def _steps(session: RecordedSession) -> list[list[int]]:
    return [[span.version.step for span in each.spans if span.version] for each in _record(session).trajectories]


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
    assert [_record(session).ended for session in (*sessions, newer)] == ["superseded", "superseded", None]
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
    assert _record(session).ended is None
    push = asyncio.ensure_future(served.flip(2))
    assert served.engine.gate is not None
    served.engine.gate.set()
    await asyncio.gather(call, push)
    assert (_record(session).ended, _record(session).calls) == ("superseded", 1)


async def test_a_session_that_follows_goes_on_with_the_newest(served: Served) -> None:
    session = await served.open(follow=True)
    prompt = [1]
    for step in (1, 2, 3):
        await served.flip(step)
        await served.call(session, prompt)
        prompt = _record(session).trajectories[0].token_ids
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
    (trajectory,) = _record(session).trajectories
    assert [span.version for span in trajectory.spans] == [None]
    assert _record(session).run_id is None


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
        assert _record(session).ended == "run_ended"
    assert not any(slot.held for slot in served.run.slots)


async def test_a_learner_that_starts_again_is_not_kept_waiting(served: Served) -> None:
    """Nobody will end the sessions of the one before."""
    session = await served.open()
    for step in range(1, 4):
        await served.flip(step, fence=1)
    assert _record(session).ended == "run_ended"


def test_the_trainer_samples() -> None:
    trainer = TrainersSampling(
        temperature=0.7, top_p=0.9, max_tokens=20, min_tokens=8, stop_token_ids=[7], logit_bias={3: -5.0}
    )
    client = SamplingParams(
        temperature=0.0, top_k=5, max_tokens=6, n=1, stop=["x"], stop_token_ids=[9], seed=4, presence_penalty=1.0
    )
    params = overridden(client, trainer, "id", truncated=False)
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 0)
    assert (params.max_tokens, params.min_tokens) == (6, 6)
    assert params.stop_token_ids == [9, 7]
    assert params.all_stop_token_ids == {9, 7}
    assert (params.stop, params.presence_penalty) == (["x"], 0.0)
    assert params.logit_bias == {3: -5.0}
    assert params.logprobs == 0
    assert overridden(SamplingParams(max_tokens=50, logprobs=3), trainer, "id", truncated=False).max_tokens == 20
    assert overridden(SamplingParams(max_tokens=50, logprobs=3), trainer, "id", truncated=False).logprobs == 3
    with pytest.raises(InvalidRequest, match="greedy"):
        overridden(SamplingParams(n=2), TrainersSampling(temperature=0.0), "id", truncated=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thinking_token_budget", 5),  # as made of Anthropic's `thinking`
        ("thinking_token_budget", 0),
        ("extra_args", {"a": 1}),
        ("watermarking", False),
        ("logprob_token_ids", [3]),
        ("trace_decode_token_ids", [3]),
    ],
)
def test_what_a_route_may_set_behind_the_trainers_back_is_left_out(name: str, value: Any) -> None:
    params = overridden(
        SamplingParams(**{name: value, "logprobs": 0}), TrainersSampling(max_tokens=None), "id", truncated=False
    )
    assert getattr(params, name) is None


async def test_a_seed_holds_within_its_session(served: Served) -> None:
    one, two = await served.open(), await served.open()
    for session in (one, one, two):
        for seed in (4, 5, 2**63 - 1, None):
            await served.call(session, [1], seed=seed)
    seeds = [asked.params.seed for asked in served.engine.asked]
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 7
    assert seeds[3::4] == [None] * 3
    assert max(seed or 0 for seed in seeds) < 2**62  # vLLM adds the choice's number


def test_a_clients_form_of_outputs_stays() -> None:
    asked = {
        "prompt_logprobs": 2,
        "detokenize": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": True,
        "output_kind": RequestOutputKind.DELTA,
    }
    params = overridden(SamplingParams(**asked), TrainersSampling(max_tokens=None), "id", truncated=False)
    assert {name: getattr(params, name) for name in asked} == asked
    assert params.skip_reading_prefix_cache
    assert not params.flat_logprobs


@pytest.mark.parametrize(
    ("asked", "flat"), [({}, True), ({"logprobs": 3}, True), ({"logprobs": 0}, False), ({"prompt_logprobs": 0}, False)]
)
def test_logprobs_have_text_for_who_reads_it_and_the_ranks_of_what_was_sampled(
    asked: dict[str, int], flat: bool
) -> None:
    """Flat ones of sampled tokens alone have no text; beside others only flat ones keep a sampled token's rank."""
    assert (
        overridden(SamplingParams(**asked), TrainersSampling(max_tokens=None), "id", truncated=False).flat_logprobs
        is flat
    )


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
async def test_logprobs_of_prompts_are_refused_where_they_would_cost_the_kept_mass(
    served: Served, cut: dict[str, Any]
) -> None:
    session = await served.open(sampling={**cut, "max_tokens": None})
    with pytest.raises(InvalidRequest, match="prompt_logprobs"):
        await served.call(session, [1], logprobs=5, prompt_logprobs=0)
    assert not served.engine.asked


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("asked", [None, 0])
async def test_the_client_gets_the_logprobs_that_it_asked_for(served: Served, kind: Any, asked: int | None) -> None:
    session = await served.open()
    outputs = await served.call(session, [1], output_kind=kind, logprobs=asked, n=2)
    given = [each.logprobs is not None for output in outputs for each in output.outputs]
    assert all(given) == any(given) == (asked is not None)
    assert len(_record(session).trajectories) == 2


@pytest.mark.parametrize(("sampling", "sees"), [({"top_p": 0.9}, False), ({}, True)])
async def test_the_kept_mass_is_recorded_where_the_distribution_is_cut(
    served: Served, sampling: dict[str, Any], sees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "check_text", lambda *_: None)  # of the fake engine's model
    served.proxy.media_tokens = [7] if sees else []
    session = await served.open(sampling={**sampling, "max_tokens": None})
    await served.call(session, [1])
    (trajectory,) = _record(session).trajectories
    assert trajectory.log_kept_mass is not None
    assert len(trajectory.log_kept_mass) == len(trajectory.logprobs)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"previous_response_id": "resp_1"}, "complete input"),
        ({"background": True}, "background"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ],
)
async def test_what_cannot_be_recorded_is_refused(served: Served, document: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        (await served.open()).check_call(document)


async def test_other_sampling_is_refused_by_name_where_the_trainer_wants_that(served: Served) -> None:
    sampling = {"temperature": 0.5, "logit_bias": {"3": 1.0}, "max_tokens": None}
    session = await served.open(on_conflict="refuse", sampling=sampling)
    same = {"temperature": 0.5, "top_k": -1, "logit_bias": {"3": 1}, "max_tokens": 9, "n": 4, "presence_penalty": 0}
    session.check_call(json.loads(json.dumps(same)))
    for document in ({"temperature": 0}, {"top_k": 3}, {"logit_bias": {"4": 1}}, {"ignore_eos": True}):
        with pytest.raises(InvalidRequest, match=f"^{next(iter(document))}="):
            session.check_call(document)
        (await served.open()).check_call(document)


async def test_a_penalty_of_minus_one_is_one(served: Served) -> None:
    """Only of top_k it means nothing."""
    session = await served.open(on_conflict="refuse")
    session.check_call({"top_k": -1, "logit_bias": {}, "bad_words": []})
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(InvalidRequest, match=rf"^{name}=-1 .* asks for 0\.0"):
            session.check_call({name: -1})
        own = await served.open(on_conflict="refuse", sampling={name: -1})
        own.check_call({name: -1.0})
        with pytest.raises(InvalidRequest, match=rf"^{name}=0 .* asks for -1\.0"):
            own.check_call({name: 0})


@pytest.mark.parametrize(
    "sampling",
    [
        {"stop_token_ids": [len(TOKENIZER)]},
        {"allowed_token_ids": [3, len(TOKENIZER)]},
        {"logit_bias": {str(len(TOKENIZER)): 1.0}},
        {"bad_words": [" "]},
    ],
)
async def test_sampling_that_every_call_would_be_refused_for(served: Served, sampling: dict[str, Any]) -> None:
    served.proxy.turn_tokenizer = tokenizer = make_tiny_tokenizer()
    tokenizer.max_token_id = len(tokenizer) - 1  # as vLLM's have it
    await served.open(sampling={"stop_token_ids": [3], "logit_bias": {"3": 1.0}, "bad_words": ["fox"]})
    with pytest.raises(InvalidRequest, match=f"^sampling.*{next(iter(sampling))}"):
        await served.open(sampling=sampling)


@pytest.mark.parametrize("token_id", [2**32, 2**70])
async def test_a_token_id_that_no_record_can_hold(served: Served, token_id: int) -> None:
    session = await served.open()
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        await served.call(session, [1, token_id])


async def test_limits_end_a_session(served: Served) -> None:
    by_calls = await served.open(max_calls=2)
    for _ in range(2):
        await served.call(by_calls, [1])
    with pytest.raises(SessionEnded, match="max_calls"):
        await served.call(by_calls, [1])
    assert (_record(by_calls).ended, _record(by_calls).calls) == ("max_calls", 2)
    by_tokens = await served.open(max_tokens=20)
    await served.call(by_tokens, [1] * 15)
    with pytest.raises(SessionEnded, match="max_tokens"):
        await served.call(by_tokens, [2] * 15)
    assert _record(by_tokens).ended == "max_tokens"
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
    assert (_record(session).ended, _record(session).calls, _record(session).running) == ("max_seconds", 0, 0)


async def test_a_client_that_goes_away_is_cut(served: Served) -> None:
    session = await served.open()
    call = await _under_way(served, session)
    assert _record(session).running == 1
    call.cancel()
    await asyncio.wait({call})
    record = _record(session)
    assert (record.calls, record.cut, record.running, record.trajectories) == (0, 1, 0, [])
    served.engine.gate = None
    await served.call(session, [1])
    assert _record(session).trajectories[0].calls == [1]
    assert served.run.active is not None
    assert served.run.active.requests == 0


async def test_a_record_is_there_before_the_client_has_its_answer(served: Served) -> None:
    session = await served.open()
    stream = served.stream(session, [1])
    await anext(stream)
    assert _record(session).calls == 1
    await stream.aclose()
    assert _record(session).cut == 0


async def test_a_deleted_record_can_be_asked_for_again_and_does_not_change(served: Served) -> None:
    session = await served.open(metadata={"row": "7"})
    await served.call(session, [1])
    call = await _under_way(served, session)
    first = _record(served.sessions.delete(session.session_id))
    assert served.engine.gate is not None
    served.engine.gate.set()
    with pytest.raises(SessionEnded):
        await call
    again = _record(served.sessions.delete(session.session_id))
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
    assert _record(session).reward == 1.0


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


async def test_a_call_for_which_there_is_no_room_drops_no_record() -> None:
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
    assert _record(served.sessions.get(ended.session_id)).calls == 1
    assert served.sessions.get(deleted.session_id).tokens == deleted.trajectories.tokens
    await served.call(going_on, [1] * 25, n=1)
    with pytest.raises(UnknownSession):
        served.sessions.get(deleted.session_id)
    assert _record(served.sessions.get(ended.session_id)).calls == 1
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
    assert len(refused) == 20 - _record(session).calls
    assert 80 < session.trajectories.tokens <= 100 + 6
    assert _record(session).ended == "max_tokens"
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
    assert [_record(served.sessions.get(session_id)).ended for session_id in ids[-3:]] == ["max_seconds"] * 3
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
