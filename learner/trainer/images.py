"""Images in the rows of a `trl.GRPOTrainer`: found as TRL finds them, before it does."""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from trl import GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages

from learner.rollouts.images import with_images
from learner.servers.prompts import check_picture, encoded_image
from learner.sync.probe import SeenText
from learner.tasks.columns import check_parts, message_parts, row_images
from learner.trainer.filled_keys import distinct_runs, with_own_keys
from shared.errors import BaseMismatch, InvalidRequest, UnsupportedAdapter
from shared.image_processors import other_sight, sight
from shared.media import media_token_ids
from shared.weights import ServerState

#: Beside the image of the proof's probe.
PROBE_SIDE = 112
PROBE_TEXT = "The quick brown fox jumps over the lazy dog because 12 + 30 = 42."
#: Pixels without compression of a file that is as large as servers take by default.
_LARGE_FILE = 8 * 2**20
#: Arguments of a forward pass that hold an entry for each image.
_PIXELS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "image_position_ids")


@dataclass
class Largest:
    """The largest images of all datasets.

    Attributes:
        pixels, where: of the one with the most pixels.
        file_bytes, where_heaviest: of the heaviest file, among those that may be larger than servers take by default.
        together: sizes of the images of a prompt, sorted, and where the first prompt with these is: which of them take
            the most depends on the server.
    """

    pixels: int = 0
    where: str = ""
    file_bytes: int = 0
    where_heaviest: str = ""
    together: dict[tuple[tuple[int, int], ...], str] = field(default_factory=dict)

    def see_all(self, pictures: Sequence[Any], where: str) -> None:
        """Count a prompt's pictures of PIL's in; encode only those that may have a large file."""
        for picture in pictures:
            self._see(picture, where)
        self.see_sizes([picture.size for picture in pictures], where)

    def _see(self, picture: Any, where: str) -> None:
        pixels = picture.width * picture.height
        if pixels > self.pixels:
            self.pixels, self.where = pixels, where
        if 3 * pixels > _LARGE_FILE:
            self._see_file(len(b64decode(encoded_image(picture)[0].data)), where)

    def join(self, other: Largest) -> None:
        """Count what another rank has seen in."""
        if other.pixels > self.pixels:
            self.pixels, self.where = other.pixels, other.where
        self._see_file(other.file_bytes, other.where_heaviest)
        for sizes, where in other.together.items():
            self.together.setdefault(sizes, where)

    def see_sizes(self, sizes: Sequence[tuple[int, int]], where: str) -> None:
        """Count the sizes of a prompt's pictures in."""
        if sizes:
            self.together.setdefault(tuple(sorted(sizes)), where)

    def most_memory(self, state: ServerState) -> tuple[int, str]:
        """Return the bytes that a server counts for the images of one prompt at most, and where that is."""
        prompts = ((sum(state.image_memory(*size) for size in sizes), where) for sizes, where in self.together.items())
        return max(prompts, key=itemgetter(0), default=(0, ""))

    def _see_file(self, size: int, where: str) -> None:
        if size > self.file_bytes:
            self.file_bytes, self.where_heaviest = size, where


def sees_images(trainer: GRPOTrainer) -> bool:
    """Return whether the trainer was built with a processor of images."""
    return bool(trainer._is_vlm)


def media_tokens(trainer: GRPOTrainer, *, images: bool) -> set[int]:
    """Return the ids of tokens that stand for media which a prompt does not have; servers refuse them.

    Args:
        images: the prompt has images.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    return media_token_ids(config, ("video", "audio")) if images else media_token_ids(config)


def check_sight(trainer: GRPOTrainer, *, agents: bool) -> None:
    """Refuse what does not go together with a processor of images: `unsupported_adapter`."""
    why = {
        "an agent": agents and "sessions record token ids only",
        "tools": trainer.tools and "later turns are sent without their images",
        "an environment": trainer.environment_factories is not None and "its prompts are made of text",
        "FSDP or DeepSpeed": (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        and "a rank whose rows have no image would not gather the blocks that see, for which the others wait",
        "rollout_func": trainer.rollout_func is not None and "it makes its own rollouts",
    }
    for name, reason in why.items():
        if reason and sees_images(trainer):
            raise UnsupportedAdapter(
                f"{name} with a model that sees images: {reason}; train the model's text, with its tokenizer as "
                "processing_class"
            )


def sight_of(trainer: GRPOTrainer) -> dict[str, str]:
    """Return what decides what the trainer's model sees of an image."""
    if not sees_images(trainer):
        return {}
    if not hasattr(trainer.processing_class, "image_processor"):
        raise UnsupportedAdapter(
            f"{type(trainer.processing_class).__name__} has no image_processor, and images alone are served: "
            "build the trainer with its tokenizer as processing_class"
        )
    return sight(trainer.processing_class.image_processor, trainer.accelerator.unwrap_model(trainer.model).config)


def check_images(
    most: int, largest: Largest, own: Mapping[str, str], state: ServerState, *, unknown: bool = False
) -> list[str]:
    """Refuse a server that does not take so many images in a prompt, or so large ones, or sees others than `own`.
    Returns warnings.

    Args:
        unknown: a stream does not tell whether its rows have images.

    Raises:
        LockstepError: `invalid_request`, `base_mismatch`.
    """
    if unknown and not state.max_images and not most:
        return [
            "the data is a stream that does not name its columns and may have images, and the server takes text only: "
            "for text give the tokenizer as processing_class; for images start the server without --language-model-only"
        ]
    if most > state.max_images:
        raise InvalidRequest(
            f"a prompt has {most} images, and the server takes {state.max_images}: "
            + ("start it with a larger --max-images" if state.max_images else "start it without --language-model-only")
        )
    if different := other_sight(own, state.sight) if most or unknown else []:
        raise BaseMismatch(
            f"learner and server process images differently: {'; '.join(different[:5])} on the server: give both the "
            "same config.json and preprocessor_config.json, or build the trainer with the checkpoint's own processor"
        )
    if 0 < state.max_image_pixels < largest.pixels:
        raise InvalidRequest(
            f"{largest.where} has an image of {largest.pixels} pixels, and the server takes {state.max_image_pixels}: "
            "scale it down, or start the server with a larger --max-image-pixels"
        )
    if 0 < state.max_image_bytes < largest.file_bytes:
        raise InvalidRequest(
            f"{largest.where_heaviest} has an image whose PNG file has {largest.file_bytes} bytes, and the server "
            f"takes {state.max_image_bytes}: scale it down, or start the server with a larger --max-image-mib"
        )
    needed, where = largest.most_memory(state)
    if 0 < state.max_image_memory < needed:
        raise InvalidRequest(
            f"{where} has images that take {needed} bytes together once they are decoded, and the server takes "
            f"{state.max_image_memory}: scale them down, or start the server with a larger --max-bodies-mib"
        )
    return []


def lay_out_prompts(trainer: GRPOTrainer) -> None:
    """Let TRL give reward functions prompts of one form, whatever rows are in a batch, and check each as `seen_prompt`:
    streams, too, are read by then.
    """
    generate = trainer._generate_and_score_completions

    def generate_laid_out(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        prompts = _seen_prompts(trainer, inputs)
        if sees_images(trainer) and not any(map(row_images, inputs)):  # TRL would leave these as they are
            inputs = [{**row, "prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)]
        return generate(inputs)

    trainer._generate_and_score_completions = generate_laid_out


def read_images(trainer: GRPOTrainer) -> None:
    """Let TRL take rows with and without images side by side; it passes a list for each row, or None, to processors."""
    if not sees_images(trainer):
        return
    tokenize, generate = trainer._tokenize_prompts, trainer._generate_and_score_completions
    score = trainer._get_per_token_logps_and_entropies
    # TRL pads token ids on the left whatever this says, and has the processor pad their types beside them.
    trainer._tokenizer.padding_side = "left"
    trainer.log_multimodal = False  # ranks would gather pictures, and wait for one whose rows have none

    def tokenize_listed(prompts: list[Any]) -> Any:
        _check_pictures(prompts)
        token_ids, images, fields = tokenize(prompts)
        return token_ids, images and [own or [] for own in images], fields

    def generate_listed(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return _counted_in_rows(generate(image_rows(trainer, inputs)))

    def score_counted(*args: Any, **kwargs: Any) -> Any:
        return score(*args, **_counted_in_rows(kwargs))

    def without_nothing(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is not None and not len(kwargs["pixel_values"]):  # of a pass that has no image
            return args, {name: value for name, value in kwargs.items() if name not in _PIXELS}
        return None

    trainer._tokenize_prompts = tokenize_listed
    trainer._generate_and_score_completions = generate_listed
    trainer._get_per_token_logps_and_entropies = score_counted
    trainer.model.register_forward_pre_hook(without_nothing, with_kwargs=True)


def _counted_in_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of TRL's, or arguments, in which images are counted as its pixels are laid out.

    Idefics and SmolVLM have them padded to a row for each sample [B, images, C, H, W]. TRL takes these for flat ones,
    [images, C, H, W], where the samples have as many images together as there are samples.
    """
    pixels, counts = batch.get("pixel_values"), batch.get("num_images")
    return batch if pixels is None or pixels.ndim != 5 or counts is None else {**batch, "num_images": [1] * len(counts)}


def image_rows(trainer: GRPOTrainer, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, with `images` of each as a list where the model sees any: TRL reads that column first."""
    if not sees_images(trainer):
        return list(rows)
    own = partial(with_own_keys, trainer, images=True)
    return [{**row, "prompt": own(row["prompt"]), "images": row_images(row)} for row in rows]


def token_ids(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the token ids of the rows' prompts [B][P], with their images, as TRL makes them.

    Raises:
        LockstepError: `invalid_request` for an image that cannot be sent; as `seen_prompt`.
    """
    return with_images(*tokenized(trainer, rows))


def image_probe(trainer: GRPOTrainer, states: Sequence[ServerState]) -> SeenText | None:
    """Return a prompt with a small drawn image, for the proof of sync; None where the model or a server sees none."""
    if not sees_images(trainer) or not all(state.max_images for state in states):
        return None
    most = min((state.max_image_pixels for state in states if state.max_image_pixels), default=PROBE_SIDE**2)
    parts = [{"type": "image", "image": drawn(min(PROBE_SIDE, math.isqrt(most)))}, {"type": "text", "text": PROBE_TEXT}]
    found, images, fields = trainer._tokenize_prompts([[{"role": "user", "content": parts}]])
    (prompt,) = with_images([list(found[0])], images)
    inputs = {name: torch.as_tensor(np.asarray(value)) for name, value in fields.items()}
    return SeenText(prompt, inputs)


def drawn(side: int = PROBE_SIDE) -> Any:
    """Return a small picture: shapes on a gradient."""
    from PIL import Image, ImageDraw

    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    picture = Image.fromarray(np.stack([red, green, 255 - red], -1), "RGB")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((side // 8, side // 8, side // 2, side // 2), fill="white")
    end = side - side // 12
    pen.rectangle((side // 2, side // 3, end, end), fill="navy")
    return picture


def tokenized(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[list[Any]]]:
    """Return the token ids of the rows' prompts [B][P], and PIL's images of each. Raises as `token_ids`."""
    prompts = _seen_prompts(trainer, rows)
    _check_pictures(prompts)
    found, images = trainer._tokenize_prompts(prompts)[:2]
    return [list(ids) for ids in found], [own or [] for own in images] if images else [[] for _ in found]


def _check_pictures(prompts: Sequence[Any]) -> None:
    """Check the pictures of prompts before a processor takes gigabytes for one of them; see `check_picture`."""
    for part in (part for prompt in prompts for part in message_parts(prompt) if part.get("type") == "image"):
        check_picture(part.get("image"))


def seen_prompt(trainer: GRPOTrainer, row: Mapping[str, Any]) -> Any:
    """Return a row's prompt with its image columns in it, as TRL generates from it and shows it to reward functions.

    Raises:
        LockstepError: `invalid_request` for images beside a prompt of text, a column that holds anything but images, or
            a part of anything but text and images that the model sees.
    """
    prompt, sees = row["prompt"], sees_images(trainer)
    own = with_own_keys(trainer, prompt, images=sees)
    check_parts(own, images=sees)
    if not sees:
        return prompt
    images = row_images(row)
    if not is_conversational({"prompt": prompt}):
        if not images:
            return prompt
        raise InvalidRequest("a prompt with images must be a list of chat messages, not text")
    return prepare_multimodal_messages(own, images=images)


def _seen_prompts(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return `seen_prompt` of each row; one of a group of text is looked at once."""
    if sees_images(trainer):
        return [seen_prompt(trainer, row) for row in rows]
    distinct, places = distinct_runs([row["prompt"] for row in rows])
    for prompt in distinct:
        seen_prompt(trainer, {"prompt": prompt})
    return [distinct[place] for place in places]
