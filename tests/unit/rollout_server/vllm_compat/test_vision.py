"""Models of images without torchvision, in every process of vLLM."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.vllm_compat import vision


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
