"""`pkv serve` and `pkv serve-key`: options become settings, and a real process serves and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import typer.main
from typer.testing import CliRunner

from programmable_kv.cli import app
from programmable_kv.errors import InvalidArgumentError, InvalidValueError
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import LocalSettings, default_state
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, raw_upstream, wait_until
from serve.processes import free_port, process


async def script(_: Received) -> AsyncIterator[bytes]:
    yield answer(b"{}")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr("programmable_kv.serve.run.run_gateway", found.append)
    monkeypatch.setattr(
        "programmable_kv.serve.run.run_local", lambda load, settings: found.append((load().name, settings))
    )
    return found


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)


def test_options_become_settings(served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CliRunner().invoke(app, ["serve-key", "me"])
    keys = tmp_path / "keys"
    keys.write_text(made.stdout)
    key = made.stderr.split()[-1]
    monkeypatch.setenv("THE_KEY", "sk-1")
    invoke(
        "--upstream", "http://10.0.0.1:8000/v1", "--host", "0.0.0.0", "--port", "9000", "--mode", "strict", "--api-keys-file",
        str(keys), "--upstream-key-env", "THE_KEY", "--max-body-mib", "2", "--max-running", "3", "--max-waiting", "4",
        "--read-timeout", "5", "--observe-mib", "6",
    )  # fmt: skip
    [found] = served
    assert (found.host, found.port, found.mode, found.upstream_key) == ("0.0.0.0", 9000, GatewayMode.STRICT, "sk-1")
    assert [(each.name, each.digest) for each in found.keys] == [("me", sha256(key.encode()).hexdigest())]
    limits = found.limits
    assert (limits.max_body_bytes, limits.observed_bytes) == (2 * 2**20, 6 * 2**20)
    assert (limits.max_running, limits.max_waiting, limits.read_s) == (3, 4, 5.0)


def test_a_mode_that_rewrites_keeps_its_state_on_disk(served: list[Any], tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"volatile": [{"name": "clock", "pattern": "Now: (.*)"}], "routes": {"/v1/messages": "pass"}}')
    invoke(
        "--upstream",
        "http://127.0.0.1:8000",
        "--mode",
        "erratum",
        "--volatile",
        str(rules),
        "--state",
        str(tmp_path / "s"),
    )
    invoke("--upstream", "http://127.0.0.1:8000", "--mode", "erratum", "--port", "9001")
    assert (served[0].mode, served[0].state, served[0].rewrites) == (GatewayMode.ERRATUM, tmp_path / "s", True)
    assert [rule.name for rule in served[0].rules.declared] == ["clock"]
    assert served[0].rules.routes == {"/v1/messages": GatewayMode.PASS}
    assert served[1].state.name == "gateway-9001.sqlite3"


def test_by_default_it_observes_on_this_machine_only(served: list[Any]) -> None:
    invoke("--upstream", "http://127.0.0.1:8000")
    assert (served[0].host, served[0].mode, served[0].keys) == ("127.0.0.1", GatewayMode.OBSERVE, ())


def test_several_upstreams(served: list[Any]) -> None:
    invoke("--upstream", "http://10.0.0.1:8000", "--upstream", "http://10.0.0.2:8000")
    assert (served[0].upstream, served[0].more_upstreams) == ("http://10.0.0.1:8000", ("http://10.0.0.2:8000",))
    with pytest.raises(InvalidArgumentError, match="only once"):
        invoke("--upstream", "http://10.0.0.1:8000", "--upstream", "http://10.0.0.1:8000/")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "rewrite"], "--mode is one of observe, pass, erratum, hoist, strict"),
        (["--volatile", "/nowhere/rules.json"], "cannot read"),
        (["--host", "0.0.0.0"], "--api-keys-file"),
        (["--upstream-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE has no usable key"),
        (["--api-keys-file", "/nowhere/keys"], "cannot read"),
    ],
)
def test_what_cannot_be_meant_is_refused(served: list[Any], words: list[str], message: str) -> None:
    with pytest.raises((InvalidArgumentError, InvalidValueError), match=message):
        invoke("--upstream", "http://127.0.0.1:8000", *words)
    assert served == []


ONLY_WITH_UPSTREAM = {
    "--mode": ["erratum"], "--volatile": ["rules.json"], "--upstream-key-env": ["KEY"], "--max-running": ["3"],
    "--read-timeout": ["5"], "--observe-mib": ["6"], "--skills": ["store"], "--cache-salt": [], "--rebase-after": ["3"],
    "--line-role": ["user"],
}  # fmt: skip
FOR_BOTH = {
    "--host", "--port", "--state", "--api-keys-file", "--max-body-mib", "--max-waiting", "--max-notebooks", "--per-minute",
    "--verbose",
}  # fmt: skip


def test_every_option_belongs_to_the_gateway_the_model_or_both() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    names = {each.opts[0] for each in serve.params}
    assert names == {"--upstream", "--model"} | ONLY_WITH_UPSTREAM.keys() | FOR_BOTH


@pytest.mark.parametrize("option", ONLY_WITH_UPSTREAM)
def test_an_option_of_the_gateway_needs_an_upstream(served: list[Any], option: str) -> None:
    with pytest.raises(
        InvalidArgumentError, match=rf"^{option} without --upstream .*Add --upstream URL, or leave it out$"
    ):
        invoke(option, *ONLY_WITH_UPSTREAM[option])
    assert served == []


def test_all_options_that_need_an_upstream_are_named(served: list[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^--mode, --cache-salt without --upstream .* or leave them out$"):
        invoke("--cache-salt", "--mode", "observe")
    assert served == [], "also where the value is the default one"


def test_a_model_does_not_go_with_an_upstream(served: list[Any]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^--model does not go with --upstream: .* Leave one of the two out$"
    ):
        invoke("--upstream", "http://127.0.0.1:8000", "--model", "embedded")
    assert served == []


def test_options_that_the_mode_makes_useless_are_refused(served: list[Any], tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"volatile": [{"name": "clock", "pattern": "Now: (.*)"}]}')
    words = ["--upstream", "http://127.0.0.1:8000", "--volatile", str(rules)]
    with pytest.raises(InvalidArgumentError, match="mode observe rewrites nothing: add --mode erratum or hoist"):
        invoke(*words)
    with pytest.raises(InvalidArgumentError, match="--observe-mib does not go with --mode pass"):
        invoke(*words[:2], "--mode", "pass", "--observe-mib", "6")
    assert served == []
    rules.write_text('{"volatile": [{"name": "clock", "pattern": "Now: (.*)"}], "routes": {"/v1/messages": "erratum"}}')
    invoke(*words)
    invoke(*words, "--mode", "pass", "--observe-mib", "6")
    assert len(served) == 2, "one route rewrites, and is observed"


def test_a_usage_error_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "programmable_kv", "serve", "--mode", "erratum"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "error (InvalidArgument): --mode without --upstream would change nothing: without it, a model is served, and nothing "
        "is forwarded. Add --upstream URL, or leave it out\n",
    )


def test_without_an_upstream_it_serves_a_model(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> SimpleNamespace:
        loaded.append(name)
        return SimpleNamespace(name="loaded")

    monkeypatch.setattr("programmable_kv.commands.serve.load", load)
    invoke("--model", "some/model", "--max-notebooks", "3")
    kept = default_state("local-8787")
    assert (loaded, served) == (["some/model"], [("loaded", LocalSettings(max_notebooks=3, state=kept))])
    with pytest.raises(InvalidArgumentError, match="--api-keys-file"):
        invoke("--host", "0.0.0.0")
    assert len(loaded) == 1, "what is refused is refused before a model is loaded"


@pytest.mark.slow
def test_the_command_serves_and_stops_when_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with raw_upstream(script) as upstream:
        line = [sys.executable, "-m", "programmable_kv", "serve", "--upstream", upstream.url, "--port", str(port)]
        process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        try:
            wait_until(lambda: answers(port), 60)
            got = httpx2.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={"messages": []})
            assert (got.status_code, got.json()) == (200, {})
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert b"/pkv/report" in errors
    assert b"Traceback" not in errors
    assert process.returncode in (0, -signal.SIGTERM), "uvicorn hands the signal on once everything has ended"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_lets_a_stream_end_and_takes_no_more(number: signal.Signals, tmp_path: Path) -> None:
    go = threading.Event()

    async def waits(_: Received) -> AsyncIterator[bytes]:
        yield EVENTS_HEAD + chunk(b"data: one\n\n")
        while not go.is_set():
            await asyncio.sleep(0.01)
        yield chunk(b"data: two\n\n") + LAST

    port = free_port()
    with raw_upstream(waits) as upstream:
        words = ["serve", "--upstream", upstream.url, "--port", str(port), "--state", str(tmp_path / "state")]
        with process("-m", "programmable_kv", *words, port=port) as served:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            with httpx2.stream("POST", url, json={"messages": [], "stream": True}, timeout=30) as got:
                parts = got.iter_raw()
                assert next(parts) == b"data: one\n\n"
                served.send_signal(number)
                wait_until(lambda: not answers(port))
                assert served.poll() is None, "the stream has not ended"
                go.set()
                assert b"".join(parts) == b"data: two\n\n"
            assert served.wait(20) in (0, -number, 128 + number), "the signal is handed on once everything has ended"


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx2.TransportError:
        return False
