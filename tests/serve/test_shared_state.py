"""Several gateways, or local servers, on one PostgreSQL database: each continues the work of the others."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from programmable_kv import extras
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import InvalidArgumentError, MissingExtraError
from programmable_kv.serve.address import DatabaseAddress, place_of
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.rules import rules_of
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.salt import secret_of
from programmable_kv.serve.settings import GatewaySettings, LocalSettings
from programmable_kv.serve.state import StateUnavailableError
from programmable_kv.serve.states import open_state
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Running, metric, raw_upstream, running, wait_until
from serve.rewriting_peers import CHAT, CLOCK, RULES, Peer, at, chat, extends

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: it is in the extra `dev`")

from programmable_kv.bench.database_server import PASSWORD, Database  # noqa: E402
from programmable_kv.serve.postgres import PostgresState  # noqa: E402

pytestmark = pytest.mark.xdist_group("postgres")
AWAY = "forwarded; why=the state cannot be reached"


def peers(database: Database, number: int = 2, **more: Any) -> list[Peer]:
    """Gateways without sockets that share one empty state."""
    place = database.new()
    return [Peer(place=place, **more) for _ in range(number)]


def plain(body: Any) -> str:
    """A body as text, with its random tokens replaced."""
    return re.sub(r"\[state \w+\]|state \w{6,}", "[state T]", json.dumps(body))


def conversation(send: Callable[[int, Any], Any], turns: int = 12) -> list[Any]:
    """A conversation whose clock changes every turn. Undeclared lines of the system prompt change too."""
    said: list[Any] = ["hi"]
    sent = []
    for turn in range(turns):
        rest = RULES + (f"Open tickets: {turn % 4}\n" if turn < 9 else "Open tickets: 1\nAnother rule.\n")
        sent.append(send(turn, chat(at(str(turn % 10), rest), *said)))
        said += ["Yes.", f"more {turn}"]
    return sent


@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
def test_a_conversation_that_takes_turns_between_gateways_is_sent_as_by_one(
    database: Database, mode: GatewayMode
) -> None:
    """A gateway also uses the lines that another one learned, and the prefixes that another one warmed."""
    rules = rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]})

    def talk(gateways: list[Peer]) -> tuple[list[str], list[str]]:
        actions = []

        def send(turn: int, body: Any) -> Any:
            gateway = gateways[turn % len(gateways)]
            got = gateway.send(body, session="s")
            actions.append(gateway.action)
            if gateway.works[-1].warming is not None:
                gateway.warmed()
            return got

        return [plain(body) for body in conversation(send)], actions

    alone = talk(peers(database, 1, mode=mode, rules=rules, rebase_after=3))
    together = talk(peers(database, 3, mode=mode, rules=rules, rebase_after=3))
    assert together == alone
    in_a_file = talk([Peer(mode=mode, rules=rules, rebase_after=3)])
    assert in_a_file == alone
    assert {"erratum", "rebase", "reset"} <= set(alone[1])


def test_of_two_requests_at_once_one_goes_on_with_the_conversation(database: Database) -> None:
    one, other = peers(database)
    first = one.send(chat(at("1"), "hi"), session="s")
    bodies = [chat(at("2"), "hi", "Yes.", "so"), chat(at("3"), "hi", "Yes.", "and")]
    barrier = threading.Barrier(2)
    for peer in (one, other):
        begun, commit = peer.store.candidates, peer.store.commit
        peer.store.candidates = lambda keys, begun=begun: (begun(keys), barrier.wait(10))[0]  # type: ignore[method-assign]
        peer.store.commit = lambda plan, session="", commit=commit: commit(plan, session)  # type: ignore[method-assign]
    threads = [
        threading.Thread(target=peer.send, args=(body,), kwargs={"session": "s"})
        for peer, body in zip((one, other), bodies, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    actions = {peer.action: peer for peer in (one, other)}
    assert set(actions) == {"erratum", "forwarded"}, "both read the same version, and one of them wrote it first"
    assert actions["forwarded"].why == "another request continued the conversation"
    won = actions["erratum"]
    loser = actions["forwarded"]
    assert loser.sent[-1] in bodies, "as it came"
    assert extends(won.sent[-1], first)
    question = won.sent[-1]["messages"][-2]["content"]
    fresh = Peer(place=won.place)
    later = fresh.send(chat(at("4"), "hi", "Yes.", question, "Yes.", "later"), session="s")
    assert extends(later, won.sent[-1])
    assert fresh.action == "erratum"


def test_a_request_that_is_taken_back_does_not_come_back_by_its_number(database: Database) -> None:
    """A version is not a count. After a write is taken back and repeated, the new version differs from the old one."""
    one, other = peers(database)
    one.send(chat(at("1"), "hi"))
    body = chat(at("2"), "hi", "Yes.", "so")
    work = one.rewriter.begin("t", CHAT, (), json.dumps(body).encode())
    assert work.known is not None
    [read] = other.store.candidates(work.known.keys)
    assert one.store.take_back(work.plan)
    again = one.rewriter.begin("t", CHAT, (), json.dumps(body).encode())
    assert again.plan.action == "erratum"
    [now] = other.store.candidates(work.known.keys)
    assert (now.key, now.turns) == (read.key, read.turns)
    assert now.version != read.version


def test_what_one_gateway_finds_out_the_others_know(database: Database) -> None:
    one, other = peers(database)
    one.rewriter.accepted.decide(CHAT, "m", Form.SYSTEM, "refused")
    assert other.rewriter.accepted.verdict(CHAT, "m", Form.SYSTEM) == "refused"
    strange = "a\x00 \ud800model"
    one.rewriter.accepted.decide(CHAT, strange, Form.SYSTEM, "refused")
    assert other.rewriter.accepted.verdict(CHAT, strange, Form.SYSTEM) == "refused"
    one.verdicts.decide("u", "off", "it lost", for_s=0.05)
    assert other.verdicts.of("u") == {"off": "it lost"}
    time.sleep(0.1)
    assert other.verdicts.of("u") == {}
    one.verdicts.learn("o", ["a", "b"])
    assert other.verdicts.learned("o") == frozenset()
    other.verdicts.learn("o", ["a"])
    assert one.verdicts.learned("o") == {"a"}
    assert secret_of(one.state) == secret_of(other.state)
    for peer in (one, other):
        peer.send(chat(at("1"), "hi"), session=str(id(peer)))
        told = peer.rewriter.as_json("t")["upstream"]
        assert told == [{"of": f"{CHAT} m", "about": "line as system", "verdict": "refused"}]


def test_a_rebase_whose_gateway_died_is_done_again_by_another(database: Database) -> None:
    one, other = peers(database, rebase_after=2)
    said: list[Any] = ["hi"]
    for turn in range(3):
        one.send(chat(at(str(turn)), *said))
        said += ["Yes.", f"more {turn}"]
    lost = one.works[-1]
    assert lost.warming is not None
    third = Peer(place=one.place, rebase_after=2)
    other.send(chat(at("3"), *said))
    assert other.works[-1].warming is None, "a gateway that starts does not take it away"
    said += ["Yes.", "more"]
    with one.state.write() as run:
        run.execute("UPDATE renewals SET until = epoch() - 1")
    third.send(chat(at("4"), *said))
    assert third.works[-1].warming is not None, "its time is over"
    one.rewriter.warmed(lost, done=True)  # the first gateway ends its warming late
    said += ["Yes.", "more"]
    other.send(chat(at("5"), *said))
    assert other.action == "erratum", "what another began later counts"
    warm = third.warmed()
    said += ["Yes.", "more"]
    got = other.send(chat(at("6"), *said))
    assert (other.action, extends(got, warm)) == ("rebase", True)


def test_lines_are_never_changed(database: Database) -> None:
    [peer] = peers(database, 1)
    peer.send(chat(at("1"), "hi"))
    peer.send(chat(at("2"), "hi", "Yes.", "so"))
    with pytest.raises(psycopg.errors.RaiseException, match="never changed"), peer.state.write() as run:
        run.execute("UPDATE errata SET line = 'another'")
    assert len(peer.state.rows("SELECT * FROM errata")) == 1

    def break_off() -> None:
        with peer.state.write() as run:
            run.execute("DELETE FROM conversations")
            run.execute("UPDATE errata SET line = 'another'")

    with pytest.raises(psycopg.errors.RaiseException):
        break_off()
    assert len(peer.store) == 1
    assert len(peer.state.rows("SELECT * FROM errata")) == 1


def test_gateways_that_start_at_once_make_one_state(database: Database) -> None:
    place = database.new()
    made: list[PostgresState] = []
    threads = [threading.Thread(target=lambda: made.append(PostgresState(place))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 6
    for state in made:
        state.close()
    with pytest.raises(StateUnavailableError, match="closed"):
        made[0].rows("SELECT 1")


def test_what_is_silent_is_forgotten_and_the_rest_is_kept(database: Database) -> None:
    one, other = peers(database)
    for name in ("old", "new"):
        one.send(chat(at("1"), name), session=name)
        one.send(chat(at("2"), name, "Yes.", "so"), session=name)
    old = one.works[1].plan.after
    assert old is not None
    with other.state.write() as run:
        run.execute("UPDATE conversations SET used = used - 700000 WHERE identity = ?", (old.identity,))
    store = ConversationStore(other.state, most=1000)
    assert len(store) == 1
    assert len(other.state.rows("SELECT * FROM errata")) == len(other.state.rows("SELECT * FROM sessions")) == 1
    assert len(ConversationStore(other.state, most=1)) == 1


def test_the_password_is_never_shown(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    good = database.url()
    secrets = (PASSWORD, PASSWORD.replace("/", "%2F"), "Pa55")
    assert "Pa55" in good
    wrong = [
        good.replace("Pa55", "Pa55x"),
        good.replace(f":{database.port}", ":1"),
        good.replace("%2F", "/"),
        good.replace("%2F", "#"),
        good.replace("%2F", "?"),
        good.replace("%2F", "@"),
        good.replace("Pa55-w%2Frd", "1/Pa55"),
        good + "?no_such_option=1",
        good.replace("/postgres", "/no_such_database"),
    ]
    for url in wrong:
        with pytest.raises(InvalidArgumentError) as caught:
            open_state(place_of(url), durable=False)
        shown = f"{caught.value!r} {caught.value} {''.join(traceback.format_exception(caught.value))}"
        assert not [each for each in secrets if each in shown], shown
    settings = GatewaySettings("http://127.0.0.1:1", state=place_of(good))
    assert "Pa55" not in repr(settings) + str(settings.state) + caplog.text


def test_only_postgresql_is_a_database() -> None:
    with pytest.raises(InvalidArgumentError, match="mysql"):
        place_of("mysql://root:secret@here/db")
    assert isinstance(place_of("postgres://here/db"), DatabaseAddress)
    assert not isinstance(place_of("/var/lib/pkv/gateway.sqlite3"), DatabaseAddress)


def test_without_its_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"programmable-kv\[postgres\]"):
        open_state(DatabaseAddress("postgresql://127.0.0.1:1/none"), durable=False)


def test_a_database_of_others_is_left_alone(database: Database) -> None:
    place = database.new()
    with psycopg.connect(place.url) as connection:
        connection.execute("CREATE TABLE errata (theirs INTEGER)")
    with pytest.raises(InvalidArgumentError, match="a database of its own"):
        open_state(place, durable=False)
    with psycopg.connect(place.url) as connection:
        assert connection.execute("SELECT theirs FROM errata").fetchall() == []
        assert connection.execute("SELECT to_regclass('conversations')").fetchall() == [(None,)]
    place = database.new()
    open_state(place, durable=False).close()
    with psycopg.connect(place.url) as connection:
        connection.execute("UPDATE programmable_kv_format SET version = 99")
    with pytest.raises(InvalidArgumentError, match="format 99"):
        open_state(place, durable=False)


def gateway(url: str, place: DatabaseAddress, **more: Any) -> GatewaySettings:
    return GatewaySettings(
        url, port=0, mode=GatewayMode.ERRATUM, rules=CLOCK, state=place, line_role=LineRole.SYSTEM, **more
    )


def ask(front: Running, said: list[Any], minute: int, session: str = "s") -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "system", "content": at(str(minute % 10))}, *said]}
    got = httpx2.post(f"{front.url}{CHAT}", json=body, headers={"x-session-id": session}, timeout=30)
    assert got.status_code == 200, got.text
    said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more {minute}"}]
    return got


def test_two_gateways_send_what_one_would(database: Database) -> None:
    upstream, place = CachingUpstream(), database.new()
    with (
        raw_upstream(upstream) as server,
        running(gateway(server.url, place, salts=True, rebase_after=4)) as one,
        running(gateway(server.url, place, salts=True, rebase_after=4)) as other,
    ):
        said: list[Any] = [{"role": "user", "content": "hi"}]
        actions = []
        for turn in range(8):
            front = (one, other)[turn % 2]
            got = ask(front, said, turn)
            actions.append(got.headers["x-pkv-action"].partition(";")[0])
            if got.headers.get("x-pkv-rebase") == "warming":
                line = f'pkv_rebases_total{{outcome="warmed",route="{CHAT}"}}'
                wait_until(lambda front=front, line=line: metric(front.url, line) >= 1)  # type: ignore[misc]
        assert actions[0] == "announced"
        assert set(actions[1:]) == {"erratum", "rebase"}
        asked = [body for body in upstream.bodies if body.get("max_tokens") != 1]
        warmed = [body for body in upstream.bodies if body.get("max_tokens") == 1]
        for earlier, later in pairwise(asked):
            assert extends(later, earlier) or any(extends(later, each) for each in warmed)
        assert len({body["cache_salt"] for body in upstream.bodies}) == 1, "one secret"


def test_a_database_that_hangs_or_is_killed_delays_no_one_for_long(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    upstream, place = CachingUpstream(), database.new()
    with raw_upstream(upstream) as server, running(gateway(server.url, place)) as front:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        for turn in range(3):
            ask(front, said, turn)
        kept = upstream.bodies[-1]
        for fault in ("hangs", "is killed"):
            database.signal(signal.SIGSTOP) if fault == "hangs" else database.kill()
            try:
                began = time.monotonic()
                waiting = threading.Thread(target=ask, args=(front, list(said), 5))
                waiting.start()
                quick = time.monotonic()
                assert httpx2.get(f"{front.url}/healthz", timeout=30).json() == {"status": "ok"}
                assert time.monotonic() - quick < 1.5, "the event loop does not wait for a database"
                waiting.join(30)
                for turn in range(4, 7):
                    got = ask(front, said, turn)
                    assert got.headers["x-pkv-action"] == AWAY
                    assert upstream.bodies[-1]["messages"] == [
                        {"role": "system", "content": at(str(turn))}, *said[:-2]
                    ], "as it came"  # fmt: skip
                assert time.monotonic() - began < 20, "one of them waited, the others did not"
                report = httpx2.get(f"{front.url}/pkv/report", timeout=30)
                assert report.json()["rewriting"]["state"] == "cannot be reached now"
                assert "pkv_conversations NaN" in httpx2.get(f"{front.url}/metrics", timeout=30).text
            finally:
                database.signal(signal.SIGCONT) if fault == "hangs" else database.start()
            wait_until(lambda: ask(front, said, 7).headers["x-pkv-action"] != AWAY, 20)
            assert extends(upstream.bodies[-1], kept), "it goes on with what was sent before"
            kept = upstream.bodies[-1]
            told = re.findall(r'"the time": "([0-9:]+)"', json.dumps(kept).replace("\\", ""))
            assert told[-1] == "10:07", "the last value told is the one that holds"
        report = httpx2.get(f"{front.url}/pkv/report").text
    assert "can be reached again" in caplog.text
    assert PASSWORD not in caplog.text + report
    assert "Pa55" not in caplog.text + report


def local(place: DatabaseAddress) -> Any:
    settings = LocalSettings(port=0, state=place, max_notebooks=3)
    return running(settings, local_app(tiny_chat_model(2048), settings))


MADE = {"messages": [{"role": "system", "content": "It is {status}."}], "fields": {"status": "new"}}


def test_notebooks_of_two_servers_are_the_same_ones(database: Database) -> None:
    place = database.new()
    with local(place) as one, local(place) as other:
        books = [f"{each.url}/v1/notebooks" for each in (one, other)]
        name = httpx2.post(books[0], json=MADE, timeout=60).json()["id"]
        for version, value in enumerate(("shipped", "lost", "found", "lost"), start=2):
            got = httpx2.patch(
                f"{books[version % 2]}/{name}/fields",
                json={"status": value},
                headers={"if-match": f'"{version - 1}"'},
                timeout=60,
            )
            assert (got.status_code, got.json()["version"]) == (200, version), got.text
            for each in books:
                found = httpx2.get(f"{each}/{name}", timeout=60).json()
                assert (found["version"], found["fields"]["status"]) == (version, value)
        late = httpx2.patch(f"{books[0]}/{name}/fields", json={"status": "x"}, headers={"if-match": '"2"'}, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (412, "version_changed")
        for each in books:
            runs = httpx2.get(f"{each}/{name}/tokens", timeout=60).json()["runs"]
            assert "It is lost." in "".join(run["text"] for run in runs), "computed from the values that hold"
        acknowledged: list[int] = []

        def edit(url: str, word: str) -> None:
            for turn in range(3):
                got = httpx2.patch(f"{url}/{name}/fields", json={"status": f"{word}{turn}"}, timeout=60)
                assert got.status_code in (200, 503), got.text
                acknowledged.append(got.status_code == 200 and got.json()["version"])

        threads = [threading.Thread(target=edit, args=(url, word)) for url, word in zip(books, "ab", strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        versions = [version for version in acknowledged if version]
        assert sorted(versions) == list(range(6, 6 + len(versions))), "no edit is lost, none is made twice"
        assert httpx2.post(f"{books[1]}/{name}/fork", timeout=60).status_code == 201
        assert httpx2.post(books[0], json=MADE, timeout=60).status_code == 201
        assert httpx2.post(books[1], json=MADE, timeout=60).json()["error"]["code"] == "notebooks_full"
        assert {each["id"] for each in httpx2.get(books[0]).json()["data"]} == {
            each["id"] for each in httpx2.get(books[1]).json()["data"]
        }
        assert httpx2.delete(f"{books[1]}/{name}").status_code == 204
        assert httpx2.get(f"{books[0]}/{name}").status_code == 404
        assert httpx2.delete(f"{books[0]}/{name}").status_code == 404


def test_a_local_server_without_its_database_says_so_and_comes_back(database: Database) -> None:
    place = database.new()
    with local(place) as server:
        books = f"{server.url}/v1/notebooks"
        name = httpx2.post(books, json=MADE, timeout=60).json()["id"]
        database.kill()
        try:
            got = httpx2.patch(f"{books}/{name}/fields", json={"status": "shipped"}, timeout=60)
            assert (got.status_code, got.json()["error"]["code"]) == (503, "state_unavailable")
            assert got.headers["retry-after"] == "1"
            assert "127.0.0.1" not in got.text
        finally:
            database.start()
        wait_until(lambda: httpx2.get(f"{books}/{name}").status_code == 200, 20)
        assert httpx2.get(f"{books}/{name}").json()["fields"] == {"status": "new"}
