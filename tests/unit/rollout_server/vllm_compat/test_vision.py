"""Models of images without torchvision, in every process of vLLM."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.vllm_compat import vision
from tests.integration.support.try_model import Found
from tests.support.architectures import ARCHITECTURES


def test_what_is_done_without_torchvision_is_done_where_the_configuration_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[bool] = []
    monkeypatch.setattr(vision, "do_without_torchvision", lambda: done.append(True))
    sent = pickle.dumps({"lockstep_images": vision.InEveryProcess("text")})
    assert done == []
    arrived = pickle.loads(sent)  # noqa: S301 - from the line above
    assert done == [True]
    assert json.dumps(arrived) == '{"lockstep_images": "text"}'
    pickle.loads(pickle.dumps(arrived))  # noqa: S301 - on its way to a worker
    assert done == [True, True]


class _Processor:
    """vLLM's, as far as it is changed: an image is two tokens 9."""

    def __init__(self) -> None:
        self.expanded: list[dict[str, Any]] = []
        self.info = SimpleNamespace(parse_mm_data=lambda mm_data, **_: mm_data)

    def _find_mm_placeholders(self, token_ids: list[int], updates: Any) -> dict[str, list[int]]:
        return {"image": [at for at in range(len(token_ids) - 1) if token_ids[at : at + 2] == [9, 9]]}

    def _maybe_apply_prompt_updates(self, **given: Any) -> str:
        self.expanded.append(given)
        return "expanded"


def _before_0_32(token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_ids": token_ids, "mm_prompt_updates": {}, "mm_kwargs": {}, "is_update_applied": False}


def _since_0_32(token_ids: list[int]) -> dict[str, Any]:
    return {"mm_res": SimpleNamespace(prompt_ids=token_ids, prompt_updates={})}


@pytest.mark.parametrize("given", [_before_0_32, _since_0_32])
def test_ids_that_hold_the_tokens_of_their_images_are_not_expanded(given: Any) -> None:
    processor = _Processor()
    vision.take_our_images(SimpleNamespace(renderer=SimpleNamespace(get_mm_processor=lambda: processor)))
    items = SimpleNamespace(get_all_counts=lambda: {"image": 1})
    whole, short = given([1, 9, 9, 2]), given([1, 9, 2])
    assert processor._maybe_apply_prompt_updates(mm_items=items, **whole) == ([1, 9, 9, 2], {"image": [1]})
    assert processor._maybe_apply_prompt_updates(mm_items=items, **short) == "expanded"
    assert processor.expanded == [{"mm_items": items, **short}]


def test_media_of_others_are_not_parsed_but_what_a_processor_parses_again_is() -> None:
    processor = _Processor()
    vision.take_our_images(SimpleNamespace(renderer=SimpleNamespace(get_mm_processor=lambda: processor)))
    ours = {"image": vision.Pictures(["a picture"])}
    assert processor.info.parse_mm_data(ours) == ours
    for others in ({"image": ["a picture"]}, {"video": vision.Pictures(["a picture"])}):
        with pytest.raises(ValueError, match="images are taken by"):
            processor.info.parse_mm_data(others)
    assert processor.info.parse_mm_data({"image": ["a picture"]}, validate=False) == {"image": ["a picture"]}


def _config_of(kind: str) -> Any:
    options = SimpleNamespace(language_model_only=False)
    return SimpleNamespace(
        is_multimodal_model=True, multimodal_config=options, hf_config=SimpleNamespace(model_type=kind)
    )


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_every_family_that_is_served_was_found_to_agree(family: str) -> None:
    """In docs/models.json, by `python -m docs.models`."""
    (row,) = (name for name, architecture in ARCHITECTURES.items() if architecture.sees == family)
    found = json.loads((Path(__file__).parents[4] / "docs" / "models.json").read_text())["found"][row]
    assert Found(**found["images"]).agrees(row)
    assert vision.refusal(_config_of(family)) is None


@pytest.mark.parametrize(("family", "why"), [("gemma3", "both ways"), ("pixtral", "not been compared")])
def test_others_are_refused_with_the_reason(family: str, why: str) -> None:
    refusal = vision.refusal(_config_of(family)) or ""
    assert f"images of a {family}" in refusal
    assert why in refusal
