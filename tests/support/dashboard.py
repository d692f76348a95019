"""The Grafana dashboard, and what it asks Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "lockstep.json").read_text())


def names_asked_for() -> set[str]:
    """Names of all series in the queries of panels and variables."""
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    queries += [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"][1:]]
    return {name for text in queries for name in re.findall(r"\b(?:lockstep|vllm)[\w:]+", text)}
