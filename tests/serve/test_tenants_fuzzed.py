"""Random requests of two tenants at one gateway: neither reads, changes or receives anything of the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.rules import rules_of
from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running
from serve.rewriting_peers import RULES

TENANTS = ("ann", "bob")
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SHARED = rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$", "share": True}], "share": "learned"})
"""Rules that share as much as possible within a tenant."""

whoever = st.sampled_from(TENANTS)
numbers = st.integers(0, 3)
operations = st.one_of(
    st.tuples(
        st.just("ask"), whoever, st.sampled_from([CHAT, RESPONSES, MESSAGES]), numbers, st.sampled_from(["", "s"])
    ),
    st.tuples(st.just("make"), whoever, numbers),
    st.tuples(st.sampled_from(["read", "edit", "fork", "delete", "chat"]), whoever, whoever, numbers),
    st.tuples(st.sampled_from(["list", "/pkv/report", "/pkv/miss"]), whoever),
)


@dataclass
class World:
    """A gateway with two tenants, and the notebooks that it should have for them."""

    url: str
    upstream: CachingUpstream
    keys: dict[str, str]
    books: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """tenant -> notebook -> fields"""
    said: dict[tuple[str, str, str, int], list[Any]] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    """All bodies sent upstream, including warmed prefixes if they were sent in time."""
    minute: int = 0

    def reset(self) -> None:
        for tenant in TENANTS:
            for book in self.books.get(tenant, {}):
                assert self.call(tenant, "DELETE", f"/v1/notebooks/{book}").status_code == 204
        self.books, self.said, self.sent = {tenant: {} for tenant in TENANTS}, {}, []

    def call(self, tenant: str, method: str, path: str, body: Any = None, session: str = "") -> httpx2.Response:
        """Send one request, and check that the answer contains nothing of the other tenant."""
        headers = {"x-api-key": self.keys[tenant], **({"x-session-id": session} if session else {})}
        self.upstream.bodies.clear()
        got = httpx2.request(method, self.url + path, json=body, headers=headers, timeout=30)
        assert got.status_code < 500, got.text
        other = TENANTS[1 - TENANTS.index(tenant)]
        assert f"of-{other}" not in got.text
        assert not any(book in got.text for book in self.books.get(other, {}) if book not in path)
        self.sent += [json.dumps(body) for body in self.upstream.bodies]
        return got

    def reached(self, text: str) -> bool:
        """Whether the latest request sent a body with a text upstream. Other bodies may be prefixes that are warmed."""
        return any(text in json.dumps(body) for body in self.upstream.bodies)

    def ask(self, tenant: str, route: str, number: int, session: str) -> None:
        """Send the next turn of a conversation. The tenants' conversations begin alike, except for their own values."""
        self.minute += 1
        said = self.said.setdefault((tenant, route, session, number), [{"role": "user", "content": f"hi {number}"}])
        system = f"Now: {self.minute}-of-{tenant}\nCustomer: {number}-of-{tenant}\n{RULES}"
        body: dict[str, Any] = {"model": "m", "messages": [{"role": "system", "content": system}, *said]}
        if route == RESPONSES:
            body = {"model": "m", "instructions": system, "input": said}
        if route == MESSAGES:
            body = {"model": "m", "max_tokens": 9, "system": system, "messages": said}
        assert self.call(tenant, "POST", route, body, session).status_code == 200
        assert self.reached(f"{self.minute}-of-{tenant}"), "it is told the latest value"
        said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more-of-{tenant}"}]

    def make(self, tenant: str, number: int) -> None:
        fields = {"who": f"{number}-of-{tenant}"}
        system = {"role": "system", "content": f"{RULES}The customer is {{who}}."}
        got = self.call(
            tenant, "POST", "/v1/notebooks", {"upstream_model": "m", "messages": [system], "fields": fields}
        )
        assert got.status_code == 201
        self.books[tenant][got.json()["id"]] = fields

    def use(self, what: str, tenant: str, owner: str, number: int) -> None:
        """Let a tenant use a notebook, which may belong to the other tenant or not exist."""
        book = [*self.books[owner], "nb_0"][number % (len(self.books[owner]) + 1)]
        known = self.books[tenant].get(book)
        self.minute += 1
        value = {"who": f"{self.minute}-of-{tenant}"}
        path = f"/v1/notebooks/{book}"
        if what == "chat":
            said = [{"role": "user", "content": f"hi {number}"}]
            got = self.call(tenant, "POST", CHAT, {"model": f"notebook:{book}", "messages": said})
        else:
            method, below, body = {
                "read": ("GET", "", None), "edit": ("PATCH", "/fields", value), "fork": ("POST", "/fork", None),
                "delete": ("DELETE", "", None),
            }[what]  # fmt: skip
            got = self.call(tenant, method, path + below, body)
        if known is None:
            assert (got.status_code, got.json()["error"]["code"]) == (404, "no_such_notebook")
        elif what == "edit":
            known |= value
        elif what == "fork":
            self.books[tenant][got.json()["id"]] = dict(known)
        elif what == "delete":
            del self.books[tenant][book]
        elif what == "chat":
            assert self.reached(known["who"])

    def check(self) -> None:
        """Check that each tenant has exactly its own notebooks, and that no prompt has values of both."""
        assert not [text for text in self.sent if all(f"of-{tenant}" in text for tenant in TENANTS)]
        for tenant in TENANTS:
            found = self.call(tenant, "GET", "/v1/notebooks").json()["data"]
            assert {book["id"]: book["fields"] for book in found} == self.books[tenant]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = {tenant: new_key(tenant) for tenant in TENANTS}
    keys = tuple(ApiKey(tenant, line.partition(":")[2]) for tenant, (_, line) in made.items())
    upstream = CachingUpstream()
    with raw_upstream(upstream) as server:
        gateway = GatewaySettings(server.url, port=0, keys=keys, mode=GatewayMode.ERRATUM, rules=SHARED, rebase_after=2)
        with running(gateway) as found:
            yield World(found.url, upstream, {tenant: key for tenant, (key, _) in made.items()})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operations, min_size=4, max_size=24))
def test_neither_tenant_meets_anything_of_the_other_s(world: World, steps: list[tuple[Any, ...]]) -> None:
    world.reset()
    for what, tenant, *how in steps:
        if what == "ask":
            world.ask(tenant, *how)
        elif what == "make":
            world.make(tenant, *how)
        elif what == "list" or what.startswith("/"):
            world.call(tenant, "GET", "/v1/notebooks" if what == "list" else what)
        else:
            world.use(what, tenant, *how)
    world.check()


def test_within_a_tenant_values_are_shared_and_so_a_leak_would_show(world: World) -> None:
    """The fuzz test proves something only if values are shared: a second conversation begins with the first's text."""
    world.reset()
    world.minute += 1000
    heads = []
    for number in (1, 2):
        system = f"Now: {world.minute + number}-of-ann\nCustomer: 9-of-ann\n{RULES}"
        said = [{"role": "system", "content": system}, {"role": "user", "content": f"q {number}"}]
        got = world.call("ann", "POST", CHAT, {"model": "m", "messages": said}, f"sharing-{number}")
        [head] = [body["messages"][0]["content"] for body in world.upstream.bodies]
        heads.append(head.partition("[state")[0])
    assert got.headers["x-pkv-action"].startswith("shared")
    assert heads[0] == heads[1]
