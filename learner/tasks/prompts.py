"""Prompts of dataset rows, and keys that identify their questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal, get_args

from learner.tasks.base import TaskError

PromptFormat = Literal["chat", "raw"]


@dataclass(frozen=True)
class PromptStyle:
    """Conversion of rows to prompts. Every kind of task accepts these fields in its arguments."""

    # "chat": text becomes a user message. "raw": the model gets the text unchanged, without a chat template.
    prompt_format: PromptFormat = "chat"
    # Inserted before the user message, and before chat messages without a system message.
    system_prompt: str | None = None
    # A format string over the row's fields, e.g. "Question: {question}\nAnswer:". None: the prompt column only.
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_format not in get_args(PromptFormat):
            raise TaskError(f"prompt_format {self.prompt_format!r} is not one of {', '.join(get_args(PromptFormat))}")
        for name in ("system_prompt", "prompt_template"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TaskError(f"{name} {value!r:.80} is not text")
        if self.system_prompt is not None and self.prompt_format == "raw":
            raise TaskError("system_prompt needs prompt_format chat: raw text has no system message")

    @classmethod
    def take_from(cls, task_args: dict[str, Any]) -> PromptStyle:
        """Remove the fields of a style from `task_args` and return the style."""
        return cls(**{name: task_args.pop(name) for name in cls.__dataclass_fields__ if name in task_args})

    def prompt(self, value: Any, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        """Return the prompt of one row. `value` is its prompt column: text, or a list of chat messages."""
        if self.prompt_template is not None:
            try:
                value = _Filled().vformat(self.prompt_template, (), row)
            except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
                raise TaskError(
                    f"prompt_template {self.prompt_template!r} does not fit the rows, whose fields are "
                    f"{', '.join(row)}: {type(error).__name__} {error}"
                ) from error
        if isinstance(value, str):
            if not value.strip():
                raise TaskError("the prompt is empty")
            if self.prompt_format == "raw":
                return value
            value = [{"role": "user", "content": value}]
        if not (
            isinstance(value, list)
            and value
            and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in value)
        ):
            raise TaskError(f"a prompt must be text or a list of messages with role and content, not {value!r:.200}")
        if self.system_prompt is not None and value[0]["role"] != "system":
            value = [{"role": "system", "content": self.system_prompt}, *value]
        return value


class _Filled(Formatter):
    """Fills a template's fields in; refuses what is not there, which `str.format` would write as None."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        found = super().get_field(field_name, args, kwargs)
        if found[0] is None:
            raise TaskError(
                f"prompt_template has a field {{{field_name}}}, and the row has no value for it: give it one, or leave "
                "the row out"
            )
        return found


def question_key(prompt: str | list[dict[str, Any]]) -> str:
    """Return a key that is equal for prompts of the same text, ignoring white space and system messages.

    Of a prompt that has no other messages, the system messages count.
    """
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    asked = [m for m in prompt if m["role"] != "system"] or prompt
    contents = [(m["role"], m["content"]) for m in asked]
    turns = [[role, " ".join(text.split()) if isinstance(text, str) else text] for role, text in contents]
    return json.dumps(turns, sort_keys=True, default=str)


def completion_text(completion: Any) -> str:
    """Return the text of a completion as TRL passes it to reward functions: text, or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(m.get("content") or "" for m in completion if m.get("role", "assistant") == "assistant")
