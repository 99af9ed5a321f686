"""Rate limits of tenants, and the salt that separates their caches."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import InvalidArgumentError, InvalidValueError
from programmable_kv.serve.access import ApiKey, new_key, read_keys
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rates import Rates
from programmable_kv.serve.refusal import Refusal, RefusedError
from programmable_kv.serve.salt import TenantSalt
from programmable_kv.serve.settings import GatewaySettings, Limits, LocalSettings
from serve.http_peers import RawUpstream, Received, answer, raw_upstream, running
from serve.rewriting_peers import CLOCK, at, chat

MADE = {name: new_key(name) for name in ("one", "two")}
KEYS = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in MADE.items())


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    async def script(_: Received) -> AsyncIterator[bytes]:
        yield answer(b"{}")

    with raw_upstream(script) as found:
        yield found


@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 30)), max_size=60), rate=st.floats(0.5, 600))
def test_no_tenant_gets_more_than_its_rate(steps: list[tuple[str, float]], rate: float) -> None:
    now = [0.0]
    rates = Rates(rate, {"b": 2 * rate}, lambda: now[0])
    let = {"a": 0, "b": 0}
    refused: list[Refusal] = []
    for tenant, wait in steps:
        now[0] += wait
        try:
            rates.take(tenant)
        except RefusedError as error:
            refused.append(error.refusal)
        else:
            let[tenant] += 1
    assert all(
        (each.status, each.code, (each.retry_after_s or 0) >= 1) == (429, "rate_limited", True) for each in refused
    )
    for tenant, own in (("a", rate), ("b", 2 * rate)):
        assert let[tenant] <= max(1, own / 6) + own * now[0] / 60 + 1e-6


def test_who_waits_as_long_as_told_is_let_in() -> None:
    now = [0.0]
    rates = Rates(30, {}, lambda: now[0])
    for _ in range(5):
        rates.take("a")
    with pytest.raises(RefusedError) as error:
        rates.take("a")
    now[0] += error.value.refusal.retry_after_s or 0
    rates.take("a")
    Rates(None, {}).take("a")


def test_a_gateway_limits_each_key(upstream: RawUpstream) -> None:
    keys = (KEYS[0], ApiKey(KEYS[1].name, KEYS[1].digest, 600))
    settings = GatewaySettings(upstream.url, port=0, keys=keys, limits=Limits(per_minute=6))
    with running(settings) as gateway:
        seen: dict[str, list[int]] = {}
        for name in ("one", "two"):
            for _ in range(3):
                response = httpx2.get(f"{gateway.url}/v1/models", headers={"x-api-key": MADE[name][0]})
                seen.setdefault(name, []).append(response.status_code)
        assert seen == {"one": [200, 429, 429], "two": [200, 200, 200]}
        assert response.status_code == 200
        refused = httpx2.get(f"{gateway.url}/v1/models", headers={"x-api-key": MADE["one"][0]})
        assert refused.json()["error"]["code"] == "rate_limited"
        assert int(refused.headers["retry-after"]) >= 1
    assert len(upstream.received) == 4


def test_the_local_server_limits_each_key() -> None:
    model = tiny_chat_model(2048)
    settings = LocalSettings(port=0, keys=KEYS, limits=Limits(per_minute=6))
    with running(settings, local_app(model, settings)) as server:
        headers = {"x-api-key": MADE["one"][0]}
        got = [httpx2.get(f"{server.url}/v1/models", headers=headers).status_code for _ in range(2)]
        assert got == [200, 429]


def test_rates_stand_in_the_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{MADE['one'][1]} per-minute=90\n{MADE['two'][1]}\n")
    assert [key.per_minute for key in read_keys(path)] == [90, None]
    for wrong in ("per-minute=0", "per-minute=-1", "per-minute=nan", "per-minute=", "rate=3", "per-minute=1 x"):
        path.write_text(f"{MADE['one'][1]} {wrong}\n")
        with pytest.raises(InvalidValueError, match="line 1"):
            read_keys(path)
    with pytest.raises(InvalidArgumentError, match="per_minute"):
        Limits(per_minute=0)


@given(
    one=st.tuples(st.text(max_size=6), st.text(max_size=6)), other=st.tuples(st.text(max_size=6), st.text(max_size=6))
)
def test_no_two_pairs_have_one_salt(one: tuple[str, str], other: tuple[str, str]) -> None:
    salt = TenantSalt(b"secret")
    assert (salt.of(*one) == salt.of(*other)) == (one == other)
    assert salt.of("ab", "c") != salt.of("a", "bc")
    assert salt.of(*one) != TenantSalt(b"another").of(*one)


def test_each_tenant_s_prompts_are_salted(upstream: RawUpstream, tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings = GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True, state=state)
    salts: dict[str, set[str]] = {}
    for _ in range(2):  # the second time after a restart
        with running(settings) as gateway:
            for name in ("one", "two"):
                for path in ("chat/completions", "completions", "responses", "messages"):
                    data = b'{ "model" : "m",  "x":[1.0] }'
                    headers = {"x-api-key": MADE[name][0]}
                    assert httpx2.post(f"{gateway.url}/v1/{path}", content=data, headers=headers).status_code == 200
                    got = upstream.received[-1]
                    salts.setdefault(name, set()).add(got.json["cache_salt"])
                    assert got.body.endswith(b' "model" : "m",  "x":[1.0] }'), "the rest stays byte for byte"
    assert [len(found) for found in salts.values()] == [1, 1]
    assert salts["one"] != salts["two"]
    assert MADE["one"][0] not in str(salts)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b'{"cache_salt": "a", "cache_salt": "b"}', {}), (b"[]", {}), (b"no", {}), (b"", {}),
        (b'{"a": 1}', {"content-encoding": "gzip"}), (b'{"a": "\xff"}', {}),
    ],
)  # fmt: skip
def test_what_cannot_be_salted_is_refused(upstream: RawUpstream, body: bytes, headers: dict[str, str]) -> None:
    with running(GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True)) as gateway:
        sent = {"x-api-key": MADE["one"][0], **headers}
        got = httpx2.post(f"{gateway.url}/v1/chat/completions", content=body, headers=sent)
        assert (got.status_code, got.json()["error"]["code"]) == (400, "unreadable_body")
        assert upstream.received == []


@pytest.mark.parametrize("path", ["embeddings", "score", "chat/completions/batch", "later/inventions"])
def test_so_is_all_else_that_may_be_computed(upstream: RawUpstream, path: str) -> None:
    with running(GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True)) as gateway:
        for key in MADE.values():
            headers = {"x-api-key": key[0]}
            assert httpx2.post(f"{gateway.url}/v1/{path}", json={"model": "m"}, headers=headers).status_code == 200
        one, other = (each.json["cache_salt"] for each in upstream.received)
        assert one != other
        assert httpx2.post(f"{gateway.url}/v1/{path}", content=b"[1]", headers=headers).status_code == 400


def test_what_computes_nothing_is_not(upstream: RawUpstream) -> None:
    headers = {"x-api-key": MADE["one"][0]}
    with running(GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True)) as gateway:
        for path, body in (("responses/r1/cancel", b""), ("messages/count_tokens", b'{"model": "m"}')):
            assert httpx2.post(f"{gateway.url}/v1/{path}", content=body, headers=headers).status_code == 200
            assert upstream.received[-1].body == body


def test_a_client_s_own_salt_stays_within_its_tenant(upstream: RawUpstream) -> None:
    with running(GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True)) as gateway:
        found: list[Any] = []
        for name, own in (("one", "x"), ("two", "x"), ("one", "y"), ("one", None)):
            data = json.dumps({"model": "m", **({"cache_salt": own} if own else {})})
            httpx2.post(f"{gateway.url}/v1/responses", content=data, headers={"x-api-key": MADE[name][0]})
            found.append(upstream.received[-1].json["cache_salt"])
        assert len(set(found)) == 4


def test_a_salt_of_prompts_with_skills_is_still_known_as_one(upstream: RawUpstream) -> None:
    """vLLM's plugin loads skills only under such a salt. The salts of tenants differ nevertheless."""
    with running(GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True)) as gateway:
        found: list[str] = []
        for name, own in (("one", "composed:x"), ("two", "composed:x"), ("one", "x"), ("one", "")):
            data = json.dumps({"model": "m", "cache_salt": own, "kv_transfer_params": {"skills": ["refunds"]}})
            httpx2.post(f"{gateway.url}/v1/completions", content=data, headers={"x-api-key": MADE[name][0]})
            assert upstream.received[-1].json["kv_transfer_params"] == {"skills": ["refunds"]}
            found.append(upstream.received[-1].json["cache_salt"])
        assert [each.startswith("composed:") for each in found] == [True, True, False, False]
        assert len({each.removeprefix("composed:") for each in found}) == 4


def test_salt_and_lines_go_together(upstream: RawUpstream) -> None:
    settings = GatewaySettings(upstream.url, port=0, keys=KEYS, salts=True, mode=GatewayMode.ERRATUM, rules=CLOCK)
    with running(settings) as gateway:
        headers = {"x-api-key": MADE["one"][0]}
        httpx2.post(f"{gateway.url}/v1/chat/completions", json=chat(at("1"), "hi"), headers=headers)
        httpx2.post(f"{gateway.url}/v1/chat/completions", json=chat(at("2"), "hi", "Yes.", "so"), headers=headers)
        one, other = (each.json for each in upstream.received)
        assert one["cache_salt"] == other["cache_salt"]
        assert "[state" in other["messages"][-1]["content"]
        assert upstream.received[-1].header(b"content-length") == [str(len(upstream.received[-1].body)).encode()]
