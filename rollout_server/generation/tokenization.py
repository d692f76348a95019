"""Prompts as token ids: given as such, tokenized from text, or templated from chat messages."""

from __future__ import annotations

from typing import Any

from rollout_server.service import Service
from shared.errors import InvalidRequest
from shared.rollouts import Prompt

#: Parameters of `apply_chat_template` that are no variables of a template. A template is a program: none comes with a
#: request.
_OURS = frozenset(
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


def tokenize(service: Service, prompt: Prompt, chat_template_kwargs: dict[str, Any]) -> list[int]:
    """Token ids of one prompt.

    Raises:
        LockstepError: `invalid_request` when the tokenizer or its chat template refuses.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    if "chat_template" in chat_template_kwargs:
        raise InvalidRequest("chat_template_kwargs: the template is the server's own; leave chat_template out")
    tokenizer = service.proxy.get_tokenizer()
    if taken := _OURS & chat_template_kwargs.keys():
        raise InvalidRequest(
            f"chat_template_kwargs: how prompts are made is the server's own; leave {', '.join(sorted(taken))} out"
        )
    try:
        if prompt.text is not None:
            return list(tokenizer(prompt.text)["input_ids"])
        ids = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=False, **chat_template_kwargs
        )
    except Exception as error:  # templates raise whatever their author chose
        raise InvalidRequest(f"the prompt cannot be tokenized: {error}") from error
    return list(ids)


def check_lengths(service: Service, sequences: list[list[int]], room: int) -> None:
    """Refuse sequences that leave no `room` tokens in the model's context, or hold ids outside the vocabulary.

    Raises:
        LockstepError: `invalid_request` with the index of the sequence.
    """
    limit = service.served.max_model_len
    vocabulary = service.proxy.model_config.get_vocab_size()
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
