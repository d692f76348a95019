"""Prompts as the engine gets them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.generation.prompts import seen_prompts
from shared.errors import InvalidRequest
from shared.images import Image


@pytest.fixture
def blind() -> Any:
    """A server of a language model alone, whose checkpoint sees."""
    model = SimpleNamespace(
        is_multimodal_model=True,
        multimodal_config=SimpleNamespace(language_model_only=True),
        hf_config=SimpleNamespace(image_token_id=7, video_token_id=8),
        get_vocab_size=lambda: 20,
    )
    return SimpleNamespace(image_limits=None, model_config=model)


@pytest.mark.parametrize("token", [7, 8])
async def test_a_server_of_text_takes_no_tokens_of_media(blind: Any, token: int) -> None:
    held = contextlib.ExitStack()
    assert [seen.token_ids for seen in await seen_prompts(blind, "prompt", [[1, 2]], [[]], 1, held)] == [[1, 2]]
    with pytest.raises(InvalidRequest, match=rf"^sequence 1 holds tokens of .*\(id {token}\)"):
        await seen_prompts(blind, "sequence", [[1], [1, token]], [[], []], 1, held)
    with pytest.raises(InvalidRequest, match="this server takes text only"):
        await seen_prompts(blind, "prompt", [[1]], [[Image(data="a")]], 1, held)
