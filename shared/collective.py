"""What both ends of a collective group agree on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from shared.weights import WeightVersion

#: The learner's first broadcast, which makes the connections: int64 [1].
GREETING = 0x10C_57E9
POLL_SECONDS = 0.0002
#: NCCL's own watchdog must not end a process because of a peer that went away: both ends keep their own deadlines.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Announcement(BaseModel):
    """A broadcast that is about to come: another version of an adapter that the server knows from an earlier push.

    All but version and checksum is as it was then; a server that knows no such layout of this run says so.
    """

    model_config = ConfigDict(extra="forbid")

    version: WeightVersion
    checksum: str
    layout: str = Field(description="`AdapterHeader.layout_key` of the earlier push")


class GroupInvitation(BaseModel):
    """Answer to a learner that wants to push by broadcast: where to meet, as rank 0 of `size`.

    The host is that of the rollout URL.
    """

    group: str
    port: int
    size: int
    backend: str
    timeout_s: float
