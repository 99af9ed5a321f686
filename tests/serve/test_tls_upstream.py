"""An upstream behind TLS, as hosted APIs are: bytes both ways, streams, and certificates that do not fit."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, raw_upstream, running

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
PATH = "/v1/chat/completions"


def certificate(folder: Path, host: str) -> ssl.SSLContext:
    """What a server shows that is called `host`. Its certificate is its own authority: `cert.pem` in the folder."""
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
def trusted(folders: Path, fitting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway trusts the fitting certificate and no other."""
    monkeypatch.setenv("SSL_CERT_FILE", str(folders / "fitting" / "cert.pem"))


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
def test_a_certificate_of_another_host_is_refused(of_another: ssl.SSLContext) -> None:
    refused(of_another)


def test_a_certificate_that_nobody_vouches_for_is_refused(fitting: ssl.SSLContext) -> None:
    refused(fitting)


def refused(tls: ssl.SSLContext) -> None:
    """The gateway says that it did not reach the upstream, which got no request."""
    with raw_upstream(whole, tls) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        answered = httpx2.post(f"{gateway.url}{PATH}", content=b"{}", timeout=30)
        assert answered.status_code == 502
        assert answered.json()["error"]["code"] == "upstream_unreachable"
        assert upstream.received == []
