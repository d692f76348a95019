"""Chat messages in a form of which a chat template shows all text.

The content of a message is a string or a list of parts. Many templates take one of the two only: of the other they show
nothing, or print the list with its brackets, without an error.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shared.errors import InvalidRequest

Messages = list[dict[str, Any]]

#: Roles whose texts templates may leave out, as earlier reasoning, or show in another way, as JSON.
_FREE = frozenset({"assistant", "tool", "function", "ipython"})
#: Keys of a part that templates show; of parts without these, any text may be what they show.
_SHOWN = ("text", "content")


class _Lost(NamedTuple):
    """What a template leaves out of messages, of which fewer is better.

    Attributes:
        needed: numbers of messages, one for each text that must be shown.
        others: texts of `_FREE` roles.
    """

    needed: list[int]
    others: int

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.needed), self.others


def shown_form(render: Callable[[Messages], Any], messages: Messages) -> Messages:
    """Return messages in the form of which a template shows the most text: as they are, or with each content that is
    text alone as a part, or as a string. Learner and server agree on it, since each decides by the template alone.

    Args:
        render: the template, as it will be used; returns text.

    Raises:
        LockstepError: `invalid_request` if no form shows all texts of users and systems, or a part has no text; what
            the template raises of the messages as they are, if no form can be rendered.
    """
    best, fewest, failure = messages, None, None
    for form in (messages, in_parts(messages), _in_strings(messages)):
        if form is not messages and form == messages:
            continue
        try:
            lost = _lost(render, form)
        except Exception as error:  # whatever a template raises
            failure = failure or error
            continue
        if fewest is None or lost.counts < fewest.counts:
            best, fewest = form, lost
        if fewest.counts == (0, 0):
            break
    if fewest is None:
        assert failure is not None
        raise failure
    _refuse(messages, fewest)
    return best


def check_shown(render: Callable[[Messages], Any], messages: Messages) -> None:
    """Check that a template shows all texts of users and systems in messages of this form.

    Raises:
        LockstepError: `invalid_request` if it does not, or a part has no text; what the template raises.
    """
    _refuse(messages, _lost(render, messages))


def in_parts(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return messages with each content that is a string as one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def _in_strings(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return messages with each content that is one part of text as a string; of several, nobody knows what is between
    them.
    """
    made = []
    for message in messages:
        match message.get("content"):
            case [{"type": "text", "text": str(text)}]:
                made.append({**message, "content": text})
            case _:
                made.append(dict(message))
    return made


def _lost(render: Callable[[Messages], Any], messages: Messages) -> _Lost:
    """Return what a template leaves out, or prints as a list: found by marks around each text.

    A list that is printed, or written as JSON, has the characters of a mark as others: by their number (they are
    private, and not printable), and behind a backslash. A mark cannot be guessed, so a text holds none.
    """
    key, texts = secrets.token_hex(8), list[tuple[int, bool, bool]]()

    def marked(index: int, text: str, *, listed: bool) -> str:
        needed = bool(text.strip()) and messages[index].get("role") not in _FREE
        mark = f'"{key}"{len(texts)}"'
        texts.append((index, needed, listed))
        return f"\ue000{mark}{text}{mark}\ue001"

    def marked_part(index: int, part: Any) -> Any:
        if isinstance(part, str):
            return marked(index, part, listed=True)
        own = {name: text for name, text in part.items() if isinstance(text, str)} if isinstance(part, Mapping) else {}
        kind = own.pop("type", None)
        if kind == "image":
            return part
        if not own:
            raise InvalidRequest(
                f'message {index} has a part without text, {part!r:.80}: write {{"type": "text", "text": ...}}'
            )
        return {
            **part,
            **{name: marked(index, own[name], listed=True) for name in [n for n in _SHOWN if n in own][:1] or own},
        }

    made = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = [marked_part(index, part) for part in content]
        elif isinstance(content, str) and content.strip():
            content = marked(index, content, listed=False)
        made.append({**message, "content": content} if "content" in message else dict(message))
    rendered = render(made)
    begun = [(start, int(number)) for start, number in re.findall(rf'(\ue000|\\ue000)"{key}"(\d+)"', rendered)]
    printed = {number for start, number in begun if start != "\ue000"}
    # What lies between the marks may differ: some templates take words out of a text that switch thinking on or off.
    ended = set(map(int, re.findall(rf'"{key}"(\d+)"\ue001', rendered)))
    shown = ended & {number for start, number in begun if start == "\ue000"}
    lost = [
        (index, needed or (listed and number in printed))
        for number, (index, needed, listed) in enumerate(texts)
        if number not in shown
    ]
    return _Lost([index for index, needed in lost if needed], sum(not needed for _, needed in lost))


def _refuse(messages: Messages, lost: _Lost) -> None:
    for index in lost.needed:
        role, content = messages[index].get("role"), messages[index].get("content")
        raise InvalidRequest(
            f"the model's chat template does not show the text of message {index} (role {role!r:.40}), "
            f"{content!r:.80}: write its content as one string, or as one part of type 'text', whichever the template "
            "takes, and a role that it knows; or give the model another template"
        )
