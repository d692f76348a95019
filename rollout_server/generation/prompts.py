"""Prompts as the engine takes them, with what the model sees of each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from rollout_server.engine.proxy import EngineProxy
from rollout_server.engine.turns import in_turn, in_turns
from rollout_server.generation.images import decode
from rollout_server.generation.tokenization import checked
from rollout_server.generation.vllm_params import token_prompt
from rollout_server.vllm_compat import vision
from shared.errors import InvalidRequest
from shared.images import Image


class SeenPrompt(NamedTuple):
    """A prompt as the model sees it: `token_ids` with all tokens of its images, and the digests of their pixels."""

    engine_input: dict[str, Any]
    token_ids: list[int]
    image_digests: list[str]


async def seen_prompts(
    proxy: EngineProxy,
    what: str,
    prompts: Sequence[list[int]],
    images: Sequence[Sequence[Image]],
    room: int,
    held: contextlib.ExitStack,
) -> list[SeenPrompt]:
    """Return prompts with their images decoded and processed; what they take counts as memory, before any is
    decoded, until `held` closes.

    Args:
        what: names a prompt in errors, with its index.
        prompts: token ids, checked.
        images: of each prompt.
        room: tokens that must be left in the model's context.

    Raises:
        LockstepError: `invalid_request`, `too_large`, `overloaded`.
    """
    limits = proxy.image_limits
    for index, (token_ids, own) in enumerate(zip(prompts, images, strict=True)):
        if limits is None and own:
            raise InvalidRequest(f"{what} {index} has images, and this server takes text only; leave images out")
        if limits is not None:
            limits.check_count(f"{what} {index}", len(own))
        vision.check_placeholders(proxy.model_config, f"{what} {index}", token_ids, len(own))
    names = [[f"{what} {index}, image {i}" for i in range(len(own))] for index, own in enumerate(images)]
    flat = [pair for pairs in zip(names, images, strict=True) for pair in zip(*pairs, strict=True)]
    if not flat:
        return [SeenPrompt(token_prompt(token_ids), token_ids, []) for token_ids in prompts]
    measured = await in_turns(limits.measure(*pair) for pair in flat)
    size = limits.memory(measured)
    proxy.capacity.hold(size)
    held.callback(proxy.capacity.hold, -size)
    left = iter(measured)
    seen = []
    for index, (token_ids, its_names) in enumerate(zip(prompts, names, strict=True)):
        if not its_names:
            seen.append(SeenPrompt(token_prompt(token_ids), token_ids, []))
            continue
        decoded = [await in_turn(decode, name, next(left)) for name in its_names]
        pictures = [image.picture for image in decoded]
        made = await vision.engine_prompt(proxy, f"{what} {index}", token_ids, pictures)
        ids = checked(index, list(made["prompt_token_ids"]), room, proxy.model_config)
        seen.append(SeenPrompt(made, ids, [image.digest for image in decoded]))
    return seen
