from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.servers.client import RolloutClient
from tests.integration.support.server import ServerProcess, running_server
from tests.support.arguments import arguments
from tests.support.tiny_model import make_tiny_model

FLAGS = arguments(
    {
        "--max-lora-rank": 16,
        "--dtype": "float32",
        "--max-model-len": 1024,
        "--max-num-seqs": 64,
        "--max-num-batched-tokens": 256,
        "--enforce-eager": None,
        "--served-model-name": "base",
    }
)

_LEVEL = logging.root.level


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """vLLM within this process lets the root logger pass errors only."""
    yield
    logging.root.setLevel(_LEVEL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 in float32."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


#: Of agents that have tools.
TOOLS = arguments({"--enable-auto-tool-choice": None, "--tool-call-parser": "hermes"})


@pytest.fixture(scope="session")
def one_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(model, tmp_path_factory.mktemp("server"), *FLAGS, *TOOLS) as process:
        yield process


@pytest.fixture(scope="module")
def server(one_server: ServerProcess) -> Iterator[ServerProcess]:
    """One server for all modules, each of which finds it without runs; prefix cache on, as by default."""
    yield one_server
    with RolloutClient(one_server.url) as client:
        for run in client.state().runs:
            client.delete_run(run.run_id, "of-nobody", takeover=True)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[RolloutClient]:
    with RolloutClient(server.url, server.token) as client:
        yield client
