"""python -m tests.fuzz [--requests 20000] [--seed N] [--only NAME,NAME]     # starts a server; takes minutes

Prints counts of status codes; exits with 1 if the server failed on a request, or a request changed what it serves.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.campaign import Tally, Target, pushed
from tests.fuzz.connections import HeldConnections, fuzz_connections
from tests.fuzz.foreign import fuzz_foreign
from tests.fuzz.images import fuzz_images
from tests.fuzz.large import fuzz_large
from tests.fuzz.pushes import fuzz_joins, fuzz_pushes
from tests.fuzz.routes import BODIES, fuzz_adapters, fuzz_announcements, fuzz_bodies, fuzz_raw
from tests.fuzz.schema import fuzz_schema, openai_schema, own_schema
from tests.fuzz.structured import fuzz_structured
from tests.fuzz.waiting import fuzz_waiting
from tests.fuzz.watch import Watch
from tests.integration.support import policy as P
from tests.integration.support.server import running_server
from tests.support.arguments import arguments
from tests.support.tiny_model import make_tiny_model

FLAGS = arguments(
    {
        "--max-lora-rank": 8,
        "--max-runs": 2,
        "--dtype": "float32",
        "--max-model-len": 256,
        "--max-num-seqs": 32,
        "--enforce-eager": None,
        "--served-model-name": "base",
        "--push-timeout": 20,
        "--collective-timeout": 2,
    }
)
#: Shares of all requests.
SHARES = {
    "/v1/generate": 0.17,
    "/v1/score": 0.09,
    "/v1/completions": 0.09,
    "/v1/chat/completions": 0.09,
    "/tokenize": 0.06,
    "/detokenize": 0.06,
    "raw": 0.18,
    "connections": 0.02,
    "large": 0.03,
    "structured": 0.02,
    "images": 0.02,
    "waiting": 0.0002,
    "foreign": 0.02,
    "broadcast": 0.04,
    "adapter": 0.10,
    "pushes": 0.008,
    "joins": 0.0003,
    "schema": 0.02,
    "openai-schema": 0.01,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", default=",".join(SHARES), help="some of: %(default)s")
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    options = parser.parse_args()
    names = options.only.split(",")
    print(f"fuzz: seed {options.seed}, {options.requests} requests to {', '.join(names)}", flush=True)
    started, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        model = make_tiny_model(Path(scratch) / "model", seed=0)
        with running_server(model, Path(scratch), *FLAGS) as server:
            pids = server.engine_processes()
            target = Target(server.url, tally, alive=lambda: server.engine_processes() == pids)
            policy = P.make_policy(model)
            pushed(target, policy, "kept")
            good = pushed(target, policy, "fuzzed")
            campaigns = make_campaigns(target, good, [str(model), *FLAGS], server.engine_processes)
            total = sum(SHARES[name] for name in names)
            held = HeldConnections(server.url, scale=1.0 if "connections" in names else 0.0)
            with (
                contextlib.closing(held),
                Watch(server.url, server.processes, lambda: target.during, tally.fail) as watch,
            ):
                for name in names:
                    begun = time.monotonic()
                    campaigns[name](round(options.requests * SHARES[name] / total), options.seed)
                    counts = tally.statuses.get(name, {})
                    summary = ", ".join(f"{counts[status]} x {status}" for status in sorted(counts))
                    print(f"fuzz: {name}: {summary} in {time.monotonic() - begun:.0f} s", flush=True)
                target.during = "connections that are held"
                for overdue in held.overdue():
                    tally.fail(f"connections: {overdue}")
            target.close()
            if options.log:
                options.log.write_bytes(server.log.read_bytes())
    print(
        f"fuzz: seed {options.seed}: {tally.requests} requests in {time.monotonic() - started:.0f} s, slowest answer "
        f"{tally.slowest_s:.1f} s, of /health {watch.slowest_s:.2f} s, largest growth of memory "
        f"{watch.growth / 2**20:.0f} MiB, {len(tally.failures)} failures"
    )
    return 1 if tally.failures else 0


def make_campaigns(
    target: Target, good: bytes, argv: list[str], engine: Callable[[], list[int]]
) -> dict[str, Callable[[int, int], None]]:
    """Return campaigns by name; each takes the number of requests and a seed. `engine` returns its processes."""

    def bodies(path: str) -> Callable[[int, int], None]:
        return lambda count, seed: fuzz_bodies(target, path, count, seed)

    return {
        **{path: bodies(path) for path in BODIES},
        "raw": lambda count, seed: fuzz_raw(target, count, seed),
        "connections": lambda count, seed: fuzz_connections(target, count, seed),
        "large": lambda count, seed: fuzz_large(target, count, seed),
        "structured": lambda count, seed: fuzz_structured(target, count, seed),
        "images": lambda count, seed: fuzz_images(target, count, seed),
        "waiting": lambda count, seed: fuzz_waiting(target, count, seed),
        "foreign": lambda count, seed: fuzz_foreign(target, good, count, seed),
        "broadcast": lambda count, seed: fuzz_announcements(target, count, seed),
        "adapter": lambda count, seed: fuzz_adapters(target, good, count, seed),
        "pushes": lambda count, seed: fuzz_pushes(target, good, count, seed),
        "joins": lambda count, seed: fuzz_joins(target, engine, count),
        "schema": lambda count, seed: fuzz_schema(target, "schema", own_schema(target), count, seed),
        "openai-schema": lambda count, seed: fuzz_schema(target, "openai-schema", openai_schema(argv), count, seed),
    }


if __name__ == "__main__":
    sys.exit(main())
