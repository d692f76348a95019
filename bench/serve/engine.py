"""The bare engine: vLLM's AsyncLLM, called from within its own process, without a server.

python -m bench.serve.engine MODEL --port N [any flag of rollout-server]    # configured as a rollout server's is

`POST /wave` generates for requests and returns how long each took: HTTP carries their sizes and the figures only.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.serve.front_ends import LoadRequest, in_parallel


async def serve(argv: list[str]) -> None:
    """Load the model and serve waves until stopped."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from rollout_server import cli
    from rollout_server.generation.vllm_params import sampled_logprobs, to_vllm, token_prompt
    from shared.sampling import SamplingParams

    args, config, _ = cli.resolve(argv)
    options = {"usage_context": UsageContext.OPENAI_API_SERVER, "disable_log_stats": args.disable_log_stats}
    engine = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, **options)
    gc.collect()
    gc.freeze()  # as servers do
    numbers = itertools.count()

    async def wave(request: Request) -> JSONResponse:
        document = await request.json()
        requests = [LoadRequest(*fields) for fields in document["requests"]]

        async def send(one: LoadRequest) -> float:
            started, final = time.perf_counter(), None
            params = to_vllm(SamplingParams(n=one.n, max_tokens=one.tokens, ignore_eos=True))
            async for output in engine.generate(token_prompt(one.prompt), params, f"bench-{next(numbers)}"):
                final = output
            assert final is not None
            assert [len(sampled_logprobs(o)) for o in final.outputs] == [one.tokens] * one.n
            return time.perf_counter() - started

        seconds, each = await in_parallel(requests, document["concurrency"], send)
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
