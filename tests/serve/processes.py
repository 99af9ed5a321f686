"""Servers in separate processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from serve.http_peers import wait_until


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def process(*words: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a separate process, and wait until it answers requests."""
    found = subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        wait_until(lambda: found.poll() is not None or _answers(port), 120)
        assert found.poll() is None, (found.stderr.read() if found.stderr else b"").decode()
        yield found
    finally:
        if found.poll() is None:
            found.send_signal(signal.SIGKILL)
        found.wait(10)
        if found.stderr:
            found.stderr.close()


def _answers(port: int) -> bool:
    try:
        return bool(httpx2.get(f"http://127.0.0.1:{port}/healthz", timeout=1).status_code == 200)
    except httpx2.HTTPError:
        return False
