"""Prompts of a `trl.GRPOTrainer` in a form of which its chat template shows all text, as the server lays them out."""

from __future__ import annotations

from functools import partial
from typing import Any

from trl import GRPOTrainer

from shared.chat_forms import check_shown, in_parts, shown_form


def shown_prompt(trainer: GRPOTrainer, prompt: Any) -> Any:
    """Return a prompt in the form that TRL is to tokenize; for processors TRL writes all text in parts.

    Raises:
        LockstepError: `invalid_request` if the template leaves a text out; what the template raises.
    """
    if not isinstance(prompt, list):
        return prompt
    render = partial(
        trainer.processing_class.apply_chat_template,
        tools=trainer.tools or None,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **trainer.chat_template_kwargs,
    )
    if not trainer._is_vlm:
        return shown_form(render, prompt)
    check_shown(render, in_parts(prompt))
    return prompt
