"""Lockstep: `rollout-server` as a process, `Publisher.push`, the first token by `RolloutClient.generate`."""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from bench.common.background_load import decode_under_pushes
from bench.common.measure import Moved, Sample, Setting, Skip, fresh_prompts, one_push, summarize
from bench.common.servers import Server, environment, free_port
from learner.run_dir.lease import Lease
from learner.servers.client import RolloutClient
from learner.servers.pool import ServerPool
from learner.sync.publisher import Publisher
from learner.sync.transport import Choice
from shared.errors import LockstepError
from shared.rollouts import GenerateRequest, Prompt
from shared.sampling import SamplingParams
from shared.weights import WeightVersion

HTTP, COLLECTIVE, KEEP = "lockstep http", "lockstep collective", "lockstep collective, keep"
TRANSPORTS: dict[str, Choice] = {HTTP: "http", COLLECTIVE: "collective", KEEP: "collective"}
ONE_GREEDY_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


class OurPath:
    """A run on a rollout server, pushed over one transport."""

    def __init__(self, client: RolloutClient, model: PeftModel, row: str) -> None:
        run_id = f"bench-{re.sub('[^a-z]+', '-', row)}-{secrets.token_hex(3)}"
        self.client, self.lease, self.transport = client, Lease(run_id, secrets.token_hex(16), 0), TRANSPORTS[row]
        self.publisher = Publisher(
            ServerPool.of(client),
            model,
            self.lease,
            takeover=True,
            transport=self.transport,
            in_flight="keep" if row == KEEP else "drain",
        )
        self.version: WeightVersion | None = None

    def push(self, step: int) -> Moved:
        receipt = self.publisher.push(step)
        self.version = receipt.version
        # A run starts over HTTP and goes back to it where the group fails: such a push is none of this row's.
        if step > 0 and receipt.transport != self.transport:
            raise RuntimeError(f"push {step} went over {receipt.transport}, not over {self.transport}")
        parts = {
            name.removesuffix("_seconds"): float(value)
            for name, value in receipt.model_dump().items()
            if name.endswith("_seconds")
        }
        return Moved(receipt.bytes, parts)

    def first_token(self, prompt: list[int]) -> tuple[int, float]:
        assert self.version is not None
        request = GenerateRequest(
            prompts=[Prompt(token_ids=prompt)], sampling=ONE_GREEDY_TOKEN, policy=self.version, return_text=False
        )
        completion = self.client.generate(request).groups[0].completions[0]
        if [span.version for span in completion.spans] != [self.version]:
            raise RuntimeError(f"the token is of {completion.spans}, not of {self.version}")
        return completion.token_ids[0], completion.logprobs[0]

    def settle(self) -> None:
        pass

    def close(self) -> None:
        """Free the run's slots on the server, and what the transport holds."""
        self.publisher.close()
        self.client.delete_run(self.lease.run_id, self.lease.secret)


class Ours:
    """The contender `lockstep`."""

    rows = (HTTP, COLLECTIVE, KEEP)
    needs_rank = True
    notes: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.same_gpu = False

    def unable(self, setting: Setting) -> str | None:
        self.same_gpu = setting.same_gpu
        return None

    def start(self, setting: Setting, folder: Any, max_rank: int) -> Server:
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "rollout_server.cli",
            str(folder),
            "--port",
            str(port),
            "--max-lora-rank",
            str(max_rank),
            *setting.engine_flags,
        ]
        log = setting.work / f"{folder.name}-lockstep-{max_rank}.log"
        return Server("rollout-server", command, port, log, environment(setting.server_device), ready="/ready")

    @contextlib.contextmanager
    def path(self, row: str, server: Server, model: PeftModel) -> Iterator[OurPath]:
        if TRANSPORTS[row] == "collective" and self.same_gpu:
            raise Skip("needs two GPUs: NCCL joins no two processes on one")
        with RolloutClient(server.url) as client:
            path = OurPath(client, model, row)
            path.push(0)  # what a transport refuses at its first use
            try:
                yield path
            finally:
                with contextlib.suppress(LockstepError):
                    path.close()


def under_load(path: OurPath, server: Server, model: PeftModel, setting: Setting, vocab: int) -> dict[str, Any]:
    """Pushes while requests are being decoded, and what they cost those in tokens per second."""
    prompts, steps = fresh_prompts(vocab, seed=1), iter(range(10_000, 10**9))
    samples: list[Sample] = []

    def push() -> None:
        samples.append(one_push(path, model, next(steps), next(prompts)))

    decode = decode_under_pushes(server.url, path.lease.run_id, setting, push, vocab)
    return {**summarize(samples), "under_load": decode}
