"""Access to a gateway, and the credentials that it forwards."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from programmable_kv.errors import InvalidValueError
from programmable_kv.serve import access
from programmable_kv.serve.access import Access, new_key, read_keys
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import RawUpstream, Received, Running, answer, raw_upstream, running


async def script(_: Received) -> AsyncIterator[bytes]:
    yield answer(b"{}")


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with raw_upstream(script) as found:
        yield found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    one, line_one = new_key("one")
    two, line_two = new_key("two")
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# who may\n{line_one}\n\n{line_two}  # since May\n")
    return one, two, path


@pytest.fixture(scope="module")
def guarded(upstream: RawUpstream, keys: tuple[str, str, Path]) -> Iterator[Running]:
    settings = GatewaySettings(upstream.url, port=0, keys=read_keys(keys[2]), upstream_key="sk-upstream")
    with running(settings) as found:
        yield found


@pytest.fixture(scope="module")
def open_gateway(upstream: RawUpstream) -> Iterator[Running]:
    with running(GatewaySettings(upstream.url, port=0)) as found:
        yield found


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/pkv/report"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer pkv-wrong"}, {"x-api-key": ""}, {"authorization": "Basic x"}, {"x-pkv-key": "x"}],
)
def test_without_a_known_key_there_is_nothing(
    guarded: Running, upstream: RawUpstream, path: str, headers: dict[str, str]
) -> None:
    before = len(upstream.received)
    got = httpx2.get(f"{guarded.url}{path}", headers=headers)
    assert (got.status_code, got.json()["error"]["code"]) == (401, "invalid_api_key")
    assert len(upstream.received) == before


def test_health_needs_no_key(guarded: Running) -> None:
    assert httpx2.get(f"{guarded.url}/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"authorization": "Bearer {key}"}, (b"authorization", b"Bearer sk-upstream")),
        ({"x-api-key": "{key}"}, (b"x-api-key", b"sk-upstream")),
        ({"authorization": "bearer {key}", "anthropic-version": "2023-06-01"}, (b"x-api-key", b"sk-upstream")),
        ({"x-pkv-key": "{key}", "authorization": "Bearer mine"}, (b"authorization", b"Bearer sk-upstream")),
    ],
)
def test_a_known_key_is_exchanged_for_the_upstreams(
    guarded: Running,
    upstream: RawUpstream,
    keys: tuple[str, str, Path],
    headers: dict[str, str],
    expected: tuple[bytes, bytes],
) -> None:
    sent = {name: value.format(key=keys[1]) for name, value in headers.items()}
    assert httpx2.post(f"{guarded.url}/v1/messages", headers=sent, content=b"{}").status_code == 200
    got = upstream.received[-1]
    credentials = [(k, v) for k, v in got.headers if k in (b"authorization", b"x-api-key", b"x-pkv-key")]
    assert credentials == [expected]
    assert not any(keys[1].encode() in value for _, value in got.headers), "the gateway's key must stay here"


def test_with_a_key_of_its_own_header_the_clients_credentials_go_through(
    upstream: RawUpstream, keys: tuple[str, str, Path]
) -> None:
    with running(GatewaySettings(upstream.url, port=0, keys=read_keys(keys[2]))) as gateway:
        sent = {"x-pkv-key": keys[0], "authorization": "Bearer mine"}
        assert httpx2.get(f"{gateway.url}/v1/models", headers=sent).status_code == 200
        assert upstream.received[-1].header(b"authorization") == [b"Bearer mine"]
        assert upstream.received[-1].header(b"x-pkv-key") == []
        assert httpx2.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {keys[0]}"}).status_code == 200
        assert upstream.received[-1].header(b"authorization") == [], "a key of the gateway is of no use to the upstream"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "null"},
    ],
)
def test_an_open_gateway_refuses_web_pages(open_gateway: Running, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/pkv/report"):
        got = httpx2.get(f"{open_gateway.url}{path}", headers=headers)
        assert (got.status_code, got.json()["error"]["code"]) == (403, "not_local")


@pytest.mark.parametrize(
    "headers", [{}, {"host": "localhost:1"}, {"host": "[::1]:8787"}, {"origin": "http://localhost:3000"}]
)
def test_an_open_gateway_serves_this_machine(open_gateway: Running, headers: dict[str, str]) -> None:
    assert httpx2.get(f"{open_gateway.url}/v1/models", headers=headers).status_code == 200


def test_every_key_is_compared_with_every_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons do not depend on earlier matches, so the time of an answer reveals nothing."""
    compared = []
    keys = [new_key(name) for name in ("a", "b", "c")]
    found = Access(tuple(access.ApiKey(*line.replace("sha256:", "").split()) for _, line in keys))
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr(access.hmac, "compare_digest", counting)
    assert found.admit(((b"x-api-key", keys[0][0].encode()),)).tenant == "a"
    assert len(compared) == 3


def test_keys_are_not_shown() -> None:
    key, line = new_key("name")
    digest = line.partition(":")[2]
    entry = access.ApiKey("name", digest)
    settings = GatewaySettings("http://127.0.0.1:1", keys=(entry,), upstream_key="sk-upstream")
    shown = repr(settings) + repr(Access(settings.keys, "sk-upstream"))
    assert digest not in shown
    assert "sk-upstream" not in shown
    assert key not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no API key"),
        ("# nothing\n", "no API key"),
        ("name pkv-secret\n", "line 1"),
        ("name sha256:12\n", "line 1"),
        ("a b sha256:" + "0" * 64, "line 1"),
        ("bad/name sha256:" + "0" * 64, "line 1"),
        ("a sha256:" + "0" * 64 + "\na sha256:" + "1" * 64, "repeats the name"),
    ],
)
def test_a_file_of_keys_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match=message) as error:
        read_keys(path)
    assert "pkv-secret" not in str(error.value)
    with pytest.raises(InvalidValueError, match="cannot read"):
        read_keys(tmp_path / "none")


def test_a_tenants_name_is_plain() -> None:
    with pytest.raises(InvalidValueError):
        new_key("a b")


def test_a_refusal_names_no_header(keys: tuple[str, str, Path]) -> None:
    with pytest.raises(RefusedError) as error:
        Access(read_keys(keys[2])).admit(((b"authorization", b"Bearer sk-mine"),))
    assert "sk-mine" not in str(error.value)
