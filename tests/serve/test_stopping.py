"""Starting and stopping: a server binds its port first. Ctrl-C ends it soon, with one word and no traceback."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.listening import bound, close, port_of
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.run import run_local
from programmable_kv.serve.settings import Limits, LocalSettings
from serve.http_peers import EVENTS_HEAD, Received, chunk, raw_upstream, running, wait_until
from serve.processes import free_port, process

INTERRUPTED = 130
LOCAL = """
import sys
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.commands import serve
serve.load = lambda _: tiny_chat_model(200_000)
from programmable_kv.cli import main
main()
"""


async def never_ends(_: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD + chunk(b"data: one\n\n")
    while True:
        await asyncio.sleep(1)


@contextmanager
def open_stream(kind: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Response]]:
    """Run a server in a process, and open a stream that would last for minutes."""
    port = free_port()
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me."}], "stream": True}
    with raw_upstream(never_ends) as upstream:
        words = ["serve", "--port", str(port), "--state", str(tmp_path / "state")]
        if kind == "gateway":
            words = ["-m", "programmable_kv", *words, "--upstream", upstream.url]
        else:
            words = ["-c", LOCAL, *words]
            body |= {"model": "tiny random llama", "max_tokens": 150_000, "temperature": 0}
        with process(*words, port=port) as served:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            with httpx2.stream("POST", url, json=body, timeout=60) as got:
                assert got.status_code == 200
                yield served, got


def said(served: subprocess.Popen[bytes]) -> str:
    assert served.stderr is not None
    return served.stderr.read().decode()


@pytest.mark.parametrize("kind", ["gateway", "local"])
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_says_what_it_waits_for_and_ends_soon(kind: str, times: int, tmp_path: Path) -> None:
    with open_stream(kind, tmp_path) as (served, got):
        parts = got.iter_raw()
        next(parts)
        assert served.stderr is not None
        served.send_signal(signal.SIGINT)
        lines = [served.stderr.readline().decode() for _ in range(2)]
        assert lines[1] == "stopping: waiting up to 5 s for 1 open request; press Ctrl-C again to end at once\n"
        began = time.monotonic()
        if times == 2:
            served.send_signal(signal.SIGINT)
        with pytest.raises(httpx2.TransportError):
            for _ in parts:
                pass
        cut_after = time.monotonic() - began
        assert (cut_after < 4) is (times == 2), cut_after
        assert served.wait(30) == INTERRUPTED  # Python may end slowly on a busy machine
        assert said(served) == "interrupted\n", "no traceback"


def test_sigterm_waits_longer_and_ctrl_c_ends_that_too(tmp_path: Path) -> None:
    with open_stream("gateway", tmp_path) as (served, got):
        next(parts := got.iter_raw())
        assert served.stderr is not None
        served.send_signal(signal.SIGTERM)
        lines = [served.stderr.readline().decode() for _ in range(2)]
        assert lines[1] == "stopping: waiting up to 30 s for 1 open request; press Ctrl-C to end at once\n"
        served.send_signal(signal.SIGINT)
        with suppress(httpx2.TransportError):
            list(parts)
        served.wait(20)
        assert "Traceback" not in said(served)


def test_without_open_requests_it_ends_without_a_word(tmp_path: Path) -> None:
    port = free_port()
    words = ["serve", "--upstream", "http://127.0.0.1:1", "--port", str(port), "--state", str(tmp_path / "state")]
    with process("-m", "programmable_kv", *words, port=port) as served, httpx2.Client() as idle:
        assert idle.get(f"http://127.0.0.1:{port}/healthz").status_code == 200, "its connection stays open"
        served.send_signal(signal.SIGINT)
        assert served.wait(30) == INTERRUPTED
        assert said(served).splitlines()[1:] == ["interrupted"]


def test_a_notebook_whose_answer_is_cut_off_is_given_back() -> None:
    """The connections are closed, and the answer is rolled back before the model's thread ends."""
    model = tiny_chat_model(200_000)
    settings = LocalSettings(port=0, limits=Limits(shutdown_s=0.2))
    with running(settings, local_app(model, settings)) as server:
        made = httpx2.post(
            f"{server.url}/v1/notebooks", json={"messages": [{"role": "system", "content": "Hello."}]}
        ).json()
        asked = {"model": made["model"], "messages": [{"role": "user", "content": "Tell me."}]}
        body = {**asked, "stream": True, "max_tokens": 150_000, "temperature": 0}
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as got:
            parts = got.iter_raw()
            next(parts)
            server.server.should_exit = True
            with pytest.raises(httpx2.TransportError):
                for _ in parts:
                    pass
        wait_until(lambda: not server.thread.is_alive())


@pytest.mark.parametrize("kind", ["gateway", "local"])
def test_a_port_in_use_is_a_plain_error_before_anything_is_announced(kind: str, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["serve", "--port", str(port), "--state", str(tmp_path / "state")]
        words += ["--upstream", "http://127.0.0.1:1"] if kind == "gateway" else ["--model", "/nowhere/at/all"]
        line = [sys.executable, "-m", "programmable_kv", *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f"error (InvalidArgument): port {port} of 127.0.0.1 is in use by another program: "
        "stop it, or choose another port with --port\n"
    )
    assert not (tmp_path / "state").exists()


def test_a_port_that_another_server_listens_at_first() -> None:
    """Two servers may bind a port while neither listens. The one that listens second reports the port as in use."""
    port = free_port()

    def load() -> Any:
        taken = bound("127.0.0.1", port)
        taken[0].listen()
        others.extend(taken)
        return tiny_chat_model(2048)

    others: list[socket.socket] = []
    try:
        with pytest.raises(InvalidArgumentError, match=f"port {port} of 127.0.0.1 is in use"):
            run_local(load, LocalSettings(port=port))
    finally:
        close(others)


def test_the_announced_port_is_the_real_one(tmp_path: Path) -> None:
    words = ["serve", "--upstream", "http://127.0.0.1:1", "--port", "0", "--state", str(tmp_path / "state")]
    line = [sys.executable, "-m", "programmable_kv", *words]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as served:
        assert served.stderr is not None
        here = served.stderr.readline().split("/v1 ")[0]
        assert httpx2.get(f"{here}/healthz").status_code == 200, "it serves when it says so"
        served.send_signal(signal.SIGINT)
        assert served.wait(30) == INTERRUPTED


def test_every_address_of_a_host_is_bound() -> None:
    found = bound("localhost", 0)
    try:
        names = {each.getsockname()[0] for each in found}
        assert names == {address[0] for *_, address in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
        assert {each.getsockname()[1] for each in found} == {port_of(found)}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port_of(found)))
    finally:
        close(found)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"cannot listen on {host}, port 8787 .*check --host and --port"):
        bound(host, 8787)
