"""Serves without HTTP, and generates across pushes: our spans and vLLM's own of every completion.

python -m tests.integration.support.native_spans MODEL RESULT
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rollout_server import cli, lifecycle
from rollout_server.api.middleware.readiness import ReadinessMiddleware
from rollout_server.engine.capacity import Capacity
from rollout_server.engine.proxy import EngineProxy
from rollout_server.generation.vllm_params import to_vllm, token_prompt
from rollout_server.service import Service
from rollout_server.sessions.records import Sessions
from rollout_server.vllm_compat import versions
from shared.rollouts import PolicyRequest
from shared.sampling import SamplingParams
from shared.weights import WeightVersion
from tests.integration.conftest import FLAGS
from tests.integration.support import policy as P
from tests.integration.support.policy import PROBE

Spans = list[tuple[str, int, int]]

#: Of each request's eight completions. Some end before the last push, and some have to wait for a place till after it.
TOKENS = (400, 150, 400)
BETWEEN_PUSHES = 60


class LabellingProxy(EngineProxy):
    """Also sets vLLM's own weight version at the end of a pause."""

    label = ""

    @asynccontextmanager
    async def paused(self, *, clear_cache: bool) -> AsyncIterator[dict[tuple[str, int], int]]:
        async with super().paused(clear_cache=clear_cache) as tokens:
            yield tokens
            await self._engine.update_weight_version(self.label)


@asynccontextmanager
async def serving(model: Path, *flags: str) -> AsyncIterator[Service]:
    """A rollout server without HTTP."""
    readiness, (args, config, settings) = ReadinessMiddleware(), cli.resolve([str(model), *FLAGS, *flags])
    try:
        yield await lifecycle.start(args, config, settings, readiness, Capacity(settings), Sessions(settings))
    finally:
        readiness.close()


async def push(service: Service, proxy: LabellingProxy, run_id: str, policy: Any, step: int) -> None:
    version = WeightVersion(run_id=run_id, fence=0, step=step)

    async def body() -> AsyncIterator[bytes]:
        yield P.blob(policy, version, service.served.base.weights)

    proxy.label = str(step)
    await service.installer.push(run_id, P.LEASE, False, body(), "keep")


async def ask(service: Service, run_id: str, prompt: list[int], n: int, tokens: int) -> list[tuple[Spans, Spans]]:
    """Return our spans and vLLM's for every completion."""
    params = to_vllm(SamplingParams(n=n, max_tokens=tokens, ignore_eos=True))
    with service.proxy.admit(PolicyRequest(run_id=run_id)) as admission:
        request_id = f"{run_id}-{prompt[0]}"
        outputs = [output async for output in admission.generate(token_prompt(prompt), params, request_id)][-1].outputs
        return [
            (
                [(str(s.version.step), s.start, s.end) for s in admission.spans(request_id, output.index, tokens)],
                [(s.version, s.start, s.end) for s in output.weight_versions],
            )
            for output in outputs
        ]


async def generate_across_pushes(model: Path) -> dict[str, Any]:
    """Return the spans of completions of a run that is pushed to, and of one that is not, beside each other."""
    policy = P.make_policy(model)
    async with serving(model, "--max-runs", "2", "--max-num-seqs", "16") as service:
        engine = service.proxy._engine
        proxy = service.installer.context.proxy = LabellingProxy(engine, service.runs)
        for run_id in ("still", "moving"):
            await push(service, proxy, run_id, policy, 0)
        await engine.update_weight_version("0")
        still = asyncio.create_task(ask(service, "still", [9, *PROBE], 1, max(TOKENS)))
        moving = [
            asyncio.create_task(ask(service, "moving", [10 + i, *PROBE], 8, tokens)) for i, tokens in enumerate(TOKENS)
        ]
        for step in (1, 2, 3):
            while max(versions.output_tokens(engine).values(), default=0) < step * BETWEEN_PUSHES:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            P.randomize(policy, seed=step)
            await push(service, proxy, "moving", policy, step)
        return {"moving": [pair for task in moving for pair in await task], "still": await still}


if __name__ == "__main__":
    result = asyncio.run(generate_across_pushes(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(result))
