"""Models of images without torchvision, in every process of vLLM."""

from __future__ import annotations

import importlib.util
import json
import pickle
import tracemalloc
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from rollout_server.vllm_compat import vision
from shared.errors import InvalidRequest
from shared.images import memory_of
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


def test_processes_without_num2words_load_where_torchvision_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: torchvision is installed, and SmolVLM's processor asks for num2words."""
    find_spec = importlib.util.find_spec
    there = ModuleSpec("torchvision", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: there if name == "torchvision" else find_spec(name, *more)
    )
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    config = SimpleNamespace(additional_config={"own": 1})
    vision.prepare(config)
    sent = pickle.dumps(config.additional_config)
    assert processing_smolvlm.num2words is None
    arrived = pickle.loads(sent)  # noqa: S301 - from the line above
    assert arrived["own"] == 1
    assert processing_smolvlm.num2words is not None


def _scaling(processor: Any) -> dict[str, int]:
    parts = SimpleNamespace(get_hf_processor=lambda: SimpleNamespace(image_processor=processor))
    renderer = SimpleNamespace(get_mm_processor=lambda: SimpleNamespace(info=parts))
    return vision.scaling(SimpleNamespace(renderer=renderer))


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        Qwen2VLImageProcessorPil(),
        Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 2**16, "longest_edge": 2**24}),
        SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
    ],
    ids=["clip", "qwen2", "qwen3", "smolvlm"],
)
def test_what_a_processor_takes_was_counted(processor: Any) -> None:
    scaling = tuple(_scaling(processor).values())
    assert bool(scaling[1]) is isinstance(processor, CLIPImageProcessorPil)
    for size in ((1, 1), (1, 20), (13, 255), (43, 73), (28, 81), (160, 8), (450, 23)):
        picture = Image.new("RGB", size)
        tracemalloc.start()
        made = processor([picture], return_tensors="pt")
        peak = tracemalloc.get_traced_memory()[1]  # of NumPy's arrays; torch's beside them
        tracemalloc.stop()
        kept = sum(tensor.nbytes for tensor in made.values())
        assert kept <= memory_of(*size, *scaling), size
        if scaling[1]:
            assert peak <= memory_of(*size, *scaling), size


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


def _config_of(kind: str, tower: str = "clip_vision_model") -> Any:
    options = SimpleNamespace(language_model_only=False)
    config = SimpleNamespace(model_type=kind, vision_config=SimpleNamespace(model_type=tower))
    return SimpleNamespace(is_multimodal_model=True, multimodal_config=options, hf_config=config)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_every_family_that_is_served_was_found_to_agree(family: str) -> None:
    """In docs/models.json, by `python -m docs.models`."""
    (row,) = (name for name, architecture in ARCHITECTURES.items() if architecture.sees == family)
    found = json.loads((Path(__file__).parents[4] / "docs" / "models.json").read_text())["found"][row]
    assert Found(**found["images"]).agrees(row)
    assert vision.refusal(_config_of(family)) is None


def test_a_family_is_served_with_the_part_that_was_compared() -> None:
    refusal = vision.refusal(_config_of("llava", "siglip_vision_model")) or ""
    assert "images of a llava whose vision_config is a siglip_vision_model, not a clip_vision_model" in refusal
    assert vision.refusal(_config_of("qwen2_vl", "qwen2_vl")) is None


@pytest.mark.parametrize(("family", "why"), [("gemma3", "both ways"), ("pixtral", "not been compared")])
def test_others_are_refused_with_the_reason(family: str, why: str) -> None:
    refusal = vision.refusal(_config_of(family)) or ""
    assert f"images of a {family}" in refusal
    assert why in refusal


@pytest.mark.parametrize("alone", [False, True])
def test_tokens_of_media_that_nothing_fills_are_refused(alone: bool) -> None:
    """Also where the language model is served alone (--language-model-only)."""
    options = SimpleNamespace(language_model_only=alone)
    config = SimpleNamespace(image_token_id=7, video_token_id=8, audio_token_index=9, image_token_index=99)
    model = SimpleNamespace(
        is_multimodal_model=True, multimodal_config=options, hf_config=config, get_vocab_size=lambda: 20
    )
    vision.check_placeholders(model, "it", [1, 2], 0)
    for token in (7, 8, 9):
        with pytest.raises(InvalidRequest, match=rf"^it holds tokens of an image.*\(id {token}\), and nothing fills"):
            vision.check_placeholders(model, "it", [1, token, 2], 0)
        with pytest.raises(InvalidRequest, match=rf"^the prompt holds .*\(id {token}\)"):
            vision.check_text(model, {"type": "token", "prompt_token_ids": [token]})
    vision.check_placeholders(model, "it", [7, 7, 1], 1)
    with pytest.raises(InvalidRequest, match=r"^it has 2 images and 1 tokens"):
        vision.check_placeholders(model, "it", [1, 7], 2)
    with pytest.raises(InvalidRequest, match=r"\(id 8\), and nothing fills"):
        vision.check_placeholders(model, "it", [7, 8], 1)
    text = SimpleNamespace(is_multimodal_model=False, hf_config=config)
    vision.check_placeholders(text, "it", [7, 8, 9], 0)
