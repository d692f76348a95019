"""Logprobs of given tokens, teacher-forced."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

from rollout_server.engine.admission import Admission
from rollout_server.generation.tokenization import check_lengths
from rollout_server.generation.vllm_params import scoring_params, token_prompt
from rollout_server.service import Service
from shared.rollouts import ScoreRequest, ScoreResponse


async def _score(body: ScoreRequest, service: Service) -> ScoreResponse:
    with contextlib.ExitStack() as held:
        held.callback(service.proxy.capacity.take(len(body.sequences)))
        check_lengths(service, body.sequences, room=1)
        service.proxy.capacity.check_tokens(sum(map(len, body.sequences)))
        await service.reached(body)
        held.callback(await service.exclusive.take())
        while True:
            with await service.admit(body) as admission:
                jobs = [asyncio.ensure_future(_score_one(admission, sequence)) for sequence in body.sequences]
                try:
                    logprobs = await asyncio.gather(*jobs)
                finally:
                    for job in jobs:
                        job.cancel()
                    await asyncio.gather(*jobs, return_exceptions=True)
            if not admission.moved:  # else a push came in between and some positions are under another version
                break
    return ScoreResponse(epoch=service.epoch, version=admission.version, logprobs=logprobs)


async def _score_one(admission: Admission, sequence: list[int]) -> list[float]:
    final = None
    stream = admission.generate(token_prompt(sequence), scoring_params(), f"score-{uuid.uuid4().hex}")
    async for output in stream:
        final = output
    assert final is not None
    assert final.prompt_logprobs is not None
    positions = zip(list(final.prompt_logprobs)[1:], sequence[1:], strict=True)
    return [position[token].logprob for position, token in positions]
