"""Prompts with images as vLLM's engine takes them (0.32).

A prompt's ids come as a learner's processor has made them, with a token for each patch of an image, or with one token
for each image. vLLM's processor takes the second form only, and would expand what has been expanded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from types import MethodType
from typing import Any

from rollout_server.vllm_compat import versions
from shared import image_processors
from shared.errors import InvalidRequest
from shared.messages import one_line

#: Kinds of models whose images have been compared with transformers', as `model_type`.
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
#: Of media that may be fetched from nowhere: a name that no host can have.
NO_MEDIA_DOMAIN = "none.invalid"


def has_torchvision() -> bool:
    """Return whether torchvision is installed."""
    return importlib.util.find_spec("torchvision") is not None


def do_without_torchvision() -> None:
    """Let models of images load where torchvision is missing (CPUs); called in every process before one is loaded.

    vLLM's Qwen2-VL imports the processor that needs it, of which transformers has a version without. Which classes a
    model has vLLM finds out in a process of its own, which would not know this.
    """
    if has_torchvision():
        return
    import transformers
    from vllm.model_executor.models import registry

    image_processors.do_without_videos(transformers)
    name = "transformers.models.qwen2_vl.image_processing{}_qwen2_vl"
    without: Any = importlib.import_module(name.format("_pil"))
    without.Qwen2VLImageProcessor = without.Qwen2VLImageProcessorPil
    sys.modules.setdefault(name.format(""), without)
    registry._run_in_subprocess = lambda inspect: inspect()


class InEveryProcess(str):
    """Text in vLLM's configuration that does without torchvision in each process that gets the configuration.

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
    if not versions.takes_images(model_config) or kind in FAMILIES:
        return None
    return (
        f"a {kind} sees or hears in a way that has not been compared with transformers'; served are "
        f"{', '.join(FAMILIES)}, and of others the language model alone (--language-model-only)"
    )


def accept_expanded_prompts(engine: Any) -> None:
    """Let the engine's processor take ids that hold the tokens of their images already."""
    processor = engine.renderer.get_mm_processor()
    expand = processor._maybe_apply_prompt_updates

    def find_or_expand(self: Any, mm_items: Any, mm_res: Any) -> Any:
        found = self._find_mm_placeholders(mm_res.prompt_ids, mm_res.prompt_updates)
        counts = mm_items.get_all_counts()
        if all(len(found.get(modality, ())) == count for modality, count in counts.items()):
            return mm_res.prompt_ids, found
        return expand(mm_items, mm_res)

    processor._maybe_apply_prompt_updates = MethodType(find_or_expand, processor)


async def engine_prompt(engine: Any, what: str, token_ids: list[int], pictures: list[Any]) -> dict[str, Any]:
    """Return vLLM's engine input for ids and the images that they hold tokens for; its ids are what the model sees.

    Args:
        what: names the prompt in errors.
        pictures: PIL's, in the order of the prompt.

    Raises:
        LockstepError: `invalid_request` where ids and images do not belong together.
    """
    token = image_token(engine.model_config)
    given = token_ids.count(token)
    if given < len(pictures):
        raise InvalidRequest(
            f"{what} has {len(pictures)} images and {given} tokens for them (id {token}): its ids must hold one token "
            "for each image, or all that the model's processor makes of it"
        )
    prompt = {"prompt_token_ids": token_ids, "multi_modal_data": {"image": pictures}}
    try:
        made = await engine.renderer.process_for_engine_async(prompt, time.time())
    except (*versions.refusals(), RuntimeError) as error:
        raise InvalidRequest(f"{what}: the model's processor refuses its images: {one_line(error)}") from error
    filled = sum(place.get_num_embeds() for place in made["mm_placeholders"]["image"])
    if made["prompt_token_ids"].count(token) != filled:
        raise InvalidRequest(
            f"{what} holds {given} tokens of images, and this server's processor makes others of the images: learner "
            "and server process them differently; give both the same files (preprocessor_config.json)"
        )
    return dict(made)


def image_token(model_config: Any) -> int:
    """Return the id of the token that stands for a part of an image."""
    return int(model_config.hf_config.image_token_id)
