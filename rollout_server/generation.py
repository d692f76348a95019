"""One generate request as jobs for the engine, one per prompt, all of them on one version."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

from rollout_server.admission import Admission
from rollout_server.prompts import check_lengths, tokenize
from rollout_server.sampling import to_completion, to_vllm, token_prompt
from rollout_server.service import Service
from shared.errors import ErrorCode, LockstepError
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
    truncated: bool

    async def run(self) -> RolloutGroup:
        """Generate; the group is complete or an error is raised."""
        final = None
        prompt = token_prompt(self.token_ids)
        request_id = f"generate-{uuid.uuid4().hex}"
        try:
            async for output in self.admission.generate(prompt, self.params, request_id):
                final = output
        except ValueError as error:  # vLLM's own validation of the parameters
            raise LockstepError(ErrorCode.INVALID_REQUEST, str(error)) from error
        if final is None or len(final.outputs) != self.params.n:
            raise LockstepError(ErrorCode.ENGINE_DEAD, f"the engine returned no complete group for {request_id}")
        return RolloutGroup(
            prompt_index=self.prompt_index,
            prompt_token_ids=self.token_ids,
            completions=[
                to_completion(
                    output,
                    self.admission.spans(request_id, output.index, len(output.token_ids)),
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

    The version's slot is held until the last task has ended, whoever awaits them.

    Raises:
        LockstepError: `invalid_request`, `unknown_run`, `version_not_active`, `step_not_reached`.
    """
    prompts = [tokenize(service, prompt, body.chat_template_kwargs) for prompt in body.prompts]
    check_lengths(service, prompts, room=body.sampling.max_tokens or 1)
    params = to_vllm(body.sampling)
    params.skip_special_tokens = body.skip_special_tokens
    wants_text = body.return_text
    if wants_text is None:
        wants_text = any(prompt.token_ids is None for prompt in body.prompts)
    tokenizer = service.door.get_tokenizer() if wants_text else None
    admission = await service.admit(body)
    jobs = [
        Job(admission, index, token_ids, params, tokenizer, body.skip_special_tokens, body.sampling.truncates)
        for index, token_ids in enumerate(prompts)
    ]
    tasks: list[asyncio.Future[RolloutGroup]] = [asyncio.ensure_future(job.run()) for job in jobs]
    running = set(tasks)

    def ended(task: asyncio.Future) -> None:
        running.discard(task)
        if not running:
            admission.release()

    for task in tasks:
        task.add_done_callback(ended)
    return tasks
