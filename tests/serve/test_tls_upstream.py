"""An upstream behind TLS, like a hosted API: bytes in both directions, streams, and certificates that are refused."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, listening, raw_upstream, running

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
PATH = "/v1/chat/completions"


def certificate(folder: Path, host: str) -> ssl.SSLContext:
    """The TLS context of a server for `host`, with a self-signed certificate: `cert.pem` in the folder."""
    folder.mkdir()
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert,
         "-subj", "/CN=upstream", "-addext", f"subjectAltName={host}"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def fitting(folders: Path) -> ssl.SSLContext:
    return certificate(folders / "fitting", "IP:127.0.0.1")


@pytest.fixture(scope="module")
def of_another(folders: Path) -> ssl.SSLContext:
    return certificate(folders / "of_another", "DNS:another.example")


@pytest.fixture
def trusted(
    folders: Path, fitting: ssl.SSLContext, of_another: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the gateway trust both certificates, so that it refuses the other one only for its name."""
    bundle = folders / "both.pem"
    bundle.write_text("".join((folders / name / "cert.pem").read_text() for name in ("fitting", "of_another")))
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))


async def whole(request: Received) -> AsyncIterator[bytes]:
    yield answer(b'{"got": %d}' % len(request.body))


async def events(request: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD
    for number in range(50):
        yield chunk(b'data: {"n": %d}\n\n' % number)
    yield LAST


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("size", [10, 4_000_000])
def test_bodies_arrive_as_they_were_sent(fitting: ssl.SSLContext, size: int) -> None:
    body = b'{"x": "%b"}' % (b"y" * size)
    with raw_upstream(whole, fitting) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        answered = httpx2.post(f"{gateway.url}{PATH}", content=body, timeout=30)
        assert answered.json() == {"got": len(body)}
        assert upstream.received[0].body == body
        assert upstream.received[0].header(b"host") == [f"127.0.0.1:{upstream.port}".encode()]


@pytest.mark.usefixtures("trusted")
def test_streams_arrive_whole(fitting: ssl.SSLContext) -> None:
    with raw_upstream(events, fitting) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        answered = httpx2.post(f"{gateway.url}{PATH}", content=b"{}", timeout=30)
        assert answered.text == "".join(f'data: {{"n": {number}}}\n\n' for number in range(50))


@pytest.mark.usefixtures("trusted")
def test_a_certificate_of_another_host_is_refused(of_another: ssl.SSLContext, caplog: pytest.LogCaptureFixture) -> None:
    refused(of_another, "IP address mismatch", caplog)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    fitting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    refused(fitting, "self-signed certificate", caplog)


def refused(tls: ssl.SSLContext, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the gateway says why it refuses the upstream, sends it no request, and does not reveal its address."""
    with raw_upstream(whole, tls) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        answered = httpx2.post(f"{gateway.url}{PATH}", content=b"{}", timeout=30)
        assert answered.status_code == 502
        error = answered.json()["error"]
        assert error["code"] == "upstream_unreachable"
        assert f"its TLS certificate is not accepted ({why})" in error["message"]
        assert "127.0.0.1" not in error["message"]
        assert f"POST {PATH}: {error['message']}" in caplog.messages
        assert upstream.received == []


def test_an_upstream_without_tls_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def says_no(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", "400 Bad Request"))
        await writer.drain()
        writer.close()

    with listening(says_no) as port, running(GatewaySettings(f"https://127.0.0.1:{port}", port=0)) as gateway:
        error = httpx2.post(f"{gateway.url}{PATH}", content=b"{}", timeout=30).json()["error"]
    assert error["code"] == "upstream_unreachable"
    assert "TLS failed (wrong version number). Does its address serve https?" in error["message"]
    assert error["message"] in caplog.text


def test_an_upstream_that_asks_for_a_certificate_is_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection seems to succeed. The upstream refuses it only when the gateway sends its request."""
    asks = certificate(folders / "asks", "IP:127.0.0.1")
    asks.load_verify_locations(folders / "asks" / "cert.pem")
    asks.verify_mode = ssl.CERT_REQUIRED
    monkeypatch.setenv("SSL_CERT_FILE", str(folders / "asks" / "cert.pem"))

    def serve(server: socket.socket) -> None:  # asyncio's servers close without the TLS alert that says why
        with server.accept()[0] as plain, pytest.raises(ssl.SSLError):
            asks.wrap_socket(plain, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        with running(GatewaySettings(f"https://127.0.0.1:{server.getsockname()[1]}", port=0)) as gateway:
            answered = httpx2.post(f"{gateway.url}{PATH}", content=b"{}", timeout=30)
        thread.join(10)
    error = answered.json()["error"]
    assert (answered.status_code, error["code"]) == (502, "upstream_error")
    assert "does it require a client certificate?" in error["message"]
    assert error["message"] in caplog.text


@pytest.mark.usefixtures("trusted")
def test_of_several_the_log_says_which_one_is_refused_and_why(
    fitting: ssl.SSLContext, of_another: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with raw_upstream(whole, of_another) as bad, raw_upstream(whole, fitting) as good:
        settings = GatewaySettings(bad.url, port=0, more_upstreams=(good.url,))
        with running(settings) as gateway:
            for number in range(40):  # the ports decide which upstream a conversation belongs to: half of them each
                body = {"messages": [{"role": "user", "content": f"{number}"}]}
                assert httpx2.post(f"{gateway.url}{PATH}", json=body, timeout=30).status_code == 200
    [told] = [message for message in caplog.messages if message.startswith("upstream 1 is skipped")]
    assert "its TLS certificate is not accepted (IP address mismatch)" in told
    assert "127.0.0.1" not in told
