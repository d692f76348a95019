"""Requests and responses of `/v1/generate` and `/v1/score`: token ids in, token ids out."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from shared.bounds import Count, FewFields, TokenIds
from shared.images import Image
from shared.sampling import SamplingParams
from shared.weights import RUN_ID_PATTERN, WeightVersion

#: A stream of groups is never silent for longer: where no group has finished, it holds a blank line.
HEARTBEAT_SECONDS = 5.0

#: Of one prompt; how many a server takes is its own to say.
Images = Annotated[list[Image], Field(fail_fast=True, max_length=4096)]

PolicySelector = Literal["latest", "base"] | WeightVersion


def _finite(values: list[float | None]) -> list[float | None]:
    if None not in values and math.isfinite(sum(values)):  # type: ignore[arg-type]  # at once: there are many
        return values
    return [value if value is not None and math.isfinite(value) else None for value in values]


#: Of tokens; None (null) where the model computed NaN or infinity, which JSON has no numbers for.
Logprobs = Annotated[list[float | None], AfterValidator(_finite)]


class Prompt(FewFields):
    """Exactly one of token ids, text, or chat messages (templated by the server).

    The content of a message is a string or a list of parts. Where the model's template shows nothing of one of the two,
    content that is text alone is laid out as the other; where it leaves out a text of a user or system either way, 400.
    """

    model_config = ConfigDict(extra="forbid")

    token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    text: str | None = Field(None, min_length=1)
    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=2**16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="of this prompt, instead of sampling.seed")
    images: Images = Field(
        [],
        description="in the order of the prompt. Token ids hold one token for each image, or all those that the "
        "model's processor makes of it; messages hold as many parts of type `image`, without contents",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Prompt:
        if sum(form is not None for form in (self.token_ids, self.text, self.messages)) != 1:
            raise ValueError("a prompt takes exactly one of token_ids, text, messages")
        return self


class PolicyRequest(FewFields):
    """Which weights a request wants; shared by generate and score."""

    model_config = ConfigDict(extra="forbid")

    run_id: str | None = Field(None, pattern=RUN_ID_PATTERN, description="may be left out where one run is served")
    policy: PolicySelector = Field(
        "latest", description="latest, base, or a version as a precondition: 409 if it is not the one being served"
    )
    min_step: Count | None = Field(None, description="wait until this step is served")
    wait_s: float = Field(0.0, ge=0.0, le=3600.0, description="how long to wait for min_step")

    @model_validator(mode="after")
    def _consistent(self) -> PolicyRequest:
        if self.policy == "base" and self.min_step is not None:
            raise ValueError("min_step says nothing about the base; leave it out or ask for policy=latest")
        if isinstance(self.policy, WeightVersion) and self.run_id not in (None, self.policy.run_id):
            raise ValueError(f"run_id={self.run_id} contradicts policy={self.policy}")
        return self


class GenerateRequest(PolicyRequest):
    """`sampling.n` completions for each prompt."""

    prompts: Annotated[list[Prompt], Field(fail_fast=True)] = Field(min_length=1, max_length=2**20)
    sampling: SamplingParams = SamplingParams()
    chat_template_kwargs: dict[str, Any] = Field({})
    return_text: bool | None = Field(None, description="decode completions; default: unless prompts are token ids")
    skip_special_tokens: bool = Field(True, description="in the decoded text only; token ids always keep them")
    stream: bool = Field(False, description="answer groups as NDJSON lines in the order they finish")


class VersionSpan(BaseModel):
    """Tokens [start, end) were sampled from `version`. `kv`: fresh, or carried over from older weights."""

    version: WeightVersion | None = Field(description="None: the base model")
    start: int
    end: int
    kv: Literal["fresh", "carried"] = "fresh"


class Completion(BaseModel):
    """One sampled completion; `spans` are contiguous and cover every token."""

    token_ids: list[int]
    logprobs: Logprobs = Field(
        description="ln p of each sampled token under the distribution it was drawn from; null where it is not finite"
    )
    log_kept_mass: Logprobs | None = Field(
        None,
        description="with top_k, top_p or min_p, and of models that see images, whose tokens are never drawn: ln of "
        "the mass that was kept of the distribution each token was drawn from, so that logprobs + log_kept_mass are "
        "the logprobs before truncation; None: unknown, or nothing cut",
    )
    finish_reason: Literal["stop", "length", "abort", "repetition"]
    stop_reason: int | str | None = None
    spans: list[VersionSpan]
    text: str | None = None

    @property
    def uncut_logprobs(self) -> list[float | None]:
        """ln p [T] before truncation, as far as the kept mass is known; None where it is not finite."""
        if self.log_kept_mass is None:
            return list(self.logprobs)
        pairs = zip(self.logprobs, self.log_kept_mass, strict=True)
        return [None if logprob is None or mass is None else logprob + mass for logprob, mass in pairs]


class RolloutGroup(BaseModel):
    """The completions of one prompt."""

    prompt_index: int
    prompt_token_ids: list[int] = Field(description="as the model saw them, with all tokens of images")
    image_digests: list[str] = Field([], description="of the pixels of the prompt's images, as RGB")
    completions: list[Completion]


class GenerateResponse(BaseModel):
    """Groups in the order of the prompts."""

    epoch: str
    groups: list[RolloutGroup]


class ScoreRequest(PolicyRequest):
    """Teacher-forced logprobs of given sequences at temperature 1, nothing truncated."""

    sequences: Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        min_length=1, max_length=2**20, description="each of at least two token ids"
    )
    images: Annotated[list[Images], Field(fail_fast=True, max_length=2**20)] = Field(
        [], description="of each sequence, which holds all tokens of its images; left out where none has any"
    )

    @model_validator(mode="after")
    def _scorable(self) -> ScoreRequest:
        if any(len(sequence) < 2 for sequence in self.sequences):
            raise ValueError("sequences: each needs at least two token ids; the first has no logprob")
        if self.images and len(self.images) != len(self.sequences):
            raise ValueError(f"images: {len(self.images)} lists for {len(self.sequences)} sequences; send one for each")
        return self


class ScoreResponse(BaseModel):
    """`logprobs[i][t]` is ln p(sequence[t + 1] | sequence[: t + 1]), null where it is not finite."""

    epoch: str
    version: WeightVersion | None
    logprobs: list[Logprobs]
    image_digests: list[list[str]] = Field([], description="of the pixels of each sequence's images, as RGB")
