"""The form of messages of which a chat template shows all text."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from shared.chat_forms import check_shown, in_parts, shown_form
from shared.errors import InvalidRequest
from tests.support.chat_templates import BOTH, IMAGES_FIRST, PARTS, PRINTED, STRINGS, TEMPLATES
from tests.support.tiny_model import make_tiny_tokenizer

STRING_FORM = [{"role": "system", "content": "Count. "}, {"role": "user", "content": "user"}]
PART_FORM = in_parts(STRING_FORM)
SHOWN = STRINGS.replace("content = ''", "content = message.content or ''")
#: Forms that a template takes; of others, strings.
TAKES = {"parts": [PART_FORM], "images first": [PART_FORM], "both": [STRING_FORM, PART_FORM]}


def render_with(template: str) -> Any:
    return partial(make_tiny_tokenizer().apply_chat_template, chat_template=template, tokenize=False)


@pytest.mark.parametrize("text", ["/no_think", "Be brief. /no_think", "Write <think> then </think>, please"])
def test_a_template_may_take_words_out_of_a_text(text: str) -> None:
    """As SmolLM3's and Nemotron's do with those that switch thinking on and off."""
    edited = PRINTED.replace("| trim", "| replace('/no_think', '') | replace('/think', '') | trim")
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "2 + 2?"}]
    assert "| replace" in edited
    assert shown_form(render_with(edited), messages) == messages


@pytest.mark.parametrize("form", [STRING_FORM, PART_FORM], ids=["strings", "parts"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_get_the_form_that_a_template_shows(name: str, form: list[dict[str, Any]]) -> None:
    """A text that the template writes by itself, such as a role, is no text of a message."""
    render, taken = render_with(TEMPLATES[name]), TAKES.get(name, [STRING_FORM])
    assert shown_form(render, form) == (form if form in taken else taken[0])
    if form in taken:
        check_shown(render, form)


def test_every_text_is_laid_out() -> None:
    """Beside an image, too, and where messages have different forms."""
    seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    answer = {"role": "assistant", "content": "three"}
    for template in (PARTS, IMAGES_FIRST):
        mixed = [STRING_FORM[0], seen, answer]
        assert shown_form(render_with(template), mixed) == [PART_FORM[0], seen, *in_parts([answer])]
    mixed = [STRING_FORM[0], PART_FORM[1]]
    assert shown_form(render_with(STRINGS), mixed) == STRING_FORM
    assert shown_form(render_with(PARTS), mixed) == PART_FORM
    assert shown_form(render_with(BOTH), mixed) == mixed


@pytest.mark.parametrize(
    "template",
    [
        SHOWN.replace("{{ content", "{{ content.split('</think>')[-1] if message.role == 'assistant' else content"),
        SHOWN.replace("{{ content", "{{ content if message.role != 'tool' else content | tojson"),
    ],
    ids=["reasoning left out", "tools as JSON"],
)
def test_what_a_template_may_leave_out(template: str) -> None:
    messages = [
        *STRING_FORM,
        {"role": "assistant", "content": "<think>1, 2, 3</think>three"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "count"}}]},
        {"role": "tool", "content": '{"circles": 3}'},
        {"role": "user", "content": "  "},
    ]
    assert shown_form(render_with(template), messages) == messages


@pytest.mark.parametrize(
    ("template", "content", "role"),
    [
        (STRINGS, [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "user"),
        (PARTS, [{"type": "input_text", "text": "one"}], "user"),
        (PARTS, [{"type": "text", "content": "one"}], "user"),
        (STRINGS.replace("message.content is string", "message.role == 'user'"), "one", "developer"),
    ],
    ids=["several parts", "another type", "another key", "another role"],
)
def test_text_that_no_form_shows_is_refused(template: str, content: Any, role: str) -> None:
    first = {"role": "user", "content": "Hi"}
    messages = [*(in_parts([first]) if template == PARTS else [first]), {"role": role, "content": content}]
    with pytest.raises(InvalidRequest, match=rf"message 1 \(role '{role}'\), .*one string, or as one part"):
        shown_form(render_with(template), messages)


def test_no_list_is_printed() -> None:
    """Nor one of an assistant, whose text may be left out."""
    render, ask = render_with(PRINTED), {"role": "user", "content": "How many?"}
    parts = [{"type": "text", "text": "Let me see."}, {"type": "text", "text": "Three."}]
    assert shown_form(render, [ask, *in_parts([{**ask, "role": "assistant"}])]) == [ask, {**ask, "role": "assistant"}]
    for content in (parts, [{"type": "thinking", "thinking": "One, two"}], [{"type": "text", "text": ""}] * 2, ["hi"]):
        with pytest.raises(InvalidRequest, match=r"does not show the text of message 1 \(role 'assistant'\)"):
            shown_form(render, [ask, {"role": "assistant", "content": content}])


@pytest.mark.parametrize("part", [3, {"type": "text"}, {"type": "text", "text": None}, []])
def test_parts_without_text(part: Any) -> None:
    with pytest.raises(InvalidRequest, match="message 1 has a part without text"):
        shown_form(render_with(PARTS), [STRING_FORM[0], {"role": "user", "content": [part]}])


def test_what_a_template_raises_is_raised() -> None:
    def refuse(_: Any) -> str:
        raise ValueError("no such role")

    with pytest.raises(ValueError, match="no such role"):
        shown_form(refuse, STRING_FORM)
