"""One generate request as jobs for the engine, one per prompt, all of them on one version."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from typing import Any

from rollout_server.engine.admission import Admission
from rollout_server.generation.tokenization import check_lengths, tokenize
from rollout_server.generation.vllm_params import to_completion, to_vllm, token_prompt
from rollout_server.service import Service
from rollout_server.vllm_compat import versions
from shared.errors import EngineDead, InvalidRequest
from shared.rollouts import GenerateRequest, RolloutGroup


@dataclass(frozen=True)
class Job:
    """The completions of one prompt."""

    admission: Admission
    prompt_index: int
    token_ids: list[int]
    params: Any
    tokenizer: Any
    skip_special_tokens: bool
    request_id: str
    truncated: bool

    async def run(self) -> RolloutGroup:
        """Generate; the group is complete or an error is raised."""
        final = None
        prompt = token_prompt(self.token_ids)
        try:
            async for output in self.admission.generate(prompt, self.params, self.request_id):
                final = output
        except versions.refusals() as error:  # vLLM's own validation of the parameters
            raise InvalidRequest(str(error)) from error
        if final is None or len(final.outputs) != self.params.n:
            raise EngineDead(f"the engine returned no complete group for {self.request_id}")
        return RolloutGroup(
            prompt_index=self.prompt_index,
            prompt_token_ids=self.token_ids,
            completions=[
                to_completion(
                    output,
                    self.admission.spans(self.request_id, output.index, len(output.token_ids)),
                    self._text(output),
                    truncated=self.truncated,
                )
                for output in sorted(final.outputs, key=lambda output: output.index)
            ],
        )

    def _text(self, output: Any) -> str | None:
        if self.tokenizer is None:
            return None
        if self.params.detokenize:
            return output.text
        return self.tokenizer.decode(output.token_ids, skip_special_tokens=self.skip_special_tokens)


async def start(service: Service, body: GenerateRequest) -> list[asyncio.Future[RolloutGroup]]:
    """Check the whole request, bind it to a version, and set it running: one task per prompt.

    Its room, its turn and the version's slot are held until the last task has ended, whoever awaits them.

    Raises:
        LockstepError: `invalid_request`, `unknown_run`, `version_not_active`, `step_not_reached`, `too_large`,
            `overloaded`, `draining`.
    """
    held = contextlib.ExitStack()
    tasks: list[asyncio.Future[RolloutGroup]] = []
    running: set[asyncio.Future[RolloutGroup]] = set()
    try:
        held.callback(service.proxy.capacity.take(len(body.prompts), body.sampling.n))
        jobs = await _jobs(service, body, held)

        def ended(task: asyncio.Future) -> None:
            running.discard(task)
            if not running:
                held.close()

        def submitted(ids: set[str]) -> list[bool]:
            return [task.done() or job.request_id in ids for job, task in zip(jobs, tasks, strict=True)]

        async with service.exclusive.together(submitted):
            tasks += [asyncio.ensure_future(job.run()) for job in jobs]
            running.update(tasks)
            for task in tasks:
                task.add_done_callback(ended)
    except BaseException:
        for task in tasks:
            task.cancel()
        if not tasks:
            held.close()
        raise
    return tasks


async def _jobs(service: Service, body: GenerateRequest, held: contextlib.ExitStack) -> list[Job]:
    """The request's jobs, checked and bound to a version; `held` ends what they hold."""
    prompts = [tokenize(service, prompt, body.chat_template_kwargs) for prompt in body.prompts]
    check_lengths(service, prompts, room=body.sampling.max_tokens or 1)
    service.proxy.capacity.check_tokens(
        sum(len(ids) + body.sampling.n * _room(service, ids, body.sampling.max_tokens) for ids in prompts)
    )
    wants_text = body.return_text
    if wants_text is None:
        wants_text = any(prompt.token_ids is None for prompt in body.prompts)
    tokenizer = service.proxy.get_tokenizer() if wants_text else None
    params = _params(body)
    await service.reached(body)
    held.callback(await service.exclusive.take())
    admission = held.enter_context(await service.admit(body))
    return [
        Job(
            admission,
            index,
            token_ids,
            own,
            tokenizer,
            body.skip_special_tokens,
            f"generate-{uuid.uuid4().hex}",
            body.sampling.truncates,
        )
        for index, (token_ids, own) in enumerate(zip(prompts, params, strict=True))
    ]


def _room(service: Service, token_ids: list[int], max_tokens: int | None) -> int:
    """Tokens that a completion may get."""
    return service.served.max_model_len - len(token_ids) if max_tokens is None else max_tokens


def _params(body: GenerateRequest) -> list[Any]:
    """vLLM's parameters for each prompt; those with the same seed share them."""
    made = {}
    for seed in {prompt.seed for prompt in body.prompts}:
        made[seed] = to_vllm(body.sampling if seed is None else body.sampling.model_copy(update={"seed": seed}))
        made[seed].skip_special_tokens = body.skip_special_tokens
    return [made[prompt.seed] for prompt in body.prompts]
