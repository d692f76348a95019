"""Which text is tokenized at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rollout_server.generation.requests import _tokenized
from rollout_server.generation.tokenization import special_stops, tokenize
from shared.chat_forms import in_parts
from shared.errors import InvalidRequest
from shared.images import Image
from shared.rollouts import GenerateRequest, Prompt
from tests.support.chat_templates import JOINED, PARTS, STRINGS, TEMPLATES
from tests.support.tiny_model import make_tiny_tokenizer

MIB = 2**20


class _Tokenizer:
    """Counts what it is given; the longest entry of its vocabulary has 256 characters, as in many."""

    max_chars_per_token = 256

    def __init__(self) -> None:
        self.given = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        self.given += 1
        return {"input_ids": [7] * 4}

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **_: Any) -> Any:
        if not tokenize:
            return "".join(message["content"] for message in messages)
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


def test_half_a_character_is_no_text() -> None:
    for prompt, variables in (
        ({"messages": [{"role": "user", "content": "a \ud83d"}]}, {}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"tools": [{"name": "\udc00"}]}),
    ):
        with pytest.raises(InvalidRequest, match="half a character"):
            _tokenize(300, prompts=[prompt], chat_template_kwargs=variables)


def test_text_that_cannot_fit_is_not_tokenized() -> None:
    assert _tokenize(64, prompts=[{"text": "a" * 64 * 256}]) == 1
    with pytest.raises(InvalidRequest, match="64 tokens hold at most 16384"):
        _tokenize(64, prompts=[{"text": "a" * (64 * 256 + 1)}])


@pytest.mark.parametrize("form", [list, in_parts], ids=["strings", "parts"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_no_text_of_a_message_is_lost(template: str, form: Any) -> None:
    """Nor is a list of parts printed into a prompt, with brackets and quotes."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.max_chars_per_token = template, 16
    messages = form([{"role": "user", "content": "the fox"}])
    text = tokenizer.decode(tokenize(tokenizer, Prompt(messages=messages), {}, 64))
    assert text.count("the fox") == 1
    assert "text" not in text


def test_text_that_no_form_shows_is_refused() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.max_chars_per_token = STRINGS, 16
    parts = [{"type": "text", "text": "the fox"}, {"type": "text", "text": "and the dog"}]
    with pytest.raises(InvalidRequest, match=r"does not show the text of message 0 .* one string"):
        tokenize(tokenizer, Prompt(messages=[{"role": "user", "content": parts}]), {}, 64)
    tokenizer.chat_template = JOINED
    with pytest.raises(InvalidRequest, match=r"cannot be tokenized.* as one string"):
        tokenize(tokenizer, Prompt(messages=[{"role": "user", "content": parts}]), {}, 64)


def test_a_place_for_an_image_without_one() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.max_chars_per_token = PARTS, 16
    content = [{"type": "image"}, {"type": "text", "text": "the fox"}]
    messages = [{"role": "user", "content": content}]
    with pytest.raises(InvalidRequest, match="only text is taken here"):
        tokenize(tokenizer, Prompt(messages=messages), {}, 64)
    assert tokenize(tokenizer, Prompt(messages=messages, images=[Image(data="eA==")]), {}, 64)


@pytest.mark.parametrize(
    "message",
    [{"from": "human", "value": "the fox"}, {"role": "user", "contents": "the fox"}, {"role": 3, "content": "a"}, {}],
)
def test_messages_of_which_a_template_would_see_nothing(message: dict[str, Any]) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.max_chars_per_token = 16
    with pytest.raises(InvalidRequest, match=r"message 1 .* needs a role"):
        tokenize(tokenizer, Prompt(messages=[{"role": "system", "content": "a"}, message]), {}, 64)


@pytest.mark.parametrize("content", [None, 5, True, []])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_content_that_a_template_would_print(role: str, content: Any) -> None:
    """As None, 5, True or [], without an error."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.max_chars_per_token = 16
    with pytest.raises(InvalidRequest, match=r"content of message 1 is .*send text"):
        tokenize(
            tokenizer,
            Prompt(messages=[{"role": "system", "content": "a"}, {"role": role, "content": content}]),
            {},
            64,
        )


def test_an_answer_of_calls_alone() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.max_chars_per_token = 16
    for answer in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert tokenize(tokenizer, Prompt(messages=[{"role": "user", "content": "a"}, answer]), {}, 64)


def test_stop_strings_that_could_never_be_found() -> None:
    tokenizer = make_tiny_tokenizer()
    assert list(special_stops(["</answer>", "<|im_start|>"], tokenizer)) == [1]
    with pytest.raises(InvalidRequest, match=r"stop at <\|im_start\|> alone"):
        list(special_stops(["a", "\n<|im_start|>"], tokenizer))
