"""Requests that wait for a step far in the future, and would take all room while they do."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.fuzz.campaign import Target
from tests.integration.support.server import HTTP

#: Seconds for which one waits, and in which an honest request must be answered meanwhile.
_WAIT_S, _HONEST_S = 2.0, 5.0
_FAR = 10**9


def _crowds() -> list[tuple[str, dict[str, Any]]]:
    """Return paths and bodies that each ask for as much as one request may."""
    waits = {"run_id": "fuzzed", "min_step": _FAR, "wait_s": _WAIT_S}
    short = {"token_ids": [5, 6]}
    return [
        ("/v1/generate", {**waits, "prompts": [short] * 8, "sampling": {"n": 4096, "max_tokens": 1}}),
        ("/v1/generate", {**waits, "prompts": [short] * 4096, "sampling": {"n": 8, "max_tokens": 1}, "stream": True}),
        ("/v1/score", {**waits, "sequences": [[5, 6]] * 16_384}),
    ]


def fuzz_waiting(target: Target, examples: int, number: int) -> None:
    """Send several that wait, and honest requests beside them, which must be answered as if nobody waited."""
    crowds = itertools.islice(itertools.cycle(_crowds()), number % 3, number % 3 + max(examples, 3))
    honest = [
        ("/v1/generate", {"run_id": "fuzzed", "prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2}}),
        ("/v1/score", {"run_id": "fuzzed", "sequences": [[5, 6, 7]]}),
        ("/v1/completions", {"model": "base", "prompt": "a", "max_tokens": 2}),
    ]
    for path, body in crowds:
        what = f"{path} that waits for step {_FAR}"
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(HTTP.post, target.url + path, json=body, timeout=60.0) for _ in range(4)]
            time.sleep(0.5)
            for asked, honest_body in honest:
                started = time.monotonic()
                answer = target.send("waiting", "POST", asked, what=f"beside {what}", json=honest_body)
                seconds = time.monotonic() - started
                if answer is not None and (answer.status_code != 200 or seconds > _HONEST_S):
                    target.tally.fail(f"waiting: {asked} beside {what}: {answer.status_code} in {seconds:.1f} s")
            for future in waiting:
                try:
                    answer = future.result()
                except httpx.HTTPError as error:
                    target.tally.fail(f"waiting: {what}: no answer: {error!r}")
                    continue
                target.judge("waiting", "POST", path, answer.status_code, answer.text, 0.0, what)
                if answer.status_code == 200 and b"step_not_reached" not in answer.content:
                    target.tally.fail(f"waiting: {what} is answered")
    target.expect_unchanged("requests that wait")
