"""Every integer of the wire has a range, every list a length."""

from __future__ import annotations

import json
import typing
from typing import Any

import annotated_types
import pytest
from pydantic import BaseModel, ValidationError

from shared import collective, rollouts, sampling, weights
from shared.adapter_file import parse_header
from shared.errors import MalformedAdapter
from shared.rollouts import GenerateRequest, PolicyRequest
from shared.weights import WeightVersion

BIG = 10**400
#: What clients send. `prompt_token_ids` and the like in responses come from a server that the learner trusts.
SENT = [
    rollouts.Prompt,
    rollouts.PolicyRequest,
    rollouts.GenerateRequest,
    rollouts.ScoreRequest,
    sampling.SamplingParams,
    weights.WeightVersion,
    weights.ModuleSpec,
    collective.Announcement,
]


@pytest.mark.parametrize("number", [2**63, BIG, -1])
def test_numbers_beyond_64_bits(number: int) -> None:
    for fields in ({"step": number}, {"step": 0, "fence": number}):
        with pytest.raises(ValidationError):
            WeightVersion(run_id="r", **fields)
    with pytest.raises(ValidationError):
        PolicyRequest(min_step=number)
    with pytest.raises(ValidationError):
        PolicyRequest.model_validate({"policy": {"run_id": "r", "step": number}})
    WeightVersion(run_id="r", fence=2**63 - 1, step=2**63 - 1)


@pytest.mark.parametrize("model", SENT)
def test_every_integer_has_a_range(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if field.annotation in (int, int | None):
            limits = {type(limit) for limit in _metadata(field)}
            assert limits & {annotated_types.Lt, annotated_types.Le}, f"{model.__name__}.{name} has no upper limit"
            assert limits & {annotated_types.Gt, annotated_types.Ge}, f"{model.__name__}.{name} has no lower limit"


def _metadata(field: Any) -> list[Any]:
    found = list(field.metadata)
    for part in typing.get_args(field.annotation):
        found += [limit for info in getattr(part, "__metadata__", ()) for limit in getattr(info, "metadata", [info])]
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": [{"x": 1}] * 10000},
        {"prompts": [{"token_ids": [1.5] * 10000}]},
        {"prompts": [{"messages": [1] * 10000}]},
        {f"field{i}": 0 for i in range(10000)},
        {"prompts": [{"text": "a"}], "sampling": {f"field{i}": 0 for i in range(10000)}},
        {"prompts": [{"text": "a"}], "sampling": {"logit_bias": {f"x{i}": 0 for i in range(10000)}}},
    ],
)
def test_a_refusal_names_few_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        GenerateRequest.model_validate(fields)
    assert len(refusal.value.errors()) < 10


@pytest.mark.parametrize("where", ["step", "fence", "rank", "shape", "protocol"])
def test_an_adapter_of_endless_numbers(where: str) -> None:
    version = {"run_id": "r", "fence": BIG if where == "fence" else 0, "step": BIG if where == "step" else 0}
    manifest = {
        "protocol": weights.AdapterManifest.model_fields["protocol"].default,
        "version": version,
        "base_weights": None,
        "dtype": "float32",
        "modules": {"m": {"rank": BIG if where == "rank" else 1, "scaling": 1.0}},
        "peft_config": {},
        "checksum": "",
    }
    size = BIG if where == "shape" else 1
    header = {
        "__metadata__": {"lockstep_manifest": json.dumps(manifest)},
        "m.lora_A.weight": {"dtype": "F32", "shape": [1, size], "data_offsets": [0, 4 * size]},
        "m.lora_B.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * size, 4 * size + 4]},
    }
    if where == "protocol":
        parse_header(json.dumps(header).encode())
        return
    with pytest.raises(MalformedAdapter):
        parse_header(json.dumps(header).encode())


def test_an_adapter_whose_manifest_is_of_other_shapes() -> None:
    for filling in ("[" * 10000, "[]," * 2**20, '{"":0},' * 2**20):
        for header in (filling, json.dumps({"__metadata__": {"lockstep_manifest": filling}})):
            with pytest.raises(MalformedAdapter):
                parse_header(header.encode())
