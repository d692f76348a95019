"""What the dashboard asks for is what learner, server and vLLM export."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry

import rollout_server.api.metrics  # noqa: F401 - registers the server's
from learner.monitors.prometheus import LearnerMetrics
from learner.servers.discovery import ServerDiscovery
from learner.servers.pool import ServerPool
from tests.support.dashboard import DASHBOARD, DEPLOY, names_asked_for

SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def _exported(registry: CollectorRegistry) -> set[str]:
    return {family.name + end for family in registry.collect() for end in SERIES.get(family.type, ())}


def _vllm() -> set[str]:
    """Names in vLLM's source, where each metric is made by a call with its name."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    spec = importlib.util.find_spec("vllm.v1.metrics.loggers")
    assert spec
    assert spec.origin
    texts = (
        node.value for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, ast.Constant)
    )
    names = {text for text in texts if isinstance(text, str) and text.startswith("vllm:")}
    return names | {name + "_total" for name in names}


@pytest.fixture
def learner() -> LearnerMetrics:
    pool = ServerPool(lambda url: pytest.fail("nobody is called"), ServerDiscovery(["http://a:1"]))
    return LearnerMetrics(pool, run_id="r", model="m")


def test_every_name_is_exported(learner: LearnerMetrics) -> None:
    asked = names_asked_for()
    assert len(asked) > 30
    ours = _exported(learner.registry) | _exported(REGISTRY)
    assert {name for name in asked if name.startswith("lockstep")} <= ours
    assert {name for name in asked if name.startswith("vllm")} <= _vllm()


def test_panels_do_not_overlap_and_fill_their_rows() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "no holes"
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)


def test_the_scrape_configuration_asks_with_a_token_of_the_servers_role() -> None:
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in configuration["scrape_configs"]}
    server = jobs["rollout-server"]
    assert server["authorization"]["credentials_file"] == "/run/secrets/metrics_token"
    assert server["dns_sd_configs"][0] | {"refresh_interval": ""} == {
        "names": ["rollout-server"],
        "type": "A",
        "port": 8000,
        "refresh_interval": "",
    }
    assert jobs["learner"]["static_configs"] == [{"targets": ["learner:9100"]}]


@pytest.mark.parametrize("whose", ["learner", "server"])
def test_the_tables_of_the_docs(learner: LearnerMetrics, whose: str) -> None:
    registry = learner.registry if whose == "learner" else REGISTRY
    exported = [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} | {family.documentation} |"
        for family in registry.collect()
        if family.name.startswith("lockstep_")
    ]
    section = (
        (DEPLOY.parent / "docs" / "watching.md").read_text().split(f"<!-- {whose} metrics -->")[1].split("\n\n")[0]
    )
    assert section.splitlines()[3:] == exported
