"""A generate request as jobs for the engine, one per prompt, all of them on one version."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from rollout_server.engine.admission import Admission
from rollout_server.engine.exclusive import Exclusive
from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.turns import in_turns
from rollout_server.generation.prompts import SeenPrompt, seen_prompts
from rollout_server.generation.tokenization import checked, special_stops, tokenize
from rollout_server.generation.vllm_params import sampled_logprobs, to_vllm
from rollout_server.vllm_compat import kept_mass, versions
from shared.errors import EngineDead, InvalidRequest, LockstepError
from shared.rollouts import HEARTBEAT_SECONDS, Completion, GenerateRequest, RolloutGroup
from shared.sampling import SamplingParams

logger = logging.getLogger("lockstep.generation")


@dataclass(frozen=True)
class Job:
    """The completions of one prompt."""

    admission: Admission
    prompt_index: int
    prompt: SeenPrompt
    params: Any  # vLLM's
    tokenizer: Any  # None where no text is wanted
    truncated: bool  # the distribution is cut, so the kept mass is wanted
    request_id: str = field(default_factory=lambda: f"generate-{uuid.uuid4().hex}")

    async def run(self) -> RolloutGroup:
        """Generate; the group is complete or an error is raised."""
        final = None
        try:
            async for output in self.admission.generate(self.prompt.engine_input, self.params, self.request_id):
                final = output
        except versions.refusals() as error:  # vLLM's own validation of the parameters
            raise InvalidRequest(str(error)) from error
        if final is None or len(final.outputs) != self.params.n:
            raise EngineDead(f"the engine returned no complete group for {self.request_id}")
        return RolloutGroup(
            prompt_index=self.prompt_index,
            prompt_token_ids=self.prompt.token_ids,
            image_digests=self.prompt.image_digests,
            completions=[self._completion(output) for output in sorted(final.outputs, key=lambda output: output.index)],
        )

    def _completion(self, output: Any) -> Completion:
        text = None
        if self.tokenizer is not None:
            text = output.text
            if not self.params.detokenize:
                skip = self.params.skip_special_tokens
                text = self.tokenizer.decode(output.token_ids, skip_special_tokens=skip)
        ranks = [output.logprobs.ranks[start] for start in output.logprobs.start_indices]
        return Completion(
            token_ids=list(output.token_ids),
            logprobs=sampled_logprobs(output),
            log_kept_mass=kept_mass.decoded(ranks) if self.truncated else None,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            spans=self.admission.spans(self.request_id, output.index, len(output.token_ids)),
            text=text,
        )


async def generate(
    body: GenerateRequest, proxy: EngineProxy, exclusive: Exclusive
) -> AsyncGenerator[RolloutGroup | None, None]:
    """Yield the groups of a request in the order they finish.

    None comes before the first group, when the request has been checked and runs, and after every `HEARTBEAT_SECONDS`
    without a group. Closing the generator aborts what still runs in the engine.

    Raises:
        LockstepError: `invalid_request`, `unknown_run`, `version_not_active`, `step_not_reached`, `too_large`,
            `overloaded`, `draining`, `engine_dead`.
    """
    finished: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
    starting = asyncio.ensure_future(_start(body, proxy, exclusive))
    starting.add_done_callback(finished.put_nowait)
    try:
        while await _next(finished) is None:
            yield None
        tasks = starting.result()
        for task in tasks:
            if task.done():
                task.result()  # what vLLM has refused by now has an error response, in place of a stream
        yield None
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
        for _ in tasks:
            while (done := await _next(finished)) is None:
                yield None
            yield done.result()
    except LockstepError:
        raise
    except Exception as error:
        logger.exception("a generate request failed")
        raise EngineDead(f"generation failed: {type(error).__name__}: {error}") from error
    finally:
        # Without an `await` in between: Starlette cancels streams again at every one.
        if not starting.cancel() and not starting.cancelled() and starting.exception() is None:
            for task in starting.result():
                task.cancel()
            await asyncio.wait(starting.result())


async def _next(queue: asyncio.Queue[asyncio.Future[Any]]) -> asyncio.Future[Any] | None:
    """Return the next item, or None if there is none within `HEARTBEAT_SECONDS`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HEARTBEAT_SECONDS):
            return await queue.get()
    return None


async def _start(body: GenerateRequest, proxy: EngineProxy, exclusive: Exclusive) -> list[asyncio.Future[RolloutGroup]]:
    """Check the complete request, bind it to a version, and set it running: one task per prompt.

    Its sequences are counted, and the version's slot is held, until the last task has ended.
    """
    held = contextlib.ExitStack()
    tasks: list[asyncio.Future[RolloutGroup]] = []
    failed = asyncio.Event()

    def see_end(task: asyncio.Future[RolloutGroup]) -> None:
        if task.cancelled() or task.exception() is not None:
            failed.set()

    try:
        proxy.capacity.check_size(len(body.prompts), body.sampling.n)
        await proxy.reached(body)
        held.callback(proxy.capacity.take(len(body.prompts), body.sampling.n))
        jobs = await _jobs(body, proxy, exclusive, held)

        def submitted(ids: set[str]) -> list[bool]:
            return [task.done() or job.request_id in ids for job, task in zip(jobs, tasks, strict=False)]

        async with exclusive.together(submitted):
            for job in jobs:
                if failed.is_set():  # and so has the request
                    break
                tasks.append(asyncio.ensure_future(job.run()))
                tasks[-1].add_done_callback(see_end)
                await asyncio.sleep(0)  # to hand one over takes vLLM milliseconds, in which nothing else is answered
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    finally:
        if tasks:
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: held.close())
        else:
            held.close()
    return tasks


def _tokenized(body: GenerateRequest, tokenizer: Any, model_config: Any) -> Iterator[list[int]]:
    limit = model_config.max_model_len
    for index, prompt in enumerate(body.prompts):
        token_ids = tokenize(tokenizer, prompt, body.chat_template_kwargs, limit)
        yield checked(index, token_ids, body.sampling.max_tokens or 1, model_config)


def _params(body: GenerateRequest, sampled: SamplingParams) -> Iterator[tuple[int | None, Any]]:
    """Yield vLLM's parameters by the seed of a prompt; prompts with the same seed share them."""
    for seed in {prompt.seed for prompt in body.prompts}:
        seeded = sampled if seed is None else sampled.model_copy(update={"seed": seed})
        yield seed, to_vllm(seeded, skip_special_tokens=body.skip_special_tokens)


def _tokenizer(proxy: EngineProxy) -> Any:
    try:
        return proxy.get_tokenizer()
    except ValueError as error:
        raise InvalidRequest(
            "this server has no tokenizer (--skip-tokenizer-init): send token ids, and leave return_text out"
        ) from error


async def _jobs(
    body: GenerateRequest, proxy: EngineProxy, exclusive: Exclusive, held: contextlib.ExitStack
) -> list[Job]:
    """Return the request's jobs, checked and bound to a version; `held` releases what they hold."""
    if body.chat_template_kwargs and not any(prompt.messages for prompt in body.prompts):
        raise InvalidRequest("chat_template_kwargs are for prompts of messages, and there is none; leave them out")
    given_as_text = any(prompt.token_ids is None for prompt in body.prompts)
    wants_text = given_as_text if body.return_text is None else body.return_text
    tokenizer = _tokenizer(proxy) if given_as_text or wants_text else None
    encoder = tokenizer if proxy.turn_tokenizer is None else proxy.turn_tokenizer
    max_tokens = body.sampling.max_tokens
    tokenized = await in_turns(_tokenized(body, encoder, proxy.model_config))
    images = [prompt.images for prompt in body.prompts]
    prompts = await seen_prompts(proxy, "prompt", tokenized, images, max_tokens or 1, held)
    limit = proxy.model_config.max_model_len
    proxy.capacity.check_tokens(
        sum(
            len(ids) + body.sampling.n * (limit - len(ids) if max_tokens is None else max_tokens)
            for _, ids, _ in prompts
        )
    )
    sampling = body.sampling
    if sampling.stop and body.skip_special_tokens:
        found = await in_turns(special_stops(sampling.stop, _tokenizer(proxy) if encoder is None else encoder))
        sampling = sampling.model_copy(update={"stop_token_ids": [*sampling.stop_token_ids, *found]})
    params = dict(await in_turns(_params(body, sampling)))
    held.callback(await exclusive.take())
    await proxy.runs.admitting()
    admission = held.enter_context(proxy.admit(body))
    decoder, truncated = tokenizer if wants_text else None, proxy.cuts(body.sampling)
    return [
        Job(admission, index, seen, params[prompt.seed], decoder, truncated)
        for index, (prompt, seen) in enumerate(zip(body.prompts, prompts, strict=True))
    ]
