"""Which text is tokenized at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.generation.requests import _tokenized
from rollout_server.generation.tokenization import special_stops, tokenize
from shared.errors import InvalidRequest
from shared.rollouts import GenerateRequest, Prompt
from tests.support.tiny_model import CHAT_TEMPLATE, make_tiny_tokenizer

MIB = 2**20


class _Tokenizer:
    """Counts what it is given; the longest entry of its vocabulary has 256 characters, as in many."""

    max_chars_per_token = 256

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.given += 1
        return {"input_ids": [7] * 4}

    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        self.given += 1
        return [7] * 4


def _tokenize(context: int, **fields: Any) -> int:
    """Return how many texts reached the tokenizer."""
    model = SimpleNamespace(max_model_len=context, get_vocab_size=lambda: 100)
    tokenizer = _Tokenizer()
    list(_tokenized(GenerateRequest.model_validate(fields), tokenizer, model))
    return tokenizer.given


@pytest.mark.parametrize("context", [2**17, 2**20])
def test_text_is_bounded_where_the_context_is_long(context: int) -> None:
    most = max(2 * MIB, 8 * context)
    assert _tokenize(context, prompts=[{"text": "a" * most}] * 2) == 2
    assert _tokenize(context, prompts=[{"messages": [{"role": "user", "content": "a" * (most // 2 - 100)}] * 2}]) == 1
    prompt = {"messages": [{"role": "user", "content": "hello"}]}
    for prompts, variables in (
        ([{"text": "a" * (most + 1)}], {}),
        ([{"text": "é" * (most // 2 + 1)}], {}),
        ([{"messages": [{"content": "a" * (most // 2)}] * 2}], {}),
        ([prompt], {"documents": [{"text": "a" * most}]}),
        ([prompt], {"a" * most: 1}),
    ):
        with pytest.raises(InvalidRequest, match="bytes of text"):
            _tokenize(context, prompts=prompts, chat_template_kwargs=variables)


def test_text_that_cannot_fit_is_not_tokenized() -> None:
    assert _tokenize(64, prompts=[{"text": "a" * 64 * 256}]) == 1
    with pytest.raises(InvalidRequest, match="64 tokens hold at most 16384"):
        _tokenize(64, prompts=[{"text": "a" * (64 * 256 + 1)}])


TRIMMED = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
JOINED = CHAT_TEMPLATE.replace(
    "{{ message['role'] }}\n{{ message['content'] }}", "{{ message.role + message.content }}"
)
PARTS = "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, TRIMMED, JOINED, PARTS], ids=["plain", "trimmed", "joined", "parts"]
)
def test_no_list_of_parts_is_printed_into_a_prompt(template: str) -> None:
    """As Llama 3's template would: with brackets and quotes, and no error."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.max_chars_per_token = template, 16
    content = [{"type": "text", "text": "the fox"}]
    prompt = Prompt(messages=[{"role": "user", "content": content}])
    if template == PARTS:
        assert tokenizer.decode(tokenize(tokenizer, prompt, {}, 64)) == "the fox"
        return
    with pytest.raises(InvalidRequest, match="as one string"):
        tokenize(tokenizer, prompt, {}, 64)


@pytest.mark.parametrize(
    "message",
    [{"from": "human", "value": "the fox"}, {"role": "user", "contents": "the fox"}, {"role": 3, "content": "a"}, {}],
)
def test_messages_of_which_a_template_would_see_nothing(message: dict[str, Any]) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.max_chars_per_token = 16
    with pytest.raises(InvalidRequest, match=r"message 1 .* needs a role"):
        tokenize(tokenizer, Prompt(messages=[{"role": "system", "content": "a"}, message]), {}, 64)


def test_stop_strings_that_could_never_be_found() -> None:
    tokenizer = make_tiny_tokenizer()
    assert list(special_stops(["</answer>", "<|im_start|>"], tokenizer)) == [1]
    with pytest.raises(InvalidRequest, match=r"stop at <\|im_start\|> alone"):
        list(special_stops(["a", "\n<|im_start|>"], tokenizer))
