"""Verdicts about an upstream: whose requests give them, for whom and how long they hold, and who sees them."""

from __future__ import annotations

import json
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.rewriter import Rewriting
from serve.rewriting_peers import CHAT, MESSAGES, Peer, at, chat, claude


def begun(peer: Peer, body: Any, tenant: str) -> Rewriting:
    headers = ((b"x-session-id", json.dumps(body["messages"][1]).encode()),)
    return peer.rewriter.begin(tenant, CHAT, headers, json.dumps(body).encode())


def taken_as_it_came(peer: Peer, body: Any, tenant: str) -> Rewriting:
    """Send a request that the upstream accepts only unchanged, for example because it is almost too long."""
    work = begun(peer, body, tenant)
    while peer.rewriter.refused(work, 400):
        pass
    assert not work.rewritten
    peer.rewriter.answered(work, 200)
    return work


def test_a_tenants_long_requests_switch_nothing_off_for_others() -> None:
    peer = Peer()
    for number in range(9):
        taken_as_it_came(peer, chat(at("1"), f"long {number}"), "bob")
    assert (
        begun(peer, chat(at("1"), "one more"), "bob").plan.why
        == "rewriting is switched off here for now, because it did not pay"
    )
    peer.send(chat(at("1"), "hi"), tenant="alice")
    assert peer.action == "announced"


def test_where_an_announcement_was_taken_a_refused_one_has_other_reasons() -> None:
    peer = Peer()
    peer.send(chat(at("1"), "hi"), tenant="alice")
    for number in range(9):
        taken_as_it_came(peer, chat(at("1"), f"long {number}"), "bob")
        peer.send(chat(at("1"), f"short {number}"), tenant="bob", session=str(number))
        assert peer.action in ("announced", "shared")


def test_a_request_that_is_refused_with_any_line_says_nothing_about_forms() -> None:
    peer = Peer()
    peer.send(chat(at("1"), "hi"), session="s")
    work = peer.rewriter.begin(
        "t", CHAT, ((b"x-session-id", b"s"),), json.dumps(chat(at("2"), "hi", "Yes.", "so")).encode()
    )
    tried = []
    while peer.rewriter.refused(work, 400):
        tried.append(work.plan.note and work.plan.note.form)
    peer.rewriter.answered(work, 200)
    assert tried == ["user", "inline", None]
    assert peer.rewriter.as_json("t")["upstream"] == []


def test_a_form_that_is_refused_again_and_again_is_given_up_for_that_tenant() -> None:
    peer = Peer(line_role=LineRole.INLINE)
    for number in range(3):
        peer.send(chat(at("1"), f"hi {number}"), tenant="bob")
        body = chat(at("2"), f"hi {number}", "Yes.", "so")
        work = peer.rewriter.begin("bob", CHAT, (), json.dumps(body).encode())
        assert work.plan.action == "erratum"
        while peer.rewriter.refused(work, 400):
            pass
        peer.rewriter.answered(work, 200)
    peer.send(chat(at("1"), "and"), tenant="bob")
    assert peer.action == "forwarded", "no line may follow"
    peer.send(chat(at("1"), "and"), tenant="alice")
    assert peer.action == "announced"


def test_a_role_is_refused_for_a_day() -> None:
    peer = Peer()

    def told() -> str:
        name = str(len(peer.works))
        peer.send(chat(at("1"), name), session=name)
        body = chat(at("2"), name, "Yes.", "so")
        work = peer.rewriter.begin("t", CHAT, ((b"x-session-id", name.encode()),), json.dumps(body).encode())
        while any(each["role"] == "system" for each in json.loads(work.body)["messages"][1:]):
            assert peer.rewriter.refused(work, 400)
        peer.rewriter.answered(work, 200)
        assert work.plan.note is not None
        return " ".join([*work.refused, "then", work.plan.note.form])

    assert [told(), told()] == ["system then user", "then user"]
    with peer.state.write() as run:
        run.execute("UPDATE verdicts SET until = until - 86401 WHERE until IS NOT NULL")
    assert [told(), told()] == ["system then user", "then user"]


def test_a_loss_of_one_tenant_is_that_tenants() -> None:
    peer = Peer()
    said: list[Any] = ["hi"]
    for turn in range(12):
        peer.send(chat(at(str(turn % 7)), *said), tenant="bob", usage=Usage(2000, 0, 0))
        said += ["Yes.", "so"]
    assert peer.why == "rewriting is switched off here for now, because it did not pay"
    peer.send(chat(at("1"), "hi"), tenant="alice")
    assert peer.action == "announced"


def test_a_tenant_is_told_of_the_models_that_it_used_and_of_no_address() -> None:
    peer = Peer()
    for tenant, model in (("alice", "ft:of-alice"), ("bob", "common"), ("alice", "common")):
        for turns in (["hi"], ["hi", "Yes.", "so"]):
            body = {**chat(at(str(len(turns))), *turns), "model": model}
            peer.send(body, tenant=tenant)
    peer.send(claude(at("1"), "hi"), tenant="bob", route=MESSAGES)
    told = peer.rewriter.as_json("bob")
    assert told["upstream"] == [{"of": f"{CHAT} common", "about": "line as system", "verdict": "taken"}]
    assert {row["of"] for row in peer.rewriter.as_json("alice")["upstream"]} == {
        f"{CHAT} common",
        f"{CHAT} ft:of-alice",
    }
    assert peer.rewriter.as_json("carol")["upstream"] == []
    assert "http://upstream" not in json.dumps([told, peer.rewriter.as_json("alice")])
