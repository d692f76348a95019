"""Bodies of requests: bounded before anything parses them; large ones are parsed beside the event loop."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from email.message import Message
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.types import Scope

from rollout_server.api.security.roles import SESSION_KEY
from rollout_server.engine.turns import in_turn
from rollout_server.generation.media import check_text_only
from rollout_server.generation.tokenization import check_text
from rollout_server.sessions.records import RecordedSession
from shared import wire
from shared.bounded_json import SMALL, JsonLimits, load_json
from shared.errors import InvalidRequest, TooLarge
from shared.structured_outputs import check_structured_outputs

#: 512 prompts of 8192 token ids are four million values.
_OURS = JsonLimits(values=5 * 2**20, strings=2**20, containers=2**19)
#: vLLM parses bodies on the event loop, and its request models keep an error for every value that fits none of a
#: field's many types.
_THEIRS_MIB = 12
#: vLLM makes the answer of `/tokenize` on the event loop: a token for every few bytes.
_TOKENIZE_KIB = 256
_THEIRS = JsonLimits(values=2**19, strings=2**16, containers=2**15)
_MAX_LIST = 4096
#: Fields of earlier versions of vLLM, which now ignores them: completions would have no format, and nobody is told.
_REMOVED = re.compile(r"guided_(json|regex|choice|grammar|decoding_backend|whitespace_pattern)")
#: Fields of OpenAI's clients and of earlier versions of vLLM that vLLM ignores as well, and what does it instead.
IGNORED = {
    "best_of": "send n, and choose among the completions by their logprobs",
    "conversation": "send the complete conversation as input",
    "functions": "send tools",
    "logits_processors": "send logit_bias, bad_words or allowed_token_ids",
    "mcp_servers": "send their tools as tools of your own, and the results as their answers",
    "web_search_options": "send a tool of your own, and the results as its answer",
}
#: Kinds of tools that a client runs itself.
_TOOLS = ("function", "custom", "namespace")
#: Names in `vllm_xargs` that are objects to vLLM, and have fields of their own: other values are no request's error to
#: it, but its own.
_OBJECTS = ("kv_transfer_params", "ec_transfer_params")
_TOKEN_LISTS = ("prompt", "tokens")
_OUR_PATHS = (wire.GENERATE, wire.SCORE, wire.SESSIONS)
_BELOW_OURS = (wire.RUN.format(run_id=""), wire.SESSION.format(session_id=""))


async def check_body(scope: Scope, body: bytes, context: int = 0, *, tool_server: bool = False) -> int:
    """Check a complete body without parsing it as a whole; return the memory that it takes when it is parsed.

    Args:
        context: tokens of the model's context.
        tool_server: vLLM has one, which runs hosted tools.

    Raises:
        LockstepError: `too_large`, `invalid_request`.
    """
    ours = scope["path"] in _OUR_PATHS or scope["path"].startswith(_BELOW_OURS)
    if scope["path"] == "/tokenize" and len(body) > _TOKENIZE_KIB * 2**10:
        raise TooLarge(
            f"{len(body)} bytes are more than the {_TOKENIZE_KIB} KiB that /tokenize takes; split the text, or send "
            f"it to {wire.GENERATE} with max_tokens 1, whose answer has prompt_token_ids"
        )
    check = _check_ours if ours else partial(_check_theirs, context, scope.get(SESSION_KEY), tool_server)
    return check(body) if len(body) <= SMALL else await in_turn(check, body)


def _check_ours(body: bytes) -> int:
    return _bounded(_OURS, body)


def _check_theirs(context: int, session: RecordedSession | None, tool_server: bool, body: bytes) -> int:
    if len(body) > _THEIRS_MIB * 2**20:
        raise TooLarge(
            f"{len(body)} bytes are more than the {_THEIRS_MIB} MiB that vLLM's routes take; split the request"
        )
    memory = _bounded(_THEIRS, body)
    try:
        document = load_json(body)
    except json.JSONDecodeError:  # vLLM says so
        return memory
    try:
        if isinstance(document, dict):
            _check_openai(document)
            if not tool_server:
                _check_tools(document)
            check_text_only(document)
            _check_prompts(document, context)
            memory += sum(_check_arguments(arguments, context) for arguments in _arguments(document))
            if session is not None:
                session.check_call(document)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return memory


def _bounded(limits: JsonLimits, body: bytes) -> int:
    try:
        return limits.check(body)
    except UnicodeError as error:
        raise InvalidRequest(str(error)) from error
    except ValueError as error:
        raise TooLarge(f"{error}; split the request", bytes=len(body)) from error


def _check_openai(document: dict[str, Any]) -> None:
    """Check what vLLM's request models would look at before they refuse it, and grammars that they compile."""
    for name, value in document.items():
        if value is not None and _REMOVED.fullmatch(name):
            raise ValueError(
                f"{name} is no field of vLLM any more, and would have no effect: send structured_outputs, as in "
                '{"structured_outputs": {"choice": ["yes", "no"]}} (json, regex, choice, grammar), or response_format'
            )
        _check_lists(name, value)
    for name, advice in IGNORED.items():
        asked = document.get(name)
        if asked and not (name == "best_of" and asked == (document.get("n") or 1)):
            raise ValueError(f"{name} is no field of vLLM, and would have no effect: {advice}, or leave it out")
    extra = document.get("vllm_xargs")
    for name in _OBJECTS:
        if isinstance(extra, dict) and name in extra:
            raise ValueError(f"vllm_xargs holds {name}, which is a field of the request itself: send it there")
    forms = document.get("structured_outputs")
    if isinstance(forms, dict):
        known = ("regex", "choice", "grammar", "structural_tag")
        check_structured_outputs(json_schema=forms.get("json"), **{name: forms.get(name) for name in known})
    form = document.get("response_format")
    if isinstance(form, dict):
        check_structured_outputs(structural_tag=form)


def _check_tools(document: dict[str, Any]) -> None:
    """Refuse tools that a provider would run, which vLLM leaves out, where there are no others.

    Agents offer them beside their own without being asked to, and do without.
    """
    tools = document.get("tools")
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    hosted = [kind for kind in kinds if isinstance(kind, str) and kind not in _TOOLS]
    if hosted and len(hosted) == len(kinds):
        raise ValueError(
            f"tools holds {hosted[0]!r:.60}, and nothing here would run it: send a tool of type function, run it "
            "yourself, and send its result as the answer"
        )


def _check_prompts(document: dict[str, Any], context: int) -> None:
    """Check the text of each prompt, which vLLM tokenizes whole, also where it is to be truncated afterwards."""
    prompts = document.get("prompt")
    for prompt in prompts if isinstance(prompts, list) else [prompts]:
        check_text(prompt, context)
    check_text({name: value for name, value in document.items() if name != "prompt"}, context)


def _check_arguments(arguments: str, context: int) -> int:
    """Check the arguments of a tool's call, JSON in a string that vLLM parses, too; return the memory that it takes."""
    memory = _bounded(_THEIRS, arguments.encode())
    with contextlib.suppress(json.JSONDecodeError):  # models write such, and all that is no object: vLLM takes {}
        parsed = load_json(arguments.encode())
        check_text(parsed if isinstance(parsed, dict) else None, context)
    return memory


def _arguments(document: dict[str, Any]) -> Iterator[str]:
    """Yield the arguments of all calls of tools in a history, in the forms of chats and of responses."""
    functions = [
        call.get("function")
        for message in _objects(document.get("messages"))
        for call in _objects(message.get("tool_calls"))
    ]
    for function in _objects([*functions, *_objects(document.get("input"))]):
        if isinstance(arguments := function.get("arguments"), str):
            yield arguments


def _objects(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _check_lists(name: str, value: Any) -> None:
    """Refuse long lists but those of token ids where token ids belong: they fit none of a field's types."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_lists(str(key), inner)
    elif isinstance(value, list):
        tokens = name in _TOKEN_LISTS or name.endswith("token_ids")
        if len(value) > _MAX_LIST and not (tokens and all(type(item) is int for item in value)):
            but = ", but for token ids" if tokens else ""
            raise ValueError(f"{name:.100}: the list has {len(value)} items; send at most {_MAX_LIST}{but}")
        for inner in value:
            if isinstance(inner, dict | list):
                _check_lists(name, inner)


class BoundedRoute(APIRoute):
    """A route whose large JSON bodies are parsed and validated beside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()
        models = [param.field_info.annotation for param in self.dependant.body_params]

        async def handle_bounded(request: Request) -> Any:
            bounded = _BoundedRequest(request.scope, request.receive)
            body = await bounded.body() if models else b""
            if body:
                _check_type(request.headers.get("content-type", ""))
            if len(body) > SMALL:
                try:
                    bounded.model = await in_turn(_validated, models[0], body)
                except ValidationError as error:
                    errors = error.errors(include_url=False, include_input=False, include_context=False)
                    located = [{**each, "loc": ("body", *each["loc"])} for each in errors]
                    raise RequestValidationError(located) from error
                except json.JSONDecodeError as error:
                    raise InvalidRequest(f"the body is no JSON: {error}") from error
            return await handle(bounded)

        return handle_bounded


def _check_type(sent: str) -> None:
    """Refuse a body that FastAPI would not take for JSON: it would call it no object, and not say why."""
    message = Message()
    message["content-type"] = sent
    subtype = message.get_content_subtype()
    if not sent or message.get_content_maintype() != "application" or not f"+{subtype}".endswith("+json"):
        raise InvalidRequest(
            f"the body came {f'as {sent:.100}' if sent else 'without a type'}: send JSON, and the header "
            "Content-Type: application/json with it"
        )


def _validated(model: Any, body: bytes) -> Any:
    return model.model_validate(load_json(body))


class _BoundedRequest(Request):
    model: Any = None  # the validated body

    async def json(self) -> Any:
        return self.model or load_json(await self.body())
