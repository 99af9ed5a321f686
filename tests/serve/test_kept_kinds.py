"""A field keeps the kind that its first value declares, over edits, restarts and forks, on both kinds of servers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import ProgrammableKVError
from programmable_kv.prompt.fields import edited
from programmable_kv.serve.local.kept import KeptNotebook
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.notebooks.book import declared
from programmable_kv.serve.notebooks.source import source_of
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.settings import GatewaySettings, LocalSettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running

VALUES = [5, 5.5, True, "x", "2026-01-01", "12:30", "5", "true", None, [1], ["a"], -0.0, 1e20, 10**30, {"a": 1}]
KINDS = [*[None] * 6, "text", "block", "number", "date", "time", "boolean", "json"]
MESSAGES = [{"role": "user", "content": "It is {f}."}]


@given(first=st.sampled_from(VALUES), kind=st.sampled_from(KINDS), later=st.lists(st.sampled_from(VALUES), max_size=3))
@settings(max_examples=300)
def test_what_is_kept_makes_the_same_notebook(first: Any, kind: str | None, later: list[Any]) -> None:
    field = first if kind is None else {"value": first, "kind": kind}
    try:
        source = source_of({"messages": MESSAGES, "fields": {"f": field}})
        texts, types = declared(source)
    except (ProgrammableKVError, RefusedError):
        return
    kept = KeptNotebook("nb", "t", 1, source, {}, texts)
    for value in later:
        try:
            texts, _ = edited({"f": value}, types)
        except ProgrammableKVError:
            continue
        kept = replace(kept, values=json.loads(json.dumps({"f": value})))
    again, types_again = declared(source_of({"messages": MESSAGES, "fields": kept.request()["fields"]}))
    assert (again["f"], types_again["f"]) == (texts["f"], types["f"])


@pytest.mark.parametrize("server", ["local", "gateway"])
def test_after_a_restart_text_is_text(server: str, tmp_path: Path) -> None:
    place = tmp_path / "state.sqlite"
    model = tiny_chat_model(1024)
    named = {} if server == "local" else {"upstream_model": "m"}
    found: list[Any] = []
    with raw_upstream(CachingUpstream()) as upstream:
        for number in range(2):
            local, gateway = LocalSettings(port=0, state=place), GatewaySettings(upstream.url, port=0, state=place)
            started = running(local, local_app(model, local)) if server == "local" else running(gateway)
            with started as front, httpx2.Client(base_url=f"{front.url}/v1", timeout=30) as http:
                if not number:
                    made = http.post("/notebooks", json={"messages": MESSAGES, "fields": {"f": "x"}, **named}).json()
                    assert http.patch(f"/notebooks/{made['id']}/fields", json={"f": 5}).status_code == 200
                fork = http.post(f"/notebooks/{made['id']}/fork").json()
                for each in (made, fork):
                    got = http.patch(f"/notebooks/{each['id']}/fields", json={"f": f"y{number}"})
                    assert got.status_code == 200, got.text
                    found.append(got.json()["types"])
                    assert http.patch(f"/notebooks/{each['id']}/fields", json={"f": 5}).status_code == 200
    assert found == [{"f": {"kind": "text"}}] * 4
