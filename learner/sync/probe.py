"""What the proof of sync is made with: sequences to score, and a canary run to push."""

from __future__ import annotations

from learner.run_dir.lease import Lease
from learner.servers.pool import ServerPool, serve_base
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from shared.errors import ErrorCode, LockstepError
from shared.rollouts import GenerateRequest, PolicySelector, Prompt
from shared.sampling import SamplingParams

SEQUENCES, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 64, 24


def probe_sequences(pool: ServerPool, prompts: list[list[int]]) -> list[list[int]]:
    """Prompts of the task, each with a greedy completion: text like the policy will see. Token ids [N][T]."""
    replica = pool.available()[0]
    policy: PolicySelector = "base" if serve_base([replica.known]) else "latest"
    distinct = list(dict.fromkeys(tuple(p[-PROMPT_TOKENS:]) for p in prompts))[:SEQUENCES]
    room = min(m.known.max_model_len for m in pool.up()) - max(map(len, distinct))
    if room < 1:
        return [list(p) for p in distinct]
    sampling = SamplingParams(temperature=0.0, max_tokens=min(COMPLETION_TOKENS, room))
    asked = [Prompt(token_ids=list(p)) for p in distinct]
    answer = replica.client.generate(GenerateRequest(prompts=asked, sampling=sampling, policy=policy))
    return [[*g.prompt_token_ids, *g.completions[0].token_ids] for g in answer.groups]


def canary_slope(proof: SyncProof, real: Publisher, *, takeover: bool) -> float | None:
    """Push a throw-away adapter as a run of its own, see it served, and delete it; the slope of `SyncProof.canary`.

    Collective, as a push is. None where a server has no place for another run: the real run's own push says so.
    """
    lease = Lease(f"{real.lease.run_id[:57]}.canary", real.lease.secret, 0)
    canary = Publisher(
        real.pool,
        real.model,
        lease,
        base_weights=real.base_weights,
        takeover=takeover,
        transport="http",
        on_main=real.on_main,
    )
    try:
        return proof.canary(lambda: canary.push(0).version)
    except LockstepError as error:
        if error.code is not ErrorCode.NO_FREE_RUN:
            raise
        return None
    finally:
        real.on_main(canary.delete_run)
        for replica in real.pool.up():
            replica.receipt = None  # what is served from now on is the real run
