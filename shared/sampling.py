"""Sampling parameters with vLLM's names and meanings.

Unknown names are refused instead of ignored: a misspelt field would silently change the policy's distribution.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from shared.bounds import Count, FewFields
from shared.structured_outputs import check_structured_outputs

_Words = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(fail_fast=True, max_length=1024)]
_TokenIds = Annotated[list[Count], Field(fail_fast=True, max_length=2**20)]
#: Beyond these a logit may be infinite in 32 bits, after penalty and temperature (0.01): no token has a probability.
_Bias = Annotated[float, Field(ge=-1e30, le=1e30)]
_LEAST_PENALTY, _MOST_PENALTY = 1e-4, 1e4

#: vLLM raises lower ones to this; 0 is greedy.
LEAST_TEMPERATURE = 0.01


class StructuredOutputs(FewFields):
    """Format of completions: exactly one of these, as in `vllm.sampling_params.StructuredOutputsParams`."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    # Not named `json`, which is a method of pydantic's models.
    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(self.model_dump(exclude_none=True, by_alias=True)) != 1:
            raise ValueError("structured_outputs takes exactly one of json, regex, choice, grammar, json_object")
        check_structured_outputs(
            json_schema=self.json_schema, regex=self.regex, choice=self.choice, grammar=self.grammar
        )
        return self


class SamplingParams(FewFields):
    """How completions are drawn. Every field means what it means in `vllm.SamplingParams`.

    Fields that only shape vLLM's own output (`logprobs`, `detokenize`, `output_kind` ...) are not here: responses of
    `/v1/generate` always carry token ids and the logprobs of the sampled tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(1, ge=1, lt=2**31, description="completions per prompt")
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, lt=2**31, description="0 or -1: all tokens")
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, ge=_LEAST_PENALTY, le=_MOST_PENALTY)
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="completion i of a prompt is drawn with seed + i, so seeds that are less than n apart have "
        "completions in common; -1: none",
    )
    max_tokens: int | None = Field(16, ge=1, lt=2**31, description="None: as long as the model's context allows")
    min_tokens: int = Field(0, ge=0, lt=2**31)
    stop: _Words = Field([])
    stop_token_ids: _TokenIds = Field([])
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    bad_words: _Words = Field(
        [],
        description="as vLLM tokenizes them: the tokens of a word alone, and of the word after a space where these are "
        "as many; spelt with other tokens it may come all the same, and logit_bias bans single tokens for certain",
    )
    allowed_token_ids: _TokenIds | None = None
    logit_bias: Annotated[dict[Count, _Bias], Field(fail_fast=True, max_length=2**20)] | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def truncates(self) -> bool:
        """Whether top_k, top_p or min_p may keep tokens from being drawn; greedy choices are not drawn."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _no_contradictions(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if 0.0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature}: vLLM samples at {LEAST_TEMPERATURE} or above, and would take that "
                "instead; raise it, or send 0 for the most likely tokens"
            )
        if self.temperature == 0.0 and self.n > 1:
            raise ValueError(f"n={self.n} with temperature=0: greedy completions are all the same; use n=1")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token could be sampled")
        if self.min_tokens and self.allowed_token_ids and set(self.allowed_token_ids) <= set(self.stop_token_ids):
            raise ValueError(
                f"min_tokens={self.min_tokens}, and all of allowed_token_ids are in stop_token_ids: no token could be "
                "sampled"
            )
        if any(not word for word in self.stop):
            raise ValueError("stop contains an empty string: every completion would end at once")
        if self.include_stop_str_in_output and not self.stop:
            raise ValueError("include_stop_str_in_output without stop: there is no stop string to include")
        return self
