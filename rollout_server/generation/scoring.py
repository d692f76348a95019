"""Teacher-forced logprobs of given tokens."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

from rollout_server.engine.admission import Admission
from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.turns import in_turns
from rollout_server.generation.prompts import SeenPrompt, seen_prompts
from rollout_server.generation.tokenization import checked
from shared.errors import InvalidRequest, VersionNotActive
from shared.rollouts import ScoreRequest
from shared.weights import WeightVersion

#: Sequences of a request that the engine has at a time: more than it computes at once, and few enough for its loops.
IN_FLIGHT = 1024
#: Times that a request is scored, if a push with `in_flight` `keep` lands in between each time.
ATTEMPTS = 4


async def score(
    body: ScoreRequest, proxy: EngineProxy, exclusive: Exclusive
) -> tuple[WeightVersion | None, list[list[float]], list[list[str]]]:
    """Score all sequences under one version.

    Returns:
        The version, None for the base model; for each sequence the logprobs of all its tokens but the first; and the
        digests of its images.

    Raises:
        LockstepError: as `requests.generate`; `version_not_active` where pushes keep landing in between.
    """
    with contextlib.ExitStack() as held:
        proxy.capacity.check_size(len(body.sequences))
        await proxy.reached(body)
        held.callback(proxy.capacity.take(len(body.sequences)))
        await in_turns(checked(index, each, 1, proxy.model_config) for index, each in enumerate(body.sequences))
        proxy.capacity.check_tokens(sum(map(len, body.sequences)))
        images = body.images or [[]] * len(body.sequences)
        sequences = await seen_prompts(proxy, "sequence", body.sequences, images, 1, held)
        _check_unexpanded(body.sequences, sequences)
        held.callback(await exclusive.take())
        for _ in range(ATTEMPTS):
            await proxy.runs.admitting()
            with proxy.admit(body) as admission:
                logprobs = await _score_all(admission, sequences)
            if not admission.moved:  # else a push landed in between and some positions are under another version
                return admission.version, logprobs, [seen.image_digests for seen in sequences]
        raise VersionNotActive(
            f"{ATTEMPTS} pushes in a row landed while these sequences were scored; send fewer in one request, or pause "
            "the training"
        )


def _check_unexpanded(given: list[list[int]], seen: list[SeenPrompt]) -> None:
    """Refuse a sequence that does not hold all tokens of its images: nobody could tell which token a logprob is of."""
    for index, (sequence, own) in enumerate(zip(given, seen, strict=True)):
        if sequence != own.token_ids:
            raise InvalidRequest(
                f"sequence {index} has {len(sequence)} tokens, and {len(own.token_ids)} with all those of its images: "
                "send the ids that the model's processor makes, as prompt_token_ids of /v1/generate has them"
            )


async def _score_all(admission: Admission, sequences: list[SeenPrompt]) -> list[list[float]]:
    """Score as many at a time as there is room for. The first failure ends those under way, and no more are begun."""
    room, jobs = asyncio.Semaphore(IN_FLIGHT), list[asyncio.Task[list[float]]]()
    try:
        async with asyncio.TaskGroup() as group:
            for sequence in sequences:
                await room.acquire()
                jobs.append(group.create_task(_score_one(admission, sequence, room)))
                await asyncio.sleep(0)  # as in `requests`
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [job.result() for job in jobs]


async def _score_one(admission: Admission, sequence: SeenPrompt, room: asyncio.Semaphore) -> list[float]:
    """Return the logprobs of all tokens but the first; releases `room` when the engine has no more to do with it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    final: Any = None
    try:
        async for output in admission.generate(sequence.engine_input, params, f"score-{uuid.uuid4().hex}"):
            final = output
    finally:
        room.release()
    assert final is not None
    assert final.prompt_logprobs is not None
    positions = zip(list(final.prompt_logprobs)[1:], sequence.token_ids[1:], strict=True)
    return [position[token].logprob for position, token in positions]
