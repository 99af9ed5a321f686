"""The key that decides a request's upstream: equal for all requests of a conversation, and different for others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from programmable_kv.serve.affinity import beginning, key_of_request, key_of_rewriting
from programmable_kv.serve.headers import Headers
from serve.rewriting_peers import Peer, at

HI: Any = {"role": "user", "content": "hi"}


def key(body: Any, headers: Headers = (), tenant: str = "t", *, prompt: bool = True) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return key_of_request(tenant, headers, data, prompt=prompt)


def chat(system: str, *said: Any, **more: Any) -> Any:
    return {"model": "m", "messages": [{"role": "system", "content": system}, *(said or (HI,))], **more}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("Now: 10:00"), chat("Now: 10:01", HI, {"role": "assistant", "content": "yes"}, HI)),
        (chat("x", prompt_cache_key="k"), chat("x", {"role": "user", "content": "bye"}, prompt_cache_key="k")),
        (
            chat("x", metadata={"user_id": "k"}),
            chat("x", {"role": "user", "content": "bye"}, metadata={"user_id": "k"}),
        ),
        (
            {"system": "a", "messages": [HI]},
            {"system": "b", "messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        ),
        ({"input": "hi"}, {"input": "hi", "instructions": "x"}),
        ({"input": [HI]}, {"input": [HI, {"type": "function_call"}]}),
        ({"prompt": "x" * 2000}, {"prompt": "x" * 2000 + "y"}),
    ],
)
def test_requests_of_one_conversation_share_a_key(one: Any, other: Any) -> None:
    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("x"), chat("x", {"role": "user", "content": "bye"})),
        (chat("x", prompt_cache_key="k"), chat("x", prompt_cache_key="l")),
        ({"input": "hi"}, {"input": "bye"}),
        ({"prompt": "hi"}, {"prompt": "bye"}),
        (chat("x", prompt_cache_key="hi"), chat("x")),
    ],
)
def test_other_conversations_have_other_keys(one: Any, other: Any) -> None:
    assert key(one) != key(other)


def test_a_session_named_in_a_header_goes_before_what_is_said() -> None:
    named: Headers = ((b"X-Session-Id", b"s"),)
    assert key(chat("x"), named) == key(b"not read", named) == key(chat("x", prompt_cache_key="k"), named)
    assert key(chat("x"), named) != key(chat("x"), ((b"x-session-id", b"r"),))


def test_tenants_and_clients_have_their_own_keys() -> None:
    named: Headers = ((b"x-session-id", b"s"),)
    assert key(chat("x"), named) != key(chat("x"), named, "another")
    assert key(chat("x")) != key(chat("x"), tenant="another")
    mine, other = ((b"authorization", b"Bearer 1"),), ((b"authorization", b"Bearer 2"),)
    assert key(chat("x"), mine) != key(chat("x"), other)
    assert key(chat("x"), ((b"x-api-key", b"1"),)) != key(chat("x"), ((b"x-api-key", b"2"),))
    assert key(b"", mine, prompt=False) == key(b"{}", mine, prompt=False) != key(b"", other, prompt=False)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'"\\ud800"', b'{"input": "\\ud800"}', b"{}"]
)
def test_any_body_has_a_key(body: bytes) -> None:
    assert len(key(body)) == 16
    packed = ((b"content-encoding", b"gzip"),)
    assert key(chat("x"), packed) == key(body, packed), "a body that is packed is not read"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": [{"role": "system", "content": "s"}]}, '[{"role": "system", "content": "s"}]'),
        ({"messages": []}, "[]"),
        ({"messages": "no list"}, "null"),
        ({"messages": [1, {"role": "user", "content": [{"type": "image"}, {"text": "hi"}]}]}, "hi"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, '[{"type": "image"}]'),
        ({"messages": [{"role": "user"}]}, "null"),
        ({"prompt": [1, 2]}, "[1, 2]"),
        ({"prompt": "p" * 5000}, "p" * 1024),
    ],
)
def test_the_beginning_of_a_conversation(body: Any, text: str) -> None:
    assert beginning(body) == text


def test_a_mode_that_rewrites_leaves_declared_values_out() -> None:
    """The client's first message contains the clock. Without the rewriter's rules, each turn would have another key."""
    peer, keys = Peer(), []
    said: list[Any] = []
    for turn in range(3):
        first = {"role": "user", "content": f"Now: 10:0{turn}\nhello"}
        peer.send({"model": "m", "messages": [{"role": "system", "content": at("1")}, first, *said]})
        keys.append(key_of_rewriting(peer.works[-1]))
        said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"more {turn}"}]
    assert len(set(keys)) == 1
    assert keys[0] is not None
    peer.send({"model": "m", "messages": [HI]}, session="s")
    assert key_of_rewriting(peer.works[-1]) == key({}, ((b"x-session-id", b"s"),)), "the same as without rewriting"
    peer.send(b"[1]")
    assert key_of_rewriting(peer.works[-1]) is None
