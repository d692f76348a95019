"""Writes docs/cli.md and docs/http.md from the code: `make reference`. A test says when they are behind it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from learner.commands import doctor, export, four_bit_base, init, runs, status, up
from learner.commands import eval as eval_command
from learner.config import LearnerConfig
from rollout_server.api.app import build_app
from rollout_server.api.bodies import IGNORED
from rollout_server.api.security.roles import OPEN, SESSION_CALLS, VLLM_ROUTES, role_needed
from rollout_server.settings import ServerSettings
from shared.errors import ErrorCode, error_class
from shared.wire import SESSION

FOLDER = Path(__file__).parent
_NOTE = "<!-- Written by `make reference` from the code; do not edit. -->\n\n"


def cli_page() -> str:
    """All flags of our commands."""
    return (
        _NOTE
        + "\n\n".join(
            [
                "# Commands",
                "`learner COMMAND --help` and `rollout-server --help` say the same, and what TRL and vLLM add. Flags "
                "of the learner can be written with dashes or underscores; `--config FILE.yaml` holds them as keys. A "
                "value there is the text that is written, and passes the same checks as on the command line: `no` is "
                "no boolean where an option takes words. Where an option takes a list, one value will do. `none` and "
                "`null` stand for no value: a flag undoes a line of a file so.",
                "## rollout-server MODEL",
                "Every flag of `vllm serve` is taken too; those that cannot work on a rollout server are refused. "
                "`--check` says whether all of them fit the model, and ends.",
                _table(("flag", "default", ""), (_row(field, "-") for field in dataclasses.fields(ServerSettings))),
                "## learner train",
                "Every field of TRL's `GRPOConfig` and `ModelConfig` is a flag too. `--help` shows what is set first, "
                "and the names of all; `--help-all` explains each.",
                _table(("flag", "default", ""), (_row(field, "_") for field in dataclasses.fields(LearnerConfig))),
                *(
                    part
                    for module in (up, init, doctor, eval_command, export, status, runs, four_bit_base)
                    for part in _command(module.make_parser())
                ),
            ]
        )
        + "\n"
    )


def http_page() -> str:
    """All routes, who may use them, what they take and answer, and the errors."""
    schema = build_app(None, FastAPI()).openapi()  # type: ignore[arg-type]
    models = schema["components"]["schemas"]
    parts = [
        "# HTTP",
        "The server itself has its own routes as OpenAPI at `/openapi.json` and `/docs`. A bearer token is needed "
        "where the server was given one; [security.md](security.md) says what the roles may do.",
        "`GET " + "` and `GET ".join(sorted(OPEN)) + "` need none and answer with an empty body.",
    ]
    used: dict[str, None] = {}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts += [
                f"## {method.upper()} {path}",
                f"Role: {role_needed(method.upper(), path)}. " + operation.get("description", ""),
            ]
            if headers := [p for p in operation.get("parameters", ()) if p["in"] != "path"]:
                parts.append(_table((headers[0]["in"], "type", ""), map(_parameter, headers)))
            for title, content in (
                ("Request", operation.get("requestBody", {}).get("content", {})),
                ("Answer", operation["responses"].get("200", {}).get("content", {})),
            ):
                if name := _referred(content.get("application/json", {}).get("schema", {})):
                    parts.append(f"{title}: [{name}](#{name.lower()})")
                    used |= _mentioned(name, models)
    parts.append("## vLLM's routes")
    parts.append(
        "As vLLM documents them. `model` is `policy` or `policy:RUN_ID` for an adapter, or the base's name. Fields of "
        "OpenAI's clients and of earlier versions of vLLM that vLLM would ignore are refused by name, where the answer "
        f"would be another one: {', '.join(f'`{name}`' for name in IGNORED)}, `guided_*`. So are tools "
        "that a provider would run (`web_search`, `code_interpreter` ...), unless the server has a `--tool-server`; "
        "beside others they are left out, as agents offer them without being asked to."
    )
    parts.append(_table(("route", "role"), ((f"`{m} {p}`", str(role)) for (m, p), role in VLLM_ROUTES.items())))
    parts.append(
        "`/tokenizer_info` is there with `--enable-tokenizer-info-endpoint`, `/start_profile` and `/stop_profile` with "
        "`--profiler-config`. Responses are kept only with `VLLM_ENABLE_RESPONSES_API_STORE=1`."
    )
    parts.append(
        f"Below `{SESSION}`, or with the token of a session, these are calls of that session ([agents.md](agents.md)), "
        "which take any `model`: `POST " + "`, `POST ".join(SESSION_CALLS) + "`."
    )
    parts.append("## Errors")
    parts.append(
        'Every answer that is no success is `{"error": {"code", "message", "detail"}}`; the message says what to do. A '
        "line that ends a stream of NDJSON early has the same form. What vLLM's routes refuse themselves has vLLM's, "
        "except where its engine refuses a request for a stream. An error that ends a stream of events later is an "
        "event in the form of the route."
    )
    parts.append(_table(("code", "status"), ((f"`{c.value}`", str(error_class(c).status)) for c in ErrorCode)))
    parts.append("## Bodies")
    for name in used:
        parts += [f"### {name}", models[name].get("description", "")]
        parts.append(_table(("field", "type", "default", ""), _fields(models[name])))
    return _NOTE + "\n\n".join(part for part in parts if part) + "\n"


def _command(parser: argparse.ArgumentParser) -> Iterable[str]:
    """A heading, what the command does, and a table of its flags."""
    rows = []
    formatter = parser._get_formatter()
    for action in parser._actions[1:]:  # without --help
        required = action.required and action.option_strings
        has_default = action.default is not None and action.default is not False  # 0.0 is one
        default = "required" if required else f"`{action.default}`" if has_default else ""
        text = formatter._expand_help(action).replace(f" (default {action.default})", "")
        rows.append((f"`{(action.option_strings or [(action.dest).upper()])[0]}`", default, text))
    return f"## {parser.prog}", parser.description or "", _table(("flag", "default", ""), rows)


def _row(field: dataclasses.Field[Any], joint: str) -> tuple[str, str, str]:
    default = "" if field.default in (None, "") else f"`{str(field.default).lower()}`"
    return f"`--{field.name.replace('_', joint)}`", default, field.metadata["help"]


def _parameter(parameter: dict[str, Any]) -> tuple[str, str, str]:
    schema = parameter["schema"]
    return f"`{parameter['name']}`", _type(schema), parameter.get("description", schema.get("description", ""))


def _fields(model: dict[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    for name, field in model.get("properties", {}).items():
        default = "required" if name in model.get("required", ()) else _default(field.get("default"))
        yield f"`{name}`", _type(field), default, field.get("description", "")


def _default(value: Any) -> str:
    return "" if value is None or isinstance(value, dict) else f"`{json.dumps(value)}`"


def _type(schema: dict[str, Any]) -> str:
    if name := _referred(schema):
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = _type(schema.get("items", {}))
        return f"list of ({items})" if " or " in items else f"list of {items}"
    return schema.get("type", "any")


def _referred(schema: dict[str, Any]) -> str:
    return schema.get("$ref", "").rpartition("/")[2]


def _mentioned(name: str, models: dict[str, Any]) -> dict[str, None]:
    """`name` and the models inside it, in reading order."""
    found = {name: None}
    for inner in re.findall(r"#/components/schemas/(\w+)", str(models[name])):
        if inner not in found and "enum" not in models[inner]:
            found |= _mentioned(inner, models)
    return found


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


PAGES = {"cli.md": cli_page, "http.md": http_page}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
