"""Material of the proof of sync: sequences to score, and a canary run to push."""

from __future__ import annotations

from learner.run_dir.lease import Lease
from learner.servers.pool import ServerPool, serve_base
from learner.sync.proof import SyncProof
from learner.sync.publisher import Publisher
from shared.errors import NoFreeRun
from shared.rollouts import GenerateRequest, PolicySelector, Prompt
from shared.sampling import SamplingParams

SEQUENCES, PROMPT_TOKENS, COMPLETION_TOKENS = 4, 64, 24


def probe_sequences(pool: ServerPool, prompts: list[list[int]]) -> list[list[int]]:
    """Return ends of the first distinct prompts, each with a greedy completion: text like the policy will see.

    Args:
        prompts: token ids [B][P].

    Returns:
        Token ids [N][T], N <= 4; prompts only where the servers' context has no room for a completion.
    """
    replica = pool.available()[0]
    policy: PolicySelector = "base" if serve_base([replica.known]) else "latest"
    distinct = list(dict.fromkeys(tuple(prompt[-PROMPT_TOKENS:]) for prompt in prompts))[:SEQUENCES]
    room = min(r.known.max_model_len for r in pool.up()) - max(map(len, distinct))
    if room < 1:
        return [list(prompt) for prompt in distinct]
    request = GenerateRequest(
        prompts=[Prompt(token_ids=list(prompt)) for prompt in distinct],
        sampling=SamplingParams(temperature=0.0, max_tokens=min(COMPLETION_TOKENS, room)),
        policy=policy,
    )
    groups = replica.client.generate(request).groups
    return [[*group.prompt_token_ids, *group.completions[0].token_ids] for group in groups]


def canary_slope(proof: SyncProof, real: Publisher, *, takeover: bool) -> float | None:
    """Push a canary adapter as a run of its own, prove that it is served, and delete it. Collective, as a push is.

    Returns:
        The slope of `SyncProof.canary`; None where a server has no room for another run: the real run's own push
        reports that.
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
    except NoFreeRun:
        return None
    finally:
        real.on_main(canary.delete_run)
        for replica in real.pool.up():
            replica.receipt = None  # from now on the real run is served
