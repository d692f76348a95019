"""Contract between both ends of a collective group."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from shared.bounds import Digest, FewFields
from shared.weights import WeightVersion

#: The learner's first broadcast, which opens the connections: int64 [1].
GREETING = 0x10C_57E9
POLL_SECONDS = 0.0002
#: NCCL's watchdog must not end a process because of a lost peer: both ends keep deadlines of their own. Nor may it look
#: into the store, which is closed once all have met. After an error it sleeps for four times WAIT_TIMEOUT_DUMP_MILSEC,
#: a minute by default, for a dump that is off; who drops the group waits for it.
NCCL_SETTINGS = {
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


class Announcement(FewFields):
    """Announcement of a broadcast: a new version of an adapter that the server knows from an earlier push.

    All but version and checksum is unchanged; a server that knows no such layout of this run refuses it.
    """

    model_config = ConfigDict(extra="forbid")

    version: WeightVersion
    checksum: Digest
    layout: Digest = Field(description="`AdapterHeader.layout.key` of the earlier push")


class GroupInvitation(BaseModel):
    """Invitation for a learner that pushes by broadcast, to join as rank 0 of `size`."""

    group: str
    host: str | None = Field(None, description="where the ranks meet; None: the rollout URL's host")
    port: int
    size: int
    backend: str
    timeout_s: float
