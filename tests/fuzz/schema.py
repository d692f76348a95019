"""Requests that schemathesis generates from an OpenAPI schema, valid and invalid ones."""

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
    """Return the schema of our routes from the server."""
    return dict(target.http.get("/openapi.json").json())


def openai_schema(argv: list[str]) -> dict[str, Any]:
    """Return the schema of vLLM's own routes, from an app as the server builds it with the command line `argv`."""
    from rollout_server import cli
    from rollout_server.api import app
    from rollout_server.vllm_compat import versions

    args, config, _ = cli.resolve(argv)
    openai_app = versions.build_openai_app(args, ("generate",), config.model_config)
    app.build_app(cast(Any, None), openai_app)  # removes the routes that the server hides
    return dict(openai_app.openapi())


def fuzz_schema(target: Target, name: str, document: dict[str, Any], examples: int, number: int) -> None:
    """Send requests to every operation of a schema; half of them are invalid."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.path != "/v1/drain"]  # it would end the server
    with requests.Session() as session:

        def send(case: Any) -> None:
            case.body = tamed(case.body)
            about = {"headers": dict(case.headers or {}), "query": dict(case.query or {}), "body": case.body}
            target.during = f"{name}: {case.method} {case.formatted_path} to {shown(about)}"
            try:
                answer = case.call(base_url=target.url, session=session, timeout=DEADLINE_S)
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError, ValueError):
                return  # the client cannot send it
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
                # An operation without parameters has no invalid requests.
                with contextlib.suppress(Unsatisfiable, InvalidArgument):
                    every(operation.as_strategy(generation_mode=mode), share, number, send)
    target.expect_unchanged(f"the schema of {name}")
