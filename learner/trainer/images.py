"""Images in the rows of a `trl.GRPOTrainer`: found as TRL finds them, before it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl import GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages

from learner.rollouts.images import with_images
from learner.tasks.columns import IMAGE_COLUMNS
from shared.errors import InvalidRequest, UnsupportedAdapter
from shared.weights import ServerState


def sees_images(trainer: GRPOTrainer) -> bool:
    """Return whether the trainer was built with a processor of images."""
    return bool(trainer._is_vlm)


def check_sight(trainer: GRPOTrainer, *, agents: bool) -> None:
    """Refuse what does not go together with a processor of images: `unsupported_adapter`."""
    why = {
        "an agent": agents and "sessions record token ids only",
        "tools": trainer.tools and "later turns are sent without their images",
        "an environment": trainer.environment_factories is not None and "its prompts are made of text",
        "rollout_func": trainer.rollout_func is not None and "it makes its own rollouts",
    }
    for name, reason in why.items():
        if reason and sees_images(trainer):
            raise UnsupportedAdapter(
                f"{name} with a model that sees images: {reason}; train the model's text, with its tokenizer as "
                "processing_class"
            )


def check_images(most: int, state: ServerState) -> None:
    """Refuse a server that does not take as many images in a prompt as the data have: `invalid_request`."""
    if most > state.max_images:
        raise InvalidRequest(
            f"a prompt has {most} images, and the server takes {state.max_images}: "
            + ("start it with a larger --max-images" if state.max_images else "start it without --language-model-only")
        )


def token_ids(trainer: GRPOTrainer, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the token ids of the rows' prompts [B][P], with their images, as TRL makes them.

    Raises:
        LockstepError: `invalid_request` for an image that cannot be sent, or images beside a prompt of text.
    """
    found, images = trainer._tokenize_prompts([_prompt(trainer, row) for row in rows])[:2]
    return with_images([list(ids) for ids in found], images)


def _prompt(trainer: GRPOTrainer, row: Mapping[str, Any]) -> Any:
    """Return a row's prompt with its image columns in it, as `_generate_and_score_completions` puts them there."""
    prompt = row["prompt"]
    name = next((name for name in reversed(IMAGE_COLUMNS) if name in row), None)
    images = None if name is None else row[name]
    if images is None or not sees_images(trainer):
        return prompt
    if not is_conversational({"prompt": prompt}):
        raise InvalidRequest("a prompt with images must be a list of chat messages, not text")
    return prepare_multimodal_messages(prompt, images=images if name == "images" else [images])
