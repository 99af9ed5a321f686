"""Download a wheel from the package index with an available installer. Nothing in the wheel is installed or run.

An environment made by uv has no pip, so there are four routes: this interpreter's pip; the pip that the standard
library bundles for `ensurepip`; uv; a pip on the PATH. The installers read their own settings, so mirrors and proxies
work.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from programmable_kv.errors import ModelUnavailableError

_POLL_SECONDS = 0.2
_DOWNLOAD = ("download", "--only-binary=:all:", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest")


@dataclass(frozen=True, slots=True)
class Route:
    """An installer that can fetch a wheel."""

    name: str
    program: tuple[str, ...]
    is_pip: bool

    def command(self, requirement: str, folder: Path) -> list[str]:
        """The command: pip downloads the wheel to `folder`; uv, which cannot only download, unpacks it there."""
        if self.is_pip:
            return [*self.program, *_DOWNLOAD, str(folder), requirement]
        options = (
            "pip",
            "install",
            "--no-deps",
            "--only-binary=:all:",
            "--no-cache",
            "--quiet",
            "--python",
            sys.executable,
        )
        return [*self.program, *options, "--target", str(folder), requirement]


def routes() -> list[Route]:
    """The available installers, in the order in which they are tried."""
    found = []
    if find_spec("pip") is not None:
        found.append(Route("this environment's pip", (sys.executable, "-m", "pip"), True))
    bundled = _bundled_pip()
    if bundled is not None:
        found.append(Route("the standard library's pip", (sys.executable, str(bundled / "pip")), True))
    for name, is_pip in (("uv", False), ("pip", True), ("pip3", True)):
        program = shutil.which(name)
        if program is not None:
            found.append(Route(program, (program,), is_pip))
    return found


def _bundled_pip() -> Path | None:
    """The wheel of pip that `ensurepip` would install. Python can run code from a wheel, which is an archive."""
    folders = [sysconfig.get_config_var("WHEEL_PKG_DIR")]  # used by distributions that unbundle the wheel
    spec = find_spec("ensurepip")
    if spec is not None and spec.origin is not None:
        folders.append(str(Path(spec.origin).parent / "_bundled"))
    wheels = [wheel for folder in folders if folder for wheel in sorted(Path(folder).glob("pip-*.whl"))]
    return wheels[-1] if wheels else None


def download(requirement: str, folder: Path, report: Callable[[int], None], *, instead: str) -> None:
    """Download `requirement` into `folder`, as a wheel or unpacked.

    Args:
        report: called several times a second with the number of bytes in the folder so far.
        instead: what to do if no route works; the error's message ends with it.

    Raises:
        ModelUnavailableError: no route works; the message has the last line of each route's output.
        OSError: the disk is full.
    """
    failures: list[str] = []
    pip_failed = False
    for route in routes():
        if route.is_pip and pip_failed:
            continue  # another pip reads the same settings, so it would fail on the index too
        code, output = _run(route.command(requirement, folder), folder, report)
        if code == 0:
            return
        if "No space left" in output:
            raise OSError(errno.ENOSPC, "No space left on device")
        pip_failed = pip_failed or (route.is_pip and "No module named" not in output and "Traceback" not in output)
        failures.append(f"{route.name}: {_last_line(output)}")
    if not failures:
        raise ModelUnavailableError(f"could not download {requirement}: neither pip nor uv is installed. {instead}")
    raise ModelUnavailableError(f"could not download {requirement} ({'; '.join(failures)}). {instead}")


def _run(command: list[str], folder: Path, report: Callable[[int], None]) -> tuple[int, str]:
    """Run a command; returns its exit status and output. Its temporary files go to `folder`, so they are counted."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)},
        )
    except OSError as error:
        return 1, str(error)
    with child:
        try:
            while True:
                try:
                    output, _ = child.communicate(timeout=_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    report(_nbytes(folder))
                else:
                    return child.returncode, output
        except BaseException:  # also on Ctrl-C: the download must not continue in the background
            child.kill()
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _nbytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed or removed in the meantime
            continue
    return total


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and "WARNING" not in line]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]
