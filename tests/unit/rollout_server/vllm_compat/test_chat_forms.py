"""vLLM's own chat route lays messages out in the form that /v1/generate and trainings choose."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.renderers.hf import resolve_chat_template_content_format

from rollout_server.generation.tokenization import tokenize
from shared.chat_forms import in_parts
from shared.rollouts import Prompt
from tests.support.chat_templates import BOTH, TEMPLATES
from tests.support.tiny_model import make_tiny_tokenizer

MESSAGES = [{"role": "system", "content": "Count."}, {"role": "user", "content": "How many?"}]


def _parse_chat_messages(*args: Any) -> Any:
    for module in ("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils"):  # the second before 0.32
        try:
            return import_module(module).parse_chat_messages(*args)
        except ImportError:
            continue
    raise ImportError("vllm has no chat_utils")


@pytest.mark.parametrize("form", [list, in_parts], ids=["strings", "parts"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_chat_route_asks_the_same(template: str, form: Any) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.max_chars_per_token = template, 16
    model = SimpleNamespace(
        revision=None,
        code_revision=None,
        trust_remote_code=False,
        is_multimodal_model=False,
        enable_prompt_embeds=False,
        multimodal_config=None,
        allowed_local_media_path="",
        allowed_media_domains=None,
        hf_config=SimpleNamespace(model_type="qwen3"),
    )
    found = resolve_chat_template_content_format(template, None, "auto", tokenizer, model_config=model)
    conversation = _parse_chat_messages(form(MESSAGES), model, found)[0]
    chat = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    ours = tokenize(tokenizer, Prompt(messages=form(MESSAGES)), {}, 64)
    # Of a template that writes the two forms in other ways, vLLM takes parts, and we take what we are given.
    assert (chat == ours) == (template != BOTH or form is in_parts)
