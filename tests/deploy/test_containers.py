"""The container files: linted, as safe as they say, and their steps run in a clean environment."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from pip._internal.models.index import PyPI

from tests.architecture.source_tree import ROOT

DEPLOY = ROOT / "deploy"
YAML_RULES = "{extends: default, rules: {line-length: {max: 125}, document-start: disable}}"
COMPILERS = re.compile(r"\b(gcc|g\+\+|clang|build-essential|nvcc|make|cmake|rustc|-devel)\b")


@dataclass
class Stage:
    """A stage of a Dockerfile: what it builds on, and its instructions in order."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        return next((rest for name, rest in reversed(self.steps) if name == instruction), None)


def stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    out: dict[str, Stage] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stage = out[alias] = Stage(base)
        else:
            stage.steps.append((name, rest.strip()))
    return out


def lineage(target: str) -> list[tuple[str, str]]:
    """All instructions of a stage and of those that it builds on."""
    known, out = stages(), []
    while target in known:
        out[:0] = known[target].steps
        target = known[target].base
    return out


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def test_linters_find_nothing() -> None:
    assert run(tool("hadolint"), "Dockerfile") == ""
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    manifests = sorted(DEPLOY.glob("kubernetes/*.yaml"))
    assert manifests
    run(tool("kubernetes-validate"), "--strict", *manifests)
    assert run(tool("yamllint"), "-s", "-d", YAML_RULES, "docker-compose.yml", "deploy") == ""


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_is_shipped_is_small_and_humble(target: str) -> None:
    stage = stages()[target]
    steps = [*lineage(target)]
    assert stage.last("USER") == "10001:10001"
    assert not [rest for name, rest in steps if name == "RUN" and (COMPILERS.search(rest) or "apt" in rest)]
    assert not [rest for name, rest in steps if name == "COPY" and "--from=" not in rest]
    assert stages()[stage.base].base.endswith("-slim-bookworm")
    assert {"HEALTHCHECK", "ENTRYPOINT", "STOPSIGNAL", "VOLUME"} <= {name for name, _ in steps}
    assert not [rest for name, rest in steps if name in {"ENV", "ARG"} and re.search("KEY|SECRET|TOKEN|OPEN", rest)]


def test_everything_that_is_copied_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for stage in stages().values()
        for name, rest in stage.steps
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / path).exists() for path in sent)


def test_compose_serves_the_demo_to_this_machine_only() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services.keys() == {"loramux", "prometheus", "grafana"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).exists()
    assert services["loramux"]["read_only"]
    assert services["loramux"]["cap_drop"] == ["ALL"]


def test_probes_mean_different_things() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes/loramux.yaml").read_text()))
    pod = next(one for one in documents if one and one["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600
    environment = {one["name"]: one["value"] for one in container["env"]}
    drain_s = float(environment["LORAMUX_DRAIN_TIMEOUT_S"])
    grace_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain_s
    assert pod["terminationGracePeriodSeconds"] > grace_s + 5
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_board_shows_what_there_is() -> None:
    board = json.loads((DEPLOY / "grafana/boards/loramux.json").read_text())
    metrics = (ROOT / "server/metrics.py").read_text()
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expression in expressions for name in re.findall(r"loramux_\w+", expression)}
    assert len(names) >= 15
    for name in names:
        assert f'"{re.sub("_(total|bucket)$", "", name)}"' in metrics, name
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {sources[0]["uid"]}


class Container:
    """What an image of this target would hold, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PATH": os.environ["PATH"]}
        self.folder = "/"

    def inside(self, text: str) -> str:
        """The same with the image's paths below the folder."""
        return re.sub(r"(?<![\w./:])/(opt|src|data|cache)\b", rf"{self.root}/\1", text)

    def do(self, name: str, rest: str, arguments: dict[str, str]) -> None:
        if name == "WORKDIR":
            self.folder = self.inside(rest)
            Path(self.folder).mkdir(parents=True)
        elif name == "ENV":
            pairs = (pair.partition("=") for pair in shlex.split(rest))
            for key, _, value in pairs:
                self.environment[key] = self.inside(value.replace("$PATH", self.environment["PATH"]))
        elif name == "ARG":
            key, _, default = rest.partition("=")
            self.environment[key] = arguments.get(key, default)
        elif name == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                at = Path(self.folder, target) if target != "./" else Path(self.folder, source)
                copy: Any = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                at.parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / source, at)
        elif name == "RUN" and "groupadd" in rest:  # only root may
            for folder in ("data", "cache"):
                (self.root / folder).mkdir()
        elif name == "RUN":
            subprocess.run(["bash", "-ec", self.inside(rest)], cwd=self.folder, env=self.environment, check=True)


def _index() -> str:
    """Where this machine gets its packages from."""
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or os.environ.get("PIP_INDEX_URL") or PyPI.simple_url


@pytest.mark.slow
def test_the_steps_run_in_a_clean_environment(tmp_path: Path) -> None:
    container = Container(tmp_path)
    for name, rest in [*lineage("build-cpu"), *lineage("cpu")]:
        container.do(name, rest, {"TORCH_INDEX": _index()})
    steps = dict(lineage("cpu"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        container.environment["LORAMUX_PORT"] = str(probe.getsockname()[1])
    environment = container.environment | {"LORAMUX_MIN_FREE_BYTES": "0"}
    command = [*json.loads(steps["ENTRYPOINT"]), *json.loads(steps["CMD"])]
    check = json.loads(steps["HEALTHCHECK"].partition(" CMD ")[2])
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "open_on_public_address" in refused.stderr
    server = subprocess.Popen(command, env=environment | {"LORAMUX_ALLOW_OPEN": "true"}, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 400
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
    finally:
        server.kill()
        server.wait()
    assert subprocess.run(check, env=environment, capture_output=True, check=False).returncode != 0
