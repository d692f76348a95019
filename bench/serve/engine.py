"""The bare engine: vLLM's AsyncLLM, asked from within its own process, with nothing of a server before it.

python -m bench.serve.engine MODEL --port N [any flag of rollout-server]    # configured as a rollout server's is

`POST /wave` has it answer requests of its own making and says how long each took: HTTP carries the figures only.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.serve.load import Ask, in_parallel


async def answer_one(engine: Any, ask: Ask, number: int) -> float:
    """Generate; the seconds until the last token, all of which came with a logprob."""
    from rollout_server.generation.vllm_params import sampled_logprobs, to_vllm, token_prompt
    from shared.sampling import SamplingParams

    started = time.perf_counter()
    params = to_vllm(SamplingParams(n=ask.n, max_tokens=ask.tokens, ignore_eos=True))
    final = None
    async for output in engine.generate(token_prompt(ask.prompt), params, f"bench-{number}"):
        final = output
    assert final is not None
    counts = [len(sampled_logprobs(one)) for one in final.outputs]
    assert counts == [ask.tokens] * ask.n
    return time.perf_counter() - started


async def serve(argv: list[str]) -> None:
    """Load the model and answer waves until stopped."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from rollout_server import cli

    args, config, _ = cli.resolve(argv)
    engine = await asyncio.to_thread(
        AsyncLLM.from_vllm_config,
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        disable_log_stats=args.disable_log_stats,
    )
    gc.collect()
    gc.freeze()  # as servers do
    asked = 0

    async def wave(request: Request) -> JSONResponse:
        nonlocal asked
        document = await request.json()
        asks = [Ask(*ask) for ask in document["asks"]]

        async def send(ask: Ask) -> float:
            nonlocal asked
            asked += 1
            return await answer_one(engine, ask, asked)

        seconds, each = await in_parallel(asks, document["concurrency"], send)
        return JSONResponse({"seconds": seconds, "each": each})

    async def health(request: Request) -> Response:
        return Response()

    app = Starlette(routes=[Route("/wave", wave, methods=["POST"]), Route("/health", health)])
    try:
        await uvicorn.Server(uvicorn.Config(app, port=args.port, log_level="warning")).serve()
    finally:
        engine.shutdown()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1:]))
