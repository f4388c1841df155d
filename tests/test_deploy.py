"""The files in configs/deploy/ are understood by what they are for."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanogpt import options
from nanogpt.config import PROJECT

DEPLOY = PROJECT / "configs" / "deploy"
QUEUE = {"NANOGPT_QUEUE_URL": "redis://queue:6379/0"}


def parse(arguments: list[str]):
    """As the process that is started there reads them."""
    found = [str(PROJECT / a) if a.startswith("configs/") else a for a in arguments]
    return options.parse(found, QUEUE)


def images() -> dict[str, list[str]]:
    """What each image of the Dockerfile starts, without ./launch.sh."""
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S)
    found = {}
    for name, body in stages:
        if entry := re.search(r"^ENTRYPOINT (\[.*\])$", body, re.M):
            command = yaml.safe_load(entry[1])
            assert command[0] == "./launch.sh"
            found[name] = command[1:]
    return found


def manifests() -> dict[str, dict]:
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {f"{m['kind']}/{m['metadata']['name']}": m for m in found}


@pytest.mark.parametrize("role", ["web", "worker"])
def test_units_start_what_they_are_for(role):
    text = (DEPLOY / f"nanogpt-{role}.service").read_text()
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])
    config = parse(command[command.index("/opt/nanogpt-cluster/launch.sh") + 1 :])
    assert config.role == role
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1])
    assert stop_s > config.http.drain_s + 5


@pytest.mark.parametrize("role", ["web", "worker"])
def test_units_are_valid(role, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # Its own user, files and directories are not on this machine.
    text = (DEPLOY / f"nanogpt-{role}.service").read_text()
    text = text.replace("User=nanogpt", "User=root").replace("/opt/nanogpt-cluster", str(PROJECT))
    unit = tmp_path / f"nanogpt-{role}.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []


@pytest.mark.parametrize(
    "linter",
    [
        ["hadolint", "Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        ["kubernetes-validate", "--strict", "kubernetes.yaml"],
    ],
    ids=lambda command: command[0],
)
def test_their_linters_have_no_word_against_them(linter):
    command = [str(Path(sys.executable).with_name(linter[0])), *linter[1:]]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_take_their_roles():
    assert {name: parse(arguments).role for name, arguments in images().items()} == {
        "web": "web",
        "worker": "worker",
    }


def test_compose_starts_both_roles_and_a_redis_that_forgets_nothing():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert "appendonly yes --appendfsync always" in " ".join(services["redis"]["command"])
    entries = images()
    for name in ("web", "worker"):
        service = services[name]
        assert (DEPLOY / service["build"]["context"]).resolve() == PROJECT
        config = options.parse(
            [*entries[service["build"]["target"]], *service.get("command", [])],
            service["environment"],
        )
        assert config.role == name
        assert config.queue.url == "redis://redis:6379/0"
        assert int(service["stop_grace_period"].removesuffix("s")) > config.http.drain_s + 5


@pytest.mark.parametrize("role", ["web", "worker"])
def test_kubernetes_starts_both_roles(role):
    spec = manifests()[f"Deployment/nanogpt-{role}"]["spec"]
    pod = spec["template"]
    assert spec["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    config = parse([*images()[role], *container.get("args", [])])
    assert config.role == role
    assert {"name": "http", "containerPort": config.port} in container["ports"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.http.drain_s + 5
    if role == "worker":
        assert container["resources"]["limits"]["nvidia.com/gpu"] == config.ranks


def test_the_service_finds_the_web_servers():
    known = manifests()
    web = known["Deployment/nanogpt-web"]["spec"]["template"]["metadata"]["labels"]
    service = known["Service/nanogpt"]["spec"]
    assert service["selector"].items() <= web.items()
    assert service["ports"][0]["targetPort"] == "http"


def test_a_web_server_runs_on_what_its_list_names():
    """Every package that it imports is listed, or comes with one that is."""
    code = (
        "import sys, frontend; from nanogpt.jobs import redis; import redis as r, tiktoken;"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [shutil.which("python", path=str(PROJECT / ".venv/bin")) or "python3", "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "matplotlib"}
    assert not heavy & set(done.stdout.split())
