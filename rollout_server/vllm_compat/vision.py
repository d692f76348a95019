"""Prompts with images as vLLM's engine takes them (0.26 to 0.33).

A prompt's ids come as a learner's processor has made them, with a token for each patch of an image, or with one token
for each image. vLLM's processor takes the second form only, and would expand what has been expanded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import MethodType
from typing import Any

from rollout_server.vllm_compat import pil_processors, versions
from shared import image_processors
from shared.errors import InvalidRequest
from shared.images import LARGEST_ASPECT
from shared.messages import one_line

#: Kinds of models whose images have been compared with transformers', as `model_type`.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava")
#: Those of which one part that sees was compared among several: that part's `model_type`. LLaVA's is Pixtral's, too.
_TOWERS = {"llava": "clip_vision_model"}
#: Why others are not among them, where that is known.
_OTHERWISE = {
    "gemma3": "tokens of an image attend to each other both ways in transformers, and in vLLM with a few attention "
    "backends only: a tiny one was off by 0.08 nats on a CPU",
    "qwen3_5": "vLLM's CPU backend computes its gated delta nets in bfloat16 only, where what a picture changes (0.27 "
    "nats of a tiny one) is too near to rounding (0.11)",
}
#: Sizes of which processors make much for so few pixels: a square, and two whose edges are rounded up.
_SMALL = ((32, 32), (8, 28), (8, 8 * LARGEST_ASPECT))
#: Of media that may be fetched from nowhere: a name that no host can have.
NO_MEDIA_DOMAIN = "none.invalid"


def do_without_torchvision() -> None:
    """Let models of images, and their processors, load where torchvision is missing (CPUs), or num2words."""
    import transformers

    pil_processors.do_without_torchvision()
    image_processors.do_without_videos(transformers)


class InEveryProcess(str):
    """Text in vLLM's configuration that does without torchvision, and num2words, in each process that gets it.

    vLLM's engine process makes a processor before anything of ours is imported there.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (str(self),)


def _arrived(text: str) -> InEveryProcess:
    do_without_torchvision()
    return InEveryProcess(text)


def image_limits(count: int) -> dict[str, int]:
    """Return vLLM's `limit_mm_per_prompt`: images, and nothing else."""
    return {"image": count, "video": 0, "audio": 0}


def refusal(model_config: Any) -> str | None:
    """Return why a model that sees or hears cannot be served; None if it can."""
    kind = model_config.hf_config.model_type
    tower = getattr(getattr(model_config.hf_config, "vision_config", None), "model_type", None)
    if not versions.takes_images(model_config) or (kind in FAMILIES and tower == _TOWERS.get(kind, tower)):
        return None
    if kind in _TOWERS:
        kind = f"{kind} whose vision_config is a {tower}, not a {_TOWERS[kind]}"
    why = _OTHERWISE.get(kind, "it sees or hears in a way that has not been compared with transformers'")
    return (
        f"images of a {kind}: {why}; served are {', '.join(FAMILIES)}, and of others the language model alone "
        "(--language-model-only)"
    )


def prepare(vllm_config: Any) -> None:
    """Let the engine's process do without what is missing for videos, as this one does; each part has its own test."""
    own = {"lockstep_images": InEveryProcess("without videos")}
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), **own}


class Pictures(list[Any]):
    """PIL's images that our own routes have decoded: the only media that the engine's processor takes."""


def take_our_images(engine: Any) -> None:
    """Let the engine's processor take our own images only, and ids that hold the tokens of their images already."""
    processor = engine.renderer.get_mm_processor()
    expand, parse = processor._maybe_apply_prompt_updates, processor.info.parse_mm_data

    def find_or_expand(self: Any, **given: Any) -> Any:
        if result := given.get("mm_res"):
            token_ids, updates = result.prompt_ids, result.prompt_updates
        else:  # 0.26
            token_ids, updates = given["prompt_ids"], given["mm_prompt_updates"]
        found = self._find_mm_placeholders(token_ids, updates)
        counts = given["mm_items"].get_all_counts()
        if all(len(found.get(modality, ())) == count for modality, count in counts.items()):
            return token_ids, found
        return expand(**given)

    def parse_ours(self: Any, mm_data: Any, **more: Any) -> Any:
        again = more.get("validate") is False  # by a processor, of what it was given
        if not again and any(
            modality != "image" or not isinstance(items, Pictures) for modality, items in mm_data.items()
        ):
            raise ValueError("images are taken by /v1/generate and /v1/score only")
        return parse(mm_data, **more)

    processor._maybe_apply_prompt_updates = MethodType(find_or_expand, processor)
    processor.info.parse_mm_data = MethodType(parse_ours, processor.info)


def sight(engine: Any) -> dict[str, str]:
    """Return what decides what the model sees of an image, see `shared.image_processors.sight`."""
    processor = engine.renderer.get_mm_processor().info.get_hf_processor()
    return image_processors.sight(processor.image_processor, engine.model_config.hf_config)


def scaling(engine: Any) -> dict[str, int]:
    """Return what the model's processor makes of small images, as a server's state tells it: the bytes of one, and the
    edge to which it scales the shorter one of each before it crops.
    """
    from PIL import Image

    process = engine.renderer.get_mm_processor().info.get_hf_processor().image_processor
    made = [process([Image.new("RGB", size)], return_tensors="pt") for size in _SMALL]
    size = process.size
    return {
        # RGB is beside the model's values twice, as in `memory_of`.
        "least_image_memory": max(sum(tensor.nbytes for tensor in tensors.values()) for tensors in made) * 5 // 4,
        "shortest_image_edge": 0 if size.get("longest_edge") else size.get("shortest_edge") or 0,
    }


def check_placeholders(model_config: Any, what: str, token_ids: Sequence[int], images: int) -> None:
    """Refuse ids that hold tokens of media which nothing fills, or none for an image: `invalid_request`."""
    own = versions.image_token(model_config) if images else None
    empty = next((token for token in versions.media_tokens(model_config) if token != own and token in token_ids), None)
    if empty is not None:
        raise InvalidRequest(
            f"{what} holds tokens of an image, a video or a sound (id {empty}), and nothing fills them: leave them "
            "out, or, where the server takes images, send the image"
        )
    if own is not None and (given := token_ids.count(own)) < images:
        raise InvalidRequest(
            f"{what} has {images} images and {given} tokens for them (id {own}): its ids must hold one token "
            "for each image, or all that the model's processor makes of it"
        )


def check_text(model_config: Any, prompt: Any) -> None:
    """Refuse a prompt of vLLM's routes that holds images, or tokens for them: `invalid_request`."""
    given = prompt if isinstance(prompt, dict) else {}
    if given.get("type") == "multimodal" or "multi_modal_data" in given:
        raise InvalidRequest("images are taken by /v1/generate and /v1/score only")
    check_placeholders(model_config, "the prompt", given.get("prompt_token_ids") or (), 0)


async def engine_prompt(engine: Any, what: str, token_ids: list[int], pictures: list[Any]) -> dict[str, Any]:
    """Return vLLM's engine input for ids and the images that they hold tokens for; its ids are what the model sees.

    Args:
        what: names the prompt in errors.
        token_ids: checked (`check_placeholders`).
        pictures: PIL's, in the order of the prompt.

    Raises:
        LockstepError: `invalid_request` where ids and images do not belong together.
    """
    prompt = {"prompt_token_ids": token_ids, "multi_modal_data": {"image": Pictures(pictures)}}
    refused: tuple[type[Exception], ...] = (*versions.refusals(), RuntimeError)
    try:
        made = await engine.renderer.process_for_engine_async(prompt, time.time())
    except refused as error:
        raise InvalidRequest(f"{what}: the model's processor refuses its images: {one_line(error)}") from error
    token = versions.image_token(engine.model_config)
    filled = sum(place.get_num_embeds() for place in made["mm_placeholders"]["image"])
    if made["prompt_token_ids"].count(token) != filled:
        raise InvalidRequest(
            f"{what} holds {token_ids.count(token)} tokens of images, and this server's processor makes others of the "
            "images: learner and server process them differently; give both the same files (preprocessor_config.json)"
        )
    return dict(made)
