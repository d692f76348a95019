"""Scores come from one version, and the attempts to get them are bounded."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import EngineProxy
from rollout_server.generation import scoring
from rollout_server.runs.table import RunTable
from shared.errors import InvalidRequest, VersionNotActive
from shared.rollouts import ScoreRequest
from shared.weights import WeightVersion
from tests.support.runs import open_run


class _Engine:
    """Scores every token with -1; a push with `keep` lands during each of the first `pushes` requests."""

    errored = False

    def __init__(self, pushes: int) -> None:
        self.pushes, self.requests, self.table = pushes, 0, RunTable(2, 1)
        self.model_config = SimpleNamespace(max_model_len=16, get_vocab_size=lambda: 100)

    async def generate(self, prompt: Any, params: Any, request_id: str, **kwargs: Any) -> Any:
        self.requests += 1
        if self.requests <= self.pushes:
            version = WeightVersion(run_id="r", step=self.requests)
            self.table.get("r").move(version, self.table.next_install_seq(), "sum", {}, "fresh")
        tokens = prompt["prompt_token_ids"]
        logprobs = [None, *({token: SimpleNamespace(logprob=-1.0)} for token in tokens[1:])]
        yield SimpleNamespace(prompt_logprobs=logprobs, outputs=[])


async def _score(engine: _Engine, rows: int = 1) -> tuple[WeightVersion | None, list[list[float]]]:
    run = open_run(engine.table)
    slot = await run.reserve(time.monotonic() + 1)
    run.flip(slot, WeightVersion(run_id="r", step=0), engine.table.next_install_seq(), "sum")
    proxy = EngineProxy(engine, engine.table)
    try:
        scored = await scoring.score(ScoreRequest(sequences=[[1, 2, 3]] * rows), proxy, Exclusive(proxy, enabled=False))
        assert scored[2] == [[]] * rows
        return scored[:2]
    finally:
        assert proxy.capacity.sequences == 0
        assert all(slot.requests == 0 for slot in run.slots)


async def test_a_push_in_between_scores_again_under_its_version() -> None:
    engine = _Engine(pushes=scoring.ATTEMPTS - 1)
    version, logprobs = await _score(engine)
    assert version == WeightVersion(run_id="r", step=scoring.ATTEMPTS - 1)
    assert logprobs == [[-1.0, -1.0]]


async def test_pushes_without_end_do_not_score_without_end() -> None:
    engine = _Engine(pushes=10**9)
    with pytest.raises(VersionNotActive, match="fewer"):
        await _score(engine)
    assert engine.requests == scoring.ATTEMPTS


async def test_a_failure_ends_the_rest_of_its_rows() -> None:
    """Nothing more is submitted for a request that has failed, and what runs is ended."""
    engine, ended = _Engine(pushes=0), []

    async def generate(prompt: Any, params: Any, request_id: str, **kwargs: Any) -> Any:
        engine.requests += 1
        if engine.requests == 3:
            raise InvalidRequest("refused by the engine")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(request_id)
        yield

    engine.generate = generate  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="refused by the engine"):
        await _score(engine, rows=1000)
    assert engine.requests < 10
    assert len(ended) == engine.requests - 1
