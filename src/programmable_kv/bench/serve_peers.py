"""The processes of the gateway's bench: the upstream, gateways run by `pkv serve`, and LiteLLM's proxy."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.errors import InvalidArgumentError

_START_S = 120.0
_STOP_S = 10.0
_QUIET_S = 60.0
VOLATILE = {"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]}
"""The rules for a gateway that rewrites: the clock of `serve_load`."""
LINES = ("--line-role", "system")
"""Options for gateways in front of an upstream that is not a model: it renders no prompts and accepts any role."""
_LITELLM = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_DOCS": "True",
}
"""LiteLLM's environment: as its page on production advises, and without fetching anything."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server in its own process."""

    port: int
    pid: int

    @property
    def resident_bytes(self) -> int | None:
        """The process's resident memory in bytes; None if the system does not report it (systems other than Linux)."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        except OSError:
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def metric(self, name: str) -> float:
        """The value of one of a gateway's metrics; 0 if it has none of that name."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_until_quiet(self) -> None:
        """Wait until the gateway's observer has processed everything that was sent.

        Raises:
            TimeoutError: the observer needs more than a minute.
        """
        end = time.monotonic() + _QUIET_S
        while self.metric("pkv_observer_queued_bytes"):
            if time.monotonic() > end:
                raise TimeoutError("the gateway's observer did not finish")
            time.sleep(0.001)

    def answers(self) -> bool:
        """Whether the server accepts requests."""
        try:
            return bool(self.get("/healthz"))
        except OSError:
            return False

    def get(self, path: str) -> str:
        """The body of the answer to a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()


@contextmanager
def upstream(folder: Path) -> Iterator[Peer]:
    """Run the fixed upstream; yields it when it is ready for requests."""
    with peer_of("programmable_kv.bench.fixed_upstream", folder / "upstream.log") as peer:
        yield peer


@contextmanager
def peer_of(module: str, log: Path) -> Iterator[Peer]:
    """Run a module that serves on the port that it is given; yields it when it is ready for requests."""
    port = free_port()
    with _process(["-m", module, str(port)], port, log) as peer:
        yield peer


@contextmanager
def gateway(
    mode: str,
    upstream_port: int,
    folder: Path,
    *,
    port: int | None = None,
    more: Sequence[str] = (),
    rules: Mapping[str, Any] = VOLATILE,
) -> Iterator[Peer]:
    """Run a gateway in one mode; yields it when it is ready for requests.

    Args:
        folder: the folder for its files.
        port: the port on which it listens; a free port if None.
        more: further options of `pkv serve`.
        rules: what it is told about its clients' prompts, in modes that rewrite them.
    """
    port = free_port() if port is None else port
    words = ["-m", "programmable_kv", "serve", "--upstream", f"http://127.0.0.1:{upstream_port}", "--port", str(port)]
    words += ["--mode", mode, "--state", str(folder / f"{mode}.sqlite3"), *more]
    if mode not in ("pass", "observe"):
        volatile = folder / "volatile.json"
        volatile.write_text(json.dumps(rules), encoding="utf-8")
        words += ["--volatile", str(volatile)]
    with _process(words, port, folder / f"{mode}.log") as peer:
        yield peer


@contextmanager
def litellm(python: str, upstream_port: int, folder: Path) -> Iterator[Peer]:
    """Run LiteLLM's proxy in front of the upstream: one worker, no database, no keys, no logging of requests.

    Args:
        python: the Python of an environment with `litellm[proxy]`.
    """
    port = free_port()
    settings = folder / "litellm.yaml"
    model = {"model": "openai/fixed", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    settings.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": "fixed", "litellm_params": model}],
                "general_settings": {
                    "dangerously_permit_weak_or_unset_master_key": True
                },  # the other ways need no key either
                "litellm_settings": {"set_verbose": False, "request_timeout": 600},
            }
        ),
        encoding="utf-8",
    )
    words = ["-c", "from litellm import run_server; run_server()", "--config", str(settings), "--num_workers", "1"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    with _process(words, port, folder / "litellm.log", python=python, more=_LITELLM) as peer:
        yield peer


def litellm_version(python: str) -> str:
    """The version of LiteLLM in an environment.

    Raises:
        InvalidArgumentError: the environment has no LiteLLM.
    """
    ask = "from importlib.metadata import version; print(version('litellm'), end='')"
    try:
        return subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise InvalidArgumentError(
            f"{python} has no LiteLLM: create an environment for it, and install 'litellm[proxy]' there"
        ) from error


@contextmanager
def _process(
    words: list[str], port: int, log: Path, *, python: str = sys.executable, more: Mapping[str, str] | None = None
) -> Iterator[Peer]:
    with log.open("wb") as errors:
        running = subprocess.Popen(
            [python, *words], stderr=errors, stdout=None if more is None else errors, env={**os.environ, **(more or {})}
        )
    try:
        peer = Peer(port, running.pid)
        end = time.monotonic() + _START_S
        while not peer.answers():
            if running.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"a server did not start: {log.read_text(encoding='utf-8', errors='replace')}")
            time.sleep(0.05)
        yield peer
    finally:
        stop(running, _STOP_S)


def stop(running: subprocess.Popen[bytes], patience_s: float) -> None:
    """Terminate a process, and kill it if it has not ended after `patience_s` seconds."""
    running.terminate()
    try:
        running.wait(patience_s)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
