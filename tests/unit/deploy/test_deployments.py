"""Compositions and manifests start what there is: flags, ports, probes, tokens and packages are ours."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from rollout_server.api.security.roles import OPEN, Role, role_needed
from tests.unit.deploy.files import COMPOSE, ROOT, Container, compose, containers, manifests

SERVERS, LEARNERS = containers("rollout-server"), containers("learner")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
#: List -> package and version, with the options of pip that follow them.
LISTS = {
    path.stem: [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for path in [ROOT / "deploy" / "constraints-cpu.txt", *sorted((ROOT / "deploy" / "packages").glob("*.txt"))]
}
PINNED = LISTS["constraints-cpu"]
PACKAGES = {name: [line.split()[0] for line in lines] for name, lines in LISTS.items() if lines is not PINNED}


def _place(container: Container) -> str:
    return container.place


@pytest.fixture
def local(tmp_path: Path):
    """A command whose files are of this machine: tokens, and recipes."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for name in ("weights_token", "metrics_token"):
        (tokens / name).write_text(name * 3)

    def translate(command: list[str]) -> list[str]:
        words = [re.sub(r"/run/secrets/(\w+/)?", f"{tokens}/", word) for word in command]
        return [word.replace("/opt/lockstep/recipes", str(ROOT / "recipes")) for word in words]

    return translate


@pytest.mark.parametrize("server", SERVERS, ids=_place)
def test_servers_understand_their_flags(server: Container, local) -> None:
    pytest.importorskip("vllm")
    from rollout_server.cli import parse

    args, settings = parse(local(server.command))
    assert (args.host, args.port, args.model) == ("0.0.0.0", 8000, server.command[0])
    assert settings.token_file.endswith("weights_token")
    assert settings.metrics_token_file.endswith("metrics_token")


@pytest.mark.parametrize("learner", LEARNERS, ids=_place)
def test_learners_understand_their_flags(learner: Container, local) -> None:
    pytest.importorskip("trl")
    from learner.commands.train import parse

    command = local(learner.command)
    assert command[0] == "train"
    config, args, model = parse([*command[1:], "--use_cpu", "true", "--bf16", "false"])
    server = next(server for server in SERVERS if server.place == learner.place)
    assert model.model_name_or_path == server.command[0]
    assert config.require_urls()
    assert config.require_task()
    assert config.metrics_port == 9100
    # A learner that is started again goes on from here.
    assert args.save_strategy == "steps"
    assert args.save_steps < args.max_steps
    assert args.output_dir.startswith("/runs/")
    assert model.lora_r <= int(server.value("--max-lora-rank"))


@pytest.mark.parametrize("place", ["docker-compose.yml", "base"])
def test_supervisors_wait_for_draining(place: str) -> None:
    server = next(server for server in SERVERS if server.place == place)
    if place in COMPOSE:
        grace = int(server.spec["stop_grace_period"].removesuffix("s"))
    else:
        stateful = next(manifest for manifest in manifests(place) if manifest["kind"] == "StatefulSet")
        grace = stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= int(server.value("--drain-seconds")) + 15


def test_probes_and_scrapes_ask_for_routes_that_they_may_read() -> None:
    server = next(server for server in SERVERS if server.place == "base")
    ports = {port["name"]: port["containerPort"] for port in server.spec["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = server.spec[probe]["httpGet"]
        assert asked["path"] in OPEN
        assert ports[asked["port"]] == 8000
    assert server.spec["readinessProbe"]["httpGet"]["path"] == "/ready"
    health = " ".join(compose("docker-compose.yml")["services"]["rollout-server"]["healthcheck"]["test"])
    assert re.findall(r"http://127\.0\.0\.1:8000(/\w+)", health) == ["/ready"]

    monitor = next(manifest for manifest in manifests("monitoring") if manifest["kind"] == "ServiceMonitor")
    endpoint = monitor["spec"]["endpoints"][0]
    assert role_needed("GET", endpoint["path"]) is Role.METRICS
    services = {
        manifest["metadata"]["name"]: manifest for manifest in manifests("base") if manifest["kind"] == "Service"
    }
    assert endpoint["port"] in {port["name"] for port in services["rollout"]["spec"]["ports"]}
    assert monitor["spec"]["selector"]["matchLabels"].items() <= services["rollout"]["metadata"]["labels"].items()
    kustomization = yaml.safe_load((ROOT / "deploy/kubernetes/base/kustomization.yaml").read_text())
    secrets = {secret["name"]: secret["files"] for secret in kustomization["secretGenerator"]}
    token = endpoint["authorization"]["credentials"]
    assert secrets[token["name"]] == [f"tokens/{token['key']}"]
    assert "deploy/kubernetes/base/tokens/" in (ROOT / ".gitignore").read_text().splitlines()


def test_only_what_the_learner_needs_reaches_a_server() -> None:
    policies = {
        manifest["metadata"]["name"]: manifest["spec"]
        for manifest in manifests("base")
        if manifest["kind"] == "NetworkPolicy"
    }
    server = policies["rollout-server"]
    assert [rule["ports"] for rule in server["ingress"]] == [[{"port": 8000}]]
    assert server["egress"] == []
    published = [
        port for service in compose("docker-compose.yml")["services"].values() for port in service.get("ports", ())
    ]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_containers_cannot_become_more_than_they_are() -> None:
    for name in ("setup", "rollout-server", "learner"):
        service = compose("docker-compose.yml")["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for target in ("server", "learner"):
        stage = re.split(r"^FROM ", DOCKERFILE, flags=re.M)
        users = re.findall(r"^USER (\S+)", next(s for s in stage if f"AS {target}\n" in s), flags=re.M)
        assert users == ["10001:10001"]  # a number: Kubernetes sees that it is not root


def test_everything_is_pinned() -> None:
    images = [
        service["image"] for file in COMPOSE for service in compose(file)["services"].values() if "image" in service
    ]
    bases = re.findall(r"python:\S+", DOCKERFILE + (ROOT / "compose.gpu.yml").read_text())
    for image in images + bases:
        assert re.search(r":(cpu|gpu|v?\d+\.\d+\.\d+\S*)$", image), image
    for name, packages in PACKAGES.items():
        assert len(packages) > 50, name
        assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", package) for package in packages)
    assert {*LISTS["cpu-server"], *LISTS["cpu-learner"]} <= set(PINNED), "with the same hashes, too"


@pytest.mark.parametrize("name", LISTS)
def test_every_file_has_a_hash(name: str) -> None:
    """But those of torch's CPU build, whose index `make lock` may not reach."""
    for line in LISTS[name]:
        package, *hashes = line.split()
        assert hashes or re.fullmatch(r"torch==[\d.]+\+cpu", package), line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), line


def test_files_are_compared_with_their_hashes() -> None:
    for file in ("deploy/setup-cpu.sh", "deploy/Dockerfile"):
        installs = re.findall(r"\binstall .*--requirement (?!.*torch\.txt).*", (ROOT / file).read_text())
        assert len(installs) > 1
        assert all("--require-hashes" in line for line in installs), file


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_have_what_the_project_needs(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        "server": project["dependencies"],
        "learner": [*project["dependencies"], *project["optional-dependencies"]["learner"]],
    }
    for target, requirements in needed.items():
        there = {package.split("==")[0] for package in PACKAGES[f"{kind}-{target}"]}
        missing = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements} - there
        assert not missing, f"`make lock` writes deploy/packages anew: {kind}-{target} lacks {missing}"
    # What both have comes from one layer, in one version.
    server, learner = (dict(p.split("==") for p in PACKAGES[f"{kind}-{target}"]) for target in ("server", "learner"))
    assert {name for name in server.keys() & learner.keys() if server[name] != learner[name]} == set()


def test_the_build_context_has_what_is_copied() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.M):
        for source in line.split()[:-1]:
            for path in (source.replace("${PACKAGES}", kind) for kind in ("cpu", "gpu")):
                assert (ROOT / path).exists(), path
                assert any(fnmatch.fnmatch(path, rule) or rule == path + "/**" for rule in allowed), path


def test_prometheus_finds_token_and_services() -> None:
    services = compose("docker-compose.yml")["services"]
    scrapes = {
        job["job_name"]: job
        for job in yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    }
    server = scrapes["rollout-server"]
    assert server["authorization"]["credentials_file"] == "/run/secrets/metrics_token"
    assert "metrics-token:/run/secrets:ro" in services["prometheus"]["volumes"]
    assert server["dns_sd_configs"][0]["names"] == ["rollout-server"]
    assert server["dns_sd_configs"][0]["port"] == 8000
    assert scrapes["learner"]["static_configs"][0]["targets"] == ["learner:9100"]
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/lockstep.yml").read_text())["providers"][
        0
    ]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / "deploy/grafana/dashboards" / home.name).exists()
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ][0]
    assert source["url"] == "http://prometheus:9090"
