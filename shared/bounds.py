"""Bounds of the wire: every integer has a range, every list a length, and no refusal lists a million errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

#: Range of counts (steps, fences, sizes): what 64 bits hold.
Count = Annotated[int, Field(ge=0, lt=2**63)]
#: A digest, a fingerprint, a key.
Digest = Annotated[str, Field(max_length=256)]
#: Lists of token ids. Their range is checked against the vocabulary.
MAX_TOKEN_IDS = 2**23
TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]

_MAX_FIELDS = 64


class FewFields(BaseModel):
    """A model that is refused at once where it comes with far more fields than it has: each would be an error."""

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > _MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, of which most are unknown")
        return data
