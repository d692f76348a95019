"""Trajectories reconstruct every call, whatever the agent does with its history."""

from __future__ import annotations

import asyncio
import random
from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import RequestOutputKind

from rollout_server.sessions import trajectories
from rollout_server.sessions.trajectories import Choice, Trajectories, continued
from shared.rollouts import VersionSpan
from shared.sessions import SessionRecord
from tests.unit.rollout_server.sessions.conversing import EOS, TOKENIZER, Asked, Served, logprob

KINDS = (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA)


def _decode(ids: Any) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _encode(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def _ids(*values: int) -> array[int]:
    return array("I", values)


def _choice(*token_ids: int, reason: str = "stop") -> Choice:
    spans = [VersionSpan(version=None, start=0, end=len(token_ids))]
    return Choice(token_ids, [-float(each) for each in token_ids], None, spans, reason)


def test_a_prompt_that_begins_with_all_tokens_goes_on() -> None:
    made = Trajectories()
    assert made.add(0, _ids(1, 2), [_choice(3, 4)]) == 0
    assert made.add(1, _ids(1, 2, 3, 4, 5, 6), [_choice(7, reason="length")]) == 0
    (branch,) = made.branches
    assert branch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert branch.sampled == [(2, 4), (6, 7)]
    assert branch.logprobs.tolist() == [-3, -4, -7]
    assert branch.spans == [VersionSpan(version=None, start=0, end=3)]
    assert branch.finish_reasons == ["stop", "length"]
    assert made.tokens == 7


@pytest.mark.parametrize("prompt", [(1, 2), (1, 2, 3, 5), (1,), (9,), (1, 2, 3)], ids=str)
def test_any_other_prompt_forks(prompt: tuple[int, ...]) -> None:
    made = Trajectories()
    made.add(0, _ids(1, 2), [_choice(3, 4)])
    assert made.add(1, _ids(*prompt), [_choice(8)]) == 1
    assert [branch.calls for branch in made.branches] == [[0], [1]]
    assert made.branches[1].sampled == [(len(prompt), len(prompt) + 1)]


def test_choices_share_a_prompt_and_each_may_go_on() -> None:
    made = Trajectories()
    assert made.add(0, _ids(1), [_choice(2), _choice(3), _choice(2)]) == 2
    assert made.add(1, _ids(1, 3, 4), [_choice(5)]) == 0
    assert made.add(2, _ids(1, 2, 4), [_choice(6)]) == 0
    assert [branch.calls for branch in made.branches] == [[0, 2], [0, 1], [0]]


def test_versions_are_counted_in_sampled_tokens() -> None:
    made = Trajectories()
    made.add(0, _ids(1), [_choice(2)])
    carried = [
        VersionSpan(version=None, start=0, end=1),
        VersionSpan(version=None, start=1, end=2, kv="carried"),
    ]
    made.add(1, _ids(1, 2, 3), [Choice([4, 5], [0.0, 0.0], None, carried, "stop")])
    assert [(span.start, span.end, span.kv) for span in made.branches[0].spans] == [(0, 2, "fresh"), (2, 3, "carried")]


def _recorded(prompt: list[int], sampled: list[int]) -> Trajectories:
    made = Trajectories()
    made.add(0, array("I", prompt), [_choice(*sampled)])
    return made


def _continued(asked: array[int], made: Trajectories) -> array[int] | None:
    assert made.similar(asked)
    return continued(asked, made.similar(asked), _decode)


START = _encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
LETTERS = [_encode(letter)[0] for letter in "the fox"]


def test_text_that_is_rendered_again_goes_on_with_what_was_sampled() -> None:
    rest = "<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n"
    asked = array("I", _encode(_decode([*START, *LETTERS]) + rest))
    made = _recorded(START, LETTERS)
    assert made.match(asked) is None, "the tokenizer has longer tokens for it"
    built = _continued(asked, made)
    assert built is not None
    assert built.tolist() == [*START, *LETTERS, *_encode(rest)]


def test_an_end_that_was_sampled_is_not_rendered_twice() -> None:
    asked = array("I", _encode(_decode([*START, *LETTERS, EOS]) + "\n<|im_start|>user\n"))
    built = _continued(asked, _recorded(START, [*LETTERS, EOS]))
    assert built is not None
    assert built.tolist() == [*START, *LETTERS, EOS, *_encode("\n<|im_start|>user\n")]


def test_what_was_rendered_again_before_is_not_compared_again() -> None:
    """Only what came after it: the history of a long conversation is not decoded for every call."""
    asked, made = (
        array("I", _encode(_decode([*START, *LETTERS, EOS]) + "\n<|im_start|>user\n")),
        _recorded(START, [*LETTERS, EOS]),
    )
    built = _continued(asked, made)
    assert built is not None
    made.add(1, built, [_choice(*LETTERS, EOS)], asked)
    longer = asked + array("I", _encode(_decode([*LETTERS, EOS]) + "\n"))
    as_before = made.as_before(longer)
    assert as_before == built + longer[len(asked) :]
    assert made.as_before(asked[:-1]) == asked[:-1]
    decoded: list[int] = []

    def decode(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return _decode(token_ids)

    again = continued(as_before, made.similar(as_before), decode)
    assert again is not None
    assert again[: len(built) + len(LETTERS) + 1].tolist() == [*built, *LETTERS, EOS]
    assert max(decoded) < len(LETTERS) + 10


@pytest.mark.parametrize("change", ["The fox", "the fo", "the fox ", "", "the  fox"])
def test_other_text_is_not_taken_for_it(change: str) -> None:
    asked = array("I", _encode(_decode(START) + change + "<|im_end|>\n"))
    assert _continued(asked, _recorded(START, [*LETTERS, EOS])) is None


def test_other_questions_are_not_compared_as_text() -> None:
    made = _recorded(START, LETTERS)
    other = array("I", _encode(_decode(START).replace("hello", "good day")))
    assert not made.similar(other)
    assert made.similar(array("I", START))


@pytest.mark.parametrize("same", [0, 40, 500])
def test_text_that_differs_is_not_decoded_to_its_end(same: int) -> None:
    letters = [_encode(letter)[0] for letter in "abcd" * 5000]
    made = _recorded(START, [*LETTERS, *letters])
    asked = array("I", _encode(_decode([*START, *LETTERS, *letters[:same]]) + "X" + _decode(letters[same:])))
    decoded: list[int] = []

    def decode(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return _decode(token_ids)

    assert continued(asked, made.similar(asked), decode) is None
    assert sum(decoded) < 200 + 20 * same


@pytest.mark.parametrize("glance", range(1, 9))
def test_characters_that_are_cut_are_no_difference(glance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "_GLANCE", glance)
    monkeypatch.setattr(trajectories, "_WIDER", 2)
    sampled = [*LETTERS, *_encode("é😀ï日"), *LETTERS]
    asked = array("I", _encode(_decode([*START, *sampled]) + "\n<|im_start|>user\n"))
    built = _continued(asked, _recorded(START, sampled))
    assert built is not None
    assert built[: len(START) + len(sampled)].tolist() == [*START, *sampled]


def test_a_token_beyond_the_text_is_not_cut() -> None:
    """What follows the sampled text must begin with a token of its own."""
    word = _encode(" quick")
    assert len(word) == 1
    sampled = [_encode(" ")[0], _encode("q")[0]]
    asked = array("I", [*START, *word])
    assert _continued(asked, _recorded(START, sampled)) is None


def test_bytes_that_are_no_text_are_never_the_same() -> None:
    half, other = _encode("é")[:1], _encode("ï")[1:]
    assert _decode(half) == _decode(other) == "\ufffd"
    assert _continued(array("I", [*START, *other, EOS]), _recorded(START, half)) is None


class _Agent:
    """Calls as agents do, at random, and keeps the text of what it has seen, as it would be rendered again."""

    def __init__(self, served: Served, seed: int) -> None:
        self._served, self._random = served, random.Random(seed)
        self.histories = [_decode(START)]
        self.asked: list[list[int]] = []

    async def converse(self, session: Any, calls: int) -> None:
        draw = self._random
        left = calls
        while left:
            together = min(left, draw.choice((1, 1, 1, 2, 3)))
            left -= together
            await asyncio.gather(*(self._call(session) for _ in range(together)))

    async def _call(self, session: Any) -> None:
        draw, engine = self._random, self._served.engine
        history = draw.choice(self.histories[-3:])
        if draw.random() < 0.2:
            history = history[: draw.randrange(1, len(history) + 1)]  # a turn that was cut
        prompt = _encode(history)
        n = draw.choice((1, 1, 2))
        before = len(engine.asked)
        self.asked.append(prompt)
        await self._served.call(session, prompt, n=n, output_kind=draw.choice(KINDS))
        # Of calls side by side any will do: all of them are histories.
        sampled = draw.choice(list(engine.asked[draw.randrange(before, len(engine.asked))].sampled.values()))
        text = _decode(sampled)
        turn = "" if text.endswith(TOKENIZER.eos_token) else TOKENIZER.eos_token
        self.histories.append(f"{history}{text}{turn}\n<|im_start|>tool\n{draw.randrange(100)}<|im_end|>\n")


def check(record: SessionRecord, asked: list[Asked]) -> None:
    """Check that the trajectories hold every request exactly once, with the prompt that the engine was given."""
    found: set[tuple[int, int]] = set()
    numbers: dict[int, int] = {}  # of requests to the engine, by call
    for each in record.trajectories:
        assert len(each.calls) == len(each.sampled) == len(each.finish_reasons)
        assert each.log_kept_mass is None
        at = 0
        for call, (start, end) in zip(each.calls, each.sampled, strict=True):
            own = each.logprobs[at : at + end - start]
            number = int(-own[0])
            choice, request = round((-own[0] - number) * 8), asked[number]
            assert numbers.setdefault(call, number) == number
            assert each.token_ids[:start] == request.prompt
            assert each.token_ids[start:end] == request.sampled[choice]
            assert own == [logprob(number, choice, position) for position in range(end - start)]
            assert (number, choice) not in found
            found.add((number, choice))
            at += end - start
        assert at == len(each.logprobs)
        assert [(span.start, span.end) for span in each.spans] == [(0, at)]
    assert found == {(number, choice) for number, request in enumerate(asked) for choice in request.sampled}
    assert sorted(numbers) == sorted(numbers.values()) == list(range(len(asked)))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32), calls=st.integers(1, 12))
def test_random_conversations_are_reconstructed(seed: int, calls: int) -> None:
    async def converse() -> tuple[SessionRecord, list[Asked], list[list[int]]]:
        served = Served(seed)
        await served.flip(0)
        session = await served.open()
        agent = _Agent(served, seed)
        await agent.converse(session, calls)
        record = session.snapshot()()
        assert served.sessions.tokens == sum(len(each.token_ids) for each in record.trajectories)
        served.sessions.delete(session.session_id)
        return record, served.engine.asked, agent.asked

    record, asked, wanted = asyncio.run(converse())
    assert record.calls == calls
    check(record, asked)
    assert sorted(_decode(request.prompt) for request in asked) == sorted(map(_decode, wanted))
    wanted_as_given = sum(request.prompt in wanted for request in asked)
    assert record.repaired <= calls
    assert record.repaired >= calls - wanted_as_given
