"""Turns of targets, and answers that are checked."""

from __future__ import annotations

import pytest

from bench.common.measure import COMPLETIONS, Turns, random_prompts, sampled
from learner.utils.processes import Stopped


def test_another_target_is_first_in_every_round_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    turns = Turns[str, int](["a", "b", "c"])
    turns.run(3, lambda target, number: (order.append(target), number)[1], lambda: False)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert turns.results == [[1, 2, 3]] * 3


def test_a_target_that_fails_gets_no_further_turn() -> None:
    asked: list[str] = []

    def turn(target: str, number: int) -> int:
        asked.append(target)
        if (target, number) == ("b", 1):
            raise RuntimeError("gone")
        return number

    turns = Turns[str, int](["a", "b"])
    turns.run(3, turn, lambda: False)
    assert turns.failed == {1: "RuntimeError: gone"}
    assert turns.results == [[1, 2, 3], []]
    assert asked.count("b") == 2


def test_a_round_counts_completely_and_none_begins_too_late() -> None:
    turns = Turns[str, int](["a", "b"])
    turns.run(4, lambda target, number: number, lambda: True)
    assert turns.results == [[1], [1]]
    calls = 0

    def stopped(target: str, number: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Stopped("SIGTERM")
        return number

    turns = Turns[str, int](["a", "b"])
    with pytest.raises(Stopped):
        turns.run(4, stopped, lambda: False)
    assert turns.results == [[1], [1]]


def test_choices_are_put_in_order() -> None:
    def choice(index: int) -> str:
        return f'{{"index": {index}, "token_ids": [{index}], "logprobs": {{"token_logprobs": [-1.0]}}}}'

    content = f'{{"choices": [{choice(1)}, {choice(0)}]}}'.encode()
    assert sampled(COMPLETIONS, 200, content, 1, 2) == [([0], [-1.0]), ([1], [-1.0])]


def test_prompts_are_the_same_for_the_same_seed() -> None:
    assert random_prompts(3, 512, 16, 1) == random_prompts(3, 512, 16, 1) != random_prompts(3, 512, 16, 2)
