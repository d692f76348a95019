"""Prompts as token ids: given as such, tokenized from text, or templated from chat messages."""

from __future__ import annotations

from typing import Any

from shared.errors import InvalidRequest
from shared.rollouts import Prompt

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


def tokenize(tokenizer: Any, prompt: Prompt, chat_template_kwargs: dict[str, Any], context: int) -> list[int]:
    """Return the token ids of one prompt.

    Args:
        tokenizer: vLLM's; not used for a prompt of token ids.
        context: tokens of the model's context. Text that cannot fit into it is not tokenized.

    Raises:
        LockstepError: `invalid_request` when the tokenizer or its chat template refuses, or the text is too long.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    longest = context * tokenizer.max_chars_per_token
    if taken := _RESERVED & chat_template_kwargs.keys():
        raise InvalidRequest(
            "chat_template_kwargs: the template and how it is used are the server's own; leave "
            f"{', '.join(sorted(taken))} out"
        )
    characters = _characters(prompt.text or prompt.messages)
    if characters > longest:
        raise InvalidRequest(
            f"a prompt has {characters} characters, and the model's {context} tokens hold at most {longest}; cut it"
        )
    try:
        if prompt.text is not None:
            return list(tokenizer(prompt.text)["input_ids"])
        ids = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=False, **chat_template_kwargs
        )
    except Exception as error:  # templates raise what their author chose
        raise InvalidRequest(f"the prompt cannot be tokenized: {error}") from error
    return list(ids)


def _characters(part: Any) -> int:
    """Count the characters of all text in a message."""
    if isinstance(part, dict):
        return sum(map(_characters, part.values()))
    if isinstance(part, list):
        return sum(map(_characters, part))
    return len(part) if isinstance(part, str) else 0


def check_lengths(sequences: list[list[int]], room: int, model_config: Any) -> None:
    """Refuse sequences that leave no `room` tokens in the model's context, or hold ids outside the vocabulary.

    Args:
        model_config: vLLM's.

    Raises:
        LockstepError: `invalid_request` with the index of the sequence.
    """
    limit, vocabulary = model_config.max_model_len, model_config.get_vocab_size()
    for index, sequence in enumerate(sequences):
        if len(sequence) + room > limit:
            raise InvalidRequest(
                f"sequence {index} has {len(sequence)} tokens, with {room} more that is beyond the model's "
                f"{limit}; shorten it, lower max_tokens, or start the server with a larger --max-model-len"
            )
        if not sequence:
            raise InvalidRequest(f"sequence {index} has no tokens")
        if min(sequence) < 0 or max(sequence) >= vocabulary:
            raise InvalidRequest(f"sequence {index} holds token ids outside the vocabulary of {vocabulary}")
