"""`docs/deploying.md` and the files in `deploy/`: their options, metrics and packages exist, and the unit is valid."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer.main
import yaml
from starlette.testclient import TestClient

from programmable_kv.cli import app
from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import GatewaySettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
UNIT = (ROOT / "deploy" / "pkv.service").read_text(encoding="utf-8")
CONTAINER = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "deploy" / "gateway.env.example").read_text(encoding="utf-8")
FLEET = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))


def options() -> set[str]:
    """The options of `pkv serve`."""
    command = typer.main.get_command(app)
    serve = command.commands["serve"]  # type: ignore[attr-defined]
    return {"--help", *(name for each in serve.params for name in each.opts)}


def installed() -> list[str]:
    """The packages that the container installs besides this one."""
    found = re.search(r"-c constraints\.txt \\\n(.*)\n", CONTAINER)
    assert found
    return found[1].split()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>]", name)[0]).lower()


@pytest.mark.parametrize(
    "words",
    [
        shlex.split(next(line for line in UNIT.splitlines() if line.startswith("ExecStart="))),
        json.loads(CONTAINER.partition("ENTRYPOINT ")[2].partition("\n")[0]),
        shlex.split(EXAMPLE.partition('PKV_OPTIONS="')[2].partition('"')[0]),
        re.findall(r"--[a-z-]+", EXAMPLE),
        re.findall(
            r"(?<=`)--[a-z-]+", PAGE.replace("`--tensor-parallel-size 2`", "").replace("`--data-parallel-size`", "")
        ),
        FLEET["services"]["gateway"]["command"],
    ],
)
def test_options_exist(words: list[str]) -> None:
    used = {word for word in words if word.startswith("--")}
    assert used
    assert used <= options(), used - options()


def test_the_fleet_is_one() -> None:
    """The fleet's gateways are equal, use services that exist, and are behind the balancer."""
    services = FLEET["services"]
    words = services["gateway"]["command"]
    assert services["gateway-2"] == services["gateway"]
    upstreams = [words[at + 1] for at, word in enumerate(words) if word == "--upstream"]
    assert [urlsplit(each).hostname for each in upstreams] == ["vllm-1", "vllm-2"]
    assert {"vllm-1", "vllm-2", "database"} <= set(services)
    assert urlsplit(words[words.index("--state") + 1]).hostname == "database"
    assert "PGPASSWORD" in services["gateway"]["environment"]
    balancer = (ROOT / "deploy" / "fleet.nginx.conf").read_text(encoding="utf-8")
    assert set(re.findall(r"server (\S+):8787", balancer)) == {"gateway", "gateway-2"}
    limits = [services[name]["deploy"]["resources"]["reservations"] for name in ("vllm-1", "vllm-2")]
    assert [each["devices"][0]["device_ids"] for each in limits] == [["0", "1"], ["2", "3"]]


def test_metrics_exist() -> None:
    settings = GatewaySettings("http://127.0.0.1:1", mode=GatewayMode.ERRATUM)
    with TestClient(gateway_app(settings), base_url="http://127.0.0.1") as client:
        text = client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    named = set(re.findall(r"\bpkv_[a-z_]+", PAGE))
    assert len(named) > 10
    assert named <= set(kinds), named - set(kinds)


def test_the_container_installs_what_the_extras_name_at_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {normal(each) for each in installed()} == {
        "platformdirs", *(normal(each) for extra in ("cli", "serve", "postgres") for each in extras[extra])
    }  # fmt: skip
    pinned = {normal(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert {normal(each) for each in installed()} <= pinned


def test_a_gateway_needs_no_more_than_the_container_installs() -> None:
    """A gateway starts and answers even if the model's packages cannot be imported."""
    code = """
import sys
for name in ("torch", "transformers", "safetensors", "jinja2", "numpy", "fsspec"):
    sys.modules[name] = None
import programmable_kv.commands.serve
from programmable_kv.cli import app
from programmable_kv.serve.run import server_of
from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import GatewaySettings, default_state
from starlette.testclient import TestClient
default_state("gateway")
settings = GatewaySettings("http://127.0.0.1:1", mode=GatewayMode.ERRATUM, salts=True)
server_of(settings, gateway_app(settings))
with TestClient(gateway_app(settings), base_url="http://127.0.0.1") as client:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    print(client.post("/v1/chat/completions", json=body).status_code, client.get("/pkv/report").status_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["502", "200"], done.stderr


def without_torch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `pkv` in an interpreter that sees every installed package except torch and transformers."""
    import starlette

    for entry in Path(starlette.__file__).parents[1].iterdir():
        if not entry.name.startswith(("torch", "transformers", "functorch")) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    code = "from programmable_kv.__main__ import main; main()"
    paths = os.pathsep.join([str(ROOT / "src"), str(folder)])
    line = [sys.executable, "-S", "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": paths, "NO_COLOR": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_a_server_of_a_model_without_torch_says_what_to_install(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "serve", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error (MissingExtra): torch, transformers are not installed. Run: pip install 'programmable-kv[embedded]'. Or give "
        "--upstream: a gateway in front of a model server needs neither\n"
    )


def test_another_command_that_needs_a_model_says_it_too(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "demo")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error (MissingExtra): torch is not installed. Run: pip install 'programmable-kv[embedded]'"
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(("line", "fine"), [("", True), ("ProtectSystem=strictly\n", False)])
def test_the_unit_is_verified(tmp_path: Path, line: str, fine: bool) -> None:
    """The unit is verified with the path of an existing program. A wrong line fails, so the check is effective."""
    text = UNIT.replace("/opt/pkv/bin/pkv", sys.executable).replace(
        "CapabilityBoundingSet=\n", f"CapabilityBoundingSet=\n{line}"
    )
    unit = tmp_path / "pkv.service"
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0 and not done.stderr.strip()) is fine, done.stderr
