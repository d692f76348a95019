"""Sessions: conversations of an agent with the served policy, recorded as the engine saw them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shared.rollouts import Logprobs, PolicyRequest, VersionSpan
from shared.sampling import SamplingParams
from shared.weights import WeightVersion

Ended = Literal["deleted", "max_calls", "max_tokens", "max_seconds", "run_ended", "superseded"]

#: Limits of the limits of a session.
MOST_CALLS, MOST_TOKENS = 4096, 2**23
_Label = Annotated[str, Field(max_length=1024)]
_METADATA_KIB = 16


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    if size > _METADATA_KIB * 2**10:
        raise ValueError(f"metadata holds {size} bytes, more than {_METADATA_KIB} KiB: keep it on your side")
    return metadata


class SessionRequest(PolicyRequest):
    """Opens a session: `POST /v1/sessions`.

    `policy` and `min_step` say what the first call samples from, as in `/v1/generate`.
    """

    follow: bool = Field(
        False, description="later calls sample from the newest version; else all calls sample from the first one's"
    )
    sampling: SamplingParams = Field(
        SamplingParams(max_tokens=None),
        description="the trainer's; n, seed, stop and structured_outputs are the client's, max_tokens bounds the "
        "client's",
    )
    on_conflict: Literal["override", "refuse"] = Field(
        "override", description="what happens to a call that asks for other sampling parameters"
    )
    max_calls: int = Field(256, ge=1, le=MOST_CALLS)
    max_tokens: int = Field(2**17, ge=1, le=MOST_TOKENS, description="sampled and prompted tokens in all trajectories")
    max_seconds: float = Field(3600.0, gt=0.0, le=86400.0, description="from its opening to its end")
    accept_reward: bool = Field(False, description="whether its own token may set its reward; without tokens, anyone")
    metadata: Annotated[dict[_Label, _Label], AfterValidator(_bounded)] = Field(
        {}, max_length=64, description="returned as it came; 16 KiB in all"
    )


class SessionOpened(BaseModel):
    """The answer to `SessionRequest`.

    `token` opens this session and nothing else; on a server without tokens it is optional. `path` is the base of the
    session's OpenAI and Anthropic routes: `{path}/chat/completions`, `{path}/messages`.
    """

    session_id: str
    token: str
    path: str
    version: WeightVersion | None


class Trajectory(BaseModel):
    """Calls of a session, each of which begins with all tokens of the one before.

    A session is one trajectory unless its client rewrote the history, or made calls side by side.

    Attributes:
        token_ids: prompts and sampled tokens [T] in the order in which the model saw them.
        sampled: ranges [start, end) of `token_ids` that this trajectory's calls sampled, in order. A token that two
            trajectories share is in the ranges of the first one only.
        logprobs, log_kept_mass: of the sampled tokens, over all ranges, as in `Completion`.
        spans: versions of the sampled tokens; positions count sampled tokens, not `token_ids`.
        calls: indices of its calls in the session, from 0 in the order in which they were admitted.
        finish_reasons: one for each call.
    """

    token_ids: list[int]
    sampled: list[tuple[int, int]]
    logprobs: Logprobs
    log_kept_mass: Logprobs | None = None
    spans: list[VersionSpan]
    calls: list[int]
    finish_reasons: list[str]


class SessionRecord(BaseModel):
    """What a session has recorded so far: `GET /v1/sessions/{session_id}`; calls under way are not in it.

    Attributes:
        ended: why no further call is taken; None while it is open.
        repaired: calls whose prompt was built on the recorded ids, because rendering the same text again gave others.
        cut: calls whose client went away before they ended; they are not recorded.
    """

    session_id: str
    run_id: str | None
    ended: Ended | None
    calls: int
    running: int
    cut: int
    repaired: int
    reward: float | None
    metadata: dict[str, str]
    trajectories: list[Trajectory]


class SessionReward(BaseModel):
    """Sets the reward of a session: `POST /v1/sessions/{session_id}/reward`. The last one counts."""

    model_config = ConfigDict(extra="forbid")

    reward: float = Field(allow_inf_nan=False)
