"""Prompts as token ids: given as such, tokenized from text, or templated from chat messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rollout_server.generation.media import check_text_only
from shared.chat_forms import shown_form
from shared.errors import InvalidRequest
from shared.rollouts import Prompt

#: UTF-8 bytes of one prompt's text, and for each token of a long context. A token may have but one, and a tokenizer
#: takes seconds for a million, and hundreds of bytes of memory for each.
_TEXT_BYTES, _TEXT_BYTES_PER_TOKEN = 2**21, 8
#: Parameters of `apply_chat_template` that are no variables of a template. A template is a program: none comes with a
#: request.
_RESERVED = frozenset(
    {
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)

_AS_TEXT = "where a template takes text only, send the content of a message as one string"


def tokenize(tokenizer: Any, prompt: Prompt, chat_template_kwargs: dict[str, Any], context: int) -> list[int]:
    """Return the token ids of one prompt; of messages, in a form of which the chat template shows all text.

    Args:
        tokenizer: vLLM's; not used for a prompt of token ids.
        context: tokens of the model's context. Text that cannot fit into it is not tokenized.

    Raises:
        LockstepError: `invalid_request` when the tokenizer or its chat template refuses, the template leaves a text
            out, the text is too long, or a part stands for an image and the prompt has none.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    longest = context * tokenizer.max_chars_per_token
    if taken := _RESERVED & chat_template_kwargs.keys():
        raise InvalidRequest(
            "chat_template_kwargs: the template and how it is used are the server's own; leave "
            f"{', '.join(sorted(taken))} out"
        )
    text = prompt.text or prompt.messages
    characters = _measure(text, len)
    if characters > longest:
        raise InvalidRequest(
            f"a prompt has {characters} characters, and the model's {context} tokens hold at most {longest}; cut it"
        )
    check_text([text, chat_template_kwargs], context)
    check_text_only(prompt.messages, images=bool(prompt.images))
    messages = prompt.messages or []
    _check_messages(messages)
    try:
        if prompt.text is not None:
            return list(tokenizer(prompt.text)["input_ids"])
        render = partial(tokenizer.apply_chat_template, add_generation_prompt=True, **chat_template_kwargs)
        messages = shown_form(partial(render, tokenize=False), messages)
        return list(render(messages, tokenize=True, return_dict=False))
    except InvalidRequest:
        raise
    except Exception as error:  # templates raise what their author chose
        advice = f"; {_AS_TEXT}" if any(isinstance(message.get("content"), list) for message in messages) else ""
        raise InvalidRequest(f"the prompt cannot be tokenized: {error}{advice}") from error


def _check_messages(messages: list[dict[str, Any]]) -> None:
    """Refuse messages without what templates read: what is missing, or has another name, they leave out silently."""
    for index, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or ("content" not in message and role != "assistant"):
            raise InvalidRequest(
                f"message {index} has the fields {', '.join(message)[:200] or 'none'}: it needs a role, and its text "
                'as content, as in {"role": "user", "content": "3 + 4 ="}'
            )
        content = message.get("content")
        # Templates print what is neither: as None, 5, or []. Answers of an assistant may be calls of tools alone.
        if not isinstance(content, str) and not (isinstance(content, list) and content):
            if content is None and role == "assistant":
                continue
            raise InvalidRequest(
                f"the content of message {index} is {content!r:.80}: send text, or a list of parts, as in "
                '{"role": "user", "content": "3 + 4 ="}'
            )


def check_text(prompt: Any, context: int) -> None:
    """Check that the text in all parts of a prompt is text, and not too much for the tokenizer.

    Raises:
        LockstepError: `invalid_request`.
    """
    size, most = _measure(prompt, _utf8_bytes), max(_TEXT_BYTES, context * _TEXT_BYTES_PER_TOKEN)
    if size > most:
        raise InvalidRequest(f"a prompt has {size} bytes of text, and at most {most} are tokenized; cut it")


def _measure(part: Any, measure: Callable[[str], int]) -> int:
    """Measure all text in lists and objects, their names too."""
    if isinstance(part, dict):
        return sum(measure(str(name)) + _measure(value, measure) for name, value in part.items())
    if isinstance(part, list):
        return sum(_measure(each, measure) for each in part)
    return measure(part) if isinstance(part, str) else 0


def _utf8_bytes(text: str) -> int:
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:  # nor could it be sent to the engine, or back
        raise InvalidRequest(
            f"{text[max(error.start - 10, 0) : error.end]!r:.100} ends in half a character (a lone surrogate): text "
            "was cut in the middle of one; cut it between characters, or leave the half out"
        ) from error


def checked(index: int, sequence: list[int], room: int, model_config: Any) -> list[int]:
    """Return a sequence that leaves `room` tokens in the model's context, and holds ids of its vocabulary only.

    Args:
        model_config: vLLM's.

    Raises:
        LockstepError: `invalid_request` with the index of the sequence.
    """
    limit, vocabulary = model_config.max_model_len, model_config.get_vocab_size()
    if len(sequence) + room > limit:
        raise InvalidRequest(
            f"sequence {index} has {len(sequence)} tokens, with {room} more that is beyond the model's "
            f"{limit}; shorten it, lower max_tokens, or start the server with a larger --max-model-len"
        )
    if not sequence:
        raise InvalidRequest(f"sequence {index} has no tokens")
    if min(sequence) < 0 or max(sequence) >= vocabulary:
        raise InvalidRequest(f"sequence {index} holds token ids outside the vocabulary of {vocabulary}")
    return sequence


def special_stops(stop: Sequence[str], tokenizer: Any) -> Iterator[int]:
    """Yield the ids of stop strings that are special tokens: text that leaves these out never holds them.

    Raises:
        LockstepError: `invalid_request` where one is a part of a longer string.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): token_id for token_id, token in added.items() if token.special}
    for text in stop:
        if text in special:
            yield special[text]
        elif found := next((token for token in special if token in text), None):
            raise InvalidRequest(
                f"stop: {text!r} holds the special token {found}, which skip_special_tokens keeps out of the text that "
                f"is searched: stop at {found} alone, or send skip_special_tokens false"
            )
