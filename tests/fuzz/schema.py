"""Requests that schemathesis makes of an OpenAPI schema: such as it allows, and such as it forbids."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import requests
import schemathesis
from hypothesis.errors import InvalidArgument, Unsatisfiable
from schemathesis import GenerationMode

from tests.fuzz.campaign import DEADLINE_S, Target, every, shown
from tests.fuzz.routes import tamed


def own_schema(target: Target) -> dict[str, Any]:
    """Of our routes, as the server tells it."""
    return dict(target.http.get("/openapi.json").json())


def openai_schema(argv: list[str]) -> dict[str, Any]:
    """Of vLLM's routes below ours, from an app like the server's; `argv`: the server's command line."""
    from rollout_server import cli
    from rollout_server.api import app
    from rollout_server.vllm_compat import versions

    args, config, _ = cli.resolve(argv)
    openai_app = versions.build_openai_app(args, ("generate",), config.model_config)
    app.build_app(cast(Any, None), openai_app)  # which leaves out what the server does not show
    return dict(openai_app.openapi())


def fuzz_schema(target: Target, name: str, document: dict[str, Any], examples: int, number: int) -> None:
    """Every operation of a schema, half of the requests against its rules."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.path != "/v1/drain"]  # does what it says
    with requests.Session() as session:

        def send(case: Any) -> None:
            case.body = tamed(case.body)
            about = {"headers": dict(case.headers or {}), "query": dict(case.query or {}), "body": case.body}
            try:
                answer = case.call(base_url=target.url, session=session, timeout=DEADLINE_S)
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError, ValueError):
                return  # nothing that the client could have sent
            except requests.RequestException as error:
                target.tally.fail(
                    f"{name}: {case.method} {case.formatted_path}: no answer: {error!r} to {shown(about)}"
                )
                return
            target.judge(
                name,
                case.method,
                case.formatted_path,
                answer.status_code,
                answer.text,
                answer.elapsed,
                about,
            )

        share = max(1, examples // (2 * len(operations)))
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                # Nothing about an operation without parameters can be wrong.
                with contextlib.suppress(Unsatisfiable, InvalidArgument):
                    every(operation.as_strategy(generation_mode=mode), share, number, send)
    target.expect_unchanged(f"the schema of {name}")
