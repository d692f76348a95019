"""Versions of a policy; manifests and receipts of pushes; state of runs and servers."""

from __future__ import annotations

import re
from functools import total_ordering
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared import PROTOCOL_VERSION
from shared.bounds import Count, Digest, FewFields
from shared.images import memory_of

RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

#: The values of vLLM's --max-lora-rank (0.26 to 0.33).
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: A mixture of experts with 128 experts in each of 94 layers has 36,000.
MAX_MODULES = 2**17
#: Ten years: as good as for ever.
MAX_KEEP_SECONDS = 10 * 365 * 86400
_ModuleName = Annotated[str, Field(min_length=1, max_length=1024)]

#: What happens to a run's in-flight requests when a push lands. `drain`: they finish on their version. `keep`: they
#: continue on the new one and recompute their KV. `carried`: they continue on the new one with their old KV.
InFlight = Literal["drain", "keep", "carried"]


def served_rank(rank: int) -> int:
    """Return the smallest `--max-lora-rank` that serves adapters of `rank`; raises `ValueError` where none does."""
    if rank > SERVED_RANKS[-1]:
        raise ValueError(f"rank {rank} is above {SERVED_RANKS[-1]}, the highest that vLLM serves")
    return next(served for served in SERVED_RANKS if rank <= served)


@total_ordering
class WeightVersion(FewFields):
    """Version of the weights: optimizer steps done in one run. Ordered by (fence, step) within a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str = Field(pattern=RUN_ID_PATTERN)
    fence: Count = Field(0, description="grows each time a learner takes the run over")
    step: Count = Field(description="optimizer steps done; 0 is the initial adapter")

    def __lt__(self, other: WeightVersion) -> bool:
        if self.run_id != other.run_id:
            raise ValueError(f"versions of different runs have no order: {self} and {other}")
        return (self.fence, self.step) < (other.fence, other.step)

    def __str__(self) -> str:
        return f"{self.run_id}@{self.fence}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> WeightVersion:
        """Parse the form that `str` writes; raises `ValueError`."""
        match = re.fullmatch(r"([^@]+)@(\d{1,18})\.(\d{1,18})", text.strip(), re.ASCII)
        if match is None or not re.match(RUN_ID_PATTERN, match[1]):
            raise ValueError(f"{text!r} is no version; it is written RUN_ID@FENCE.STEP")
        return cls(run_id=match[1], fence=int(match[2]), step=int(match[3]))


class BaseFingerprint(BaseModel):
    """Identity of a base model, see `shared.fingerprint`. None: not known (dummy or pre-quantized weights)."""

    model_config = ConfigDict(frozen=True)

    weights: str | None
    tokenizer: str | None
    chat_template: str | None


class ModuleSpec(FewFields):
    """One adapted module: A is [rank, in_features], B is [out_features, rank] with the scaling already in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1, lt=2**31)
    scaling: float = Field(
        allow_inf_nan=False,
        description="PEFT's scaling (alpha/r, alpha/sqrt(r) with rsLoRA); already multiplied into B",
    )


_Modules = Annotated[dict[_ModuleName, ModuleSpec], Field(fail_fast=True)]


class AdapterManifest(FewFields):
    """Announcement of a push, in the header of the safetensors blob.

    `modules` maps PEFT module names without the `base_model.model.` prefix (`model.layers.0.self_attn.q_proj`) to
    their rank and scaling. The blob holds `NAME.lora_A.weight` and `NAME.lora_B.weight` for each of them, in `dtype`.
    """

    model_config = ConfigDict(extra="forbid")

    protocol: int = PROTOCOL_VERSION
    version: WeightVersion
    base_weights: Digest | None = Field(description="fingerprint of the base the adapter was trained on; None: unknown")
    dtype: Literal["float32", "bfloat16", "float16"]
    modules: _Modules = Field(min_length=1, max_length=MAX_MODULES)
    peft_config: dict[str, Any] = Field(description="the PEFT LoraConfig, for checks and for people")
    checksum: Digest = Field(description="over tensor names, dtypes, shapes and bytes, see shared.checksum")


class PushReceipt(BaseModel):
    """Result of a push. Nothing is served before every worker has acknowledged."""

    epoch: str
    version: WeightVersion
    install_seq: int = Field(description="the server's own count of installs, never reused")
    checksum: str
    bytes: int
    transport: Literal["http", "collective"] = "http"
    workers: int = Field(description="workers that have verified the checksum of the installed tensors")
    modules: int = Field(description="modules written on each worker")
    transfer_seconds: float = Field(description="until the tensors are in a buffer on every worker's device")
    install_seconds: float = Field(description="writing the slot and reading it back")
    flip_seconds: float
    wait_seconds: float = Field(description="waiting for a free slot, or (merge, drain) for running requests to finish")
    pause_seconds: float = Field(0.0, description="for which no request of this server was decoding")
    update_share: float | None = Field(
        None, description="merge: regression of the weights' change on B A, over some rows of each; 1: all arrived"
    )
    update_error: float | None = Field(
        None, description="merge: norm of what rounding changed, relative to the update's; it has no direction"
    )
    repeated: bool = Field(False, description="the same push was already installed; nothing was done again")


class RunState(BaseModel):
    """One run as this server sees it."""

    run_id: str
    version: WeightVersion | None
    checksum: str | None
    install_seq: int | None
    slots: list[dict[str, Any]]
    running_requests: int
    finished: bool = Field(False, description="its training has ended; another run may get its place")
    kept_seconds: float | None = Field(None, description="of a finished run: for so long nobody else gets its place")
    seconds_since_push: float | None = None


class TrainingEnd(BaseModel):
    """A learner's word that its training has ended with `version`."""

    model_config = ConfigDict(extra="forbid")

    version: WeightVersion
    keep_seconds: float = Field(0.0, ge=0, le=MAX_KEEP_SECONDS, description="nobody gets its place before that")


class ServerState(BaseModel):
    """State of a server, which a learner checks before it uses the server."""

    protocol: int = PROTOCOL_VERSION
    epoch: str = Field(description="random at start: when it changes, the server has forgotten everything")
    ready: bool
    draining: bool = Field(False, description="about to leave: takes no new requests, finishes running ones")
    model: str
    base: BaseFingerprint
    vllm_version: str
    device: str
    dtype: str
    lora_dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    max_lora_rank: int
    slots_per_run: int
    slot_bytes: int = Field(0, description="memory of one adapter slot on each worker; 0 where there are none (merge)")
    max_runs: int
    apply: Literal["adapter", "columns", "merge"] = Field(
        "adapter", description="merge: no base is served while a run is; columns: LoRA and base are rounded once"
    )
    workers: int
    devices: list[str | None] = Field([], description="UUID of each worker's GPU; null for a CPU")
    logprobs_mode: str
    policy_altering: list[str] = Field(
        [], description="engine options that make logprobs differ from the policy's (speculation, quantized KV cache)"
    )
    allowed_altering: bool = False
    deterministic: bool = Field(False, description="equal seeded requests, one at a time, have equal completions")
    shares_gpu: bool = Field(False, description="may be put to sleep by a learner that trains on the same GPU")
    asleep: bool = Field(False, description="requests wait until the learner, or a push, wakes it")
    quantization: str | None = Field(
        None, description="how the server quantizes the base: what it serves is then another policy than the learner's"
    )
    mixture_of_experts: bool = False
    max_images: int = Field(0, description="images that a prompt may have; 0: the server takes text only")
    max_image_bytes: int = Field(0, description="largest file of an image; 0: unknown, as of what follows")
    max_image_pixels: int = Field(0, description="pixels of one image")
    max_image_memory: int = Field(0, description="bytes of all images of a request once decoded, 30 for each pixel")
    least_image_memory: int = Field(0, description="of these, what is counted for the smallest image")
    shortest_image_edge: int = Field(
        0, description="to which the shorter edge of every image is scaled before it is cropped; 0: it is not"
    )
    sight: dict[str, str] = Field({}, description="settings of how images are processed, by name, as JSON")
    max_body_bytes: int = Field(0, description="largest body of a request; a learner cuts its requests by that")
    runs: list[RunState] = []

    def image_memory(self, width: int, height: int) -> int:
        """Return the bytes that the server counts for an image of this size."""
        return memory_of(width, height, self.least_image_memory, self.shortest_image_edge)
