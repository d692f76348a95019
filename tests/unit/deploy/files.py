"""What is deployed, as the tests look at it: containers with their command, environment and probes."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
#: Where a container's command comes from.
COMPOSE = ("docker-compose.yml", "compose.gpu.yml")
KUBERNETES = ("base", "gpu")


@dataclass(frozen=True)
class Container:
    """One of a server or a learner, with its command as a list of arguments."""

    place: str
    name: str
    command: list[str]
    spec: dict[str, Any]

    def value(self, flag: str) -> str:
        """Of a flag given as `--flag value` or `--flag=value`."""
        words = [word for part in self.command for word in part.split("=", 1)]
        return words[words.index(flag) + 1]


def compose(file: str) -> dict[str, Any]:
    """A composition with its variables as they are in an empty environment."""
    text = (ROOT / file).read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def manifests(folder: str) -> list[dict[str, Any]]:
    """All documents of a folder of deploy/kubernetes, but for the kustomization."""
    files = sorted((ROOT / "deploy" / "kubernetes" / folder).glob("*.yaml"))
    return [
        document for file in files if file.name != "kustomization.yaml" for document in yaml.safe_load_all(file.open())
    ]


def containers(name: str) -> list[Container]:
    """Every container called `name`, in compositions and manifests."""
    found = []
    for file in COMPOSE:
        service = compose(file)["services"][name]
        found.append(Container(file, name, shlex.split(service["command"]), service))
    for folder in KUBERNETES:
        pods = [
            manifest["spec"]["template"]["spec"]
            for manifest in manifests(folder)
            if manifest["kind"] in ("StatefulSet", "Job")
        ]
        specs = [spec for pod in pods for spec in pod["containers"] if spec["name"] == name]
        found += [Container(folder, name, spec["args"], spec) for spec in specs]
    return found
