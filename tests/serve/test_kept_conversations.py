"""What the state keeps of conversations, and how values are found in them. Shortcuts give the full method's results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.serve.rewriting import documents
from programmable_kv.serve.rewriting import store as stores
from programmable_kv.serve.rewriting.body import read
from programmable_kv.serve.rewriting.conversation import Texts, keys_of
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, Prompt, prompt_of
from programmable_kv.serve.rewriting.rules import Rules, _matches, literal_of, rules_of
from serve.rewriting_peers import RULES, Peer

texts = st.text("ab é\U0001f600\ud800\n", max_size=12)


def body(minute: int, *turns: str) -> dict[str, object]:
    said = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": f"Now: 10:{minute:02}\n{RULES}"}, *said]}


def count(peer: Peer, table: str) -> int:
    return int(peer.state.rows(f"SELECT count(*) FROM {table}")[0][0])


@given(before=texts, after=texts)
def test_a_text_that_is_kept_as_its_difference_comes_back(before: str, after: str) -> None:
    kept = Texts("frame", {"": before, "1": "same"}, {"": after, "1": "same"})
    assert documents._texts(json.loads(json.dumps(documents._written(kept)))) == kept


def test_a_long_system_prompt_is_not_kept_twice() -> None:
    peer = Peer()
    sizes = []
    for minute in (1, 2, 3):
        peer.send(body(minute, "hi"), session="s")
        [(document,)] = peer.state.rows("SELECT document FROM conversations")
        sizes.append(len(document))
    assert sizes[-1] < sizes[0] + 200 < 2 * len(RULES), sizes


def test_states_of_earlier_versions_are_read() -> None:
    """Earlier versions stored the client's last texts as a whole."""
    assert documents._texts(["f", {"": "one"}, {"": "two"}]) == Texts("f", {"": "one"}, {"": "two"})


def test_of_earlier_versions_the_order_of_tools_is_not_known() -> None:
    """Conversations of earlier versions continue as long as the tools keep their order."""
    peer, tools = Peer(), [{"name": "a"}, {"name": "b"}]
    peer.send(body(1, "hi") | {"tools": tools}, session="s")
    with peer.state.write() as run:
        [(document,)] = run.execute("SELECT document FROM conversations").fetchall()
        given = json.loads(document)
        assert len(given.pop("order")) == 2
        run.execute("UPDATE conversations SET document = ?", (json.dumps(given),))
    peer.send(body(2, "hi") | {"tools": tools}, session="s")
    assert peer.action == "erratum"
    got = peer.send(body(2, "hi") | {"tools": tools[::-1]}, session="s")
    assert (peer.action, peer.why, got["tools"]) == ("reset", "the tools changed", tools[::-1])


def test_the_conversations_that_were_silent_longest_are_forgotten_with_all_that_is_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores, "_FORGET_EVERY", 1)
    peer = Peer()
    peer.store._most = 3
    for number in range(8):
        peer.send(body(1, f"question {number}"), session=f"s{number}")
        peer.send(body(2, f"question {number}"), session=f"s{number}")  # this one adds a line
    assert len(peer.store) == count(peer, "sessions") == count(peer, "errata") == 3
    left = {conversation for (conversation,) in peer.state.rows("SELECT identity FROM conversations")}
    for table in ("sessions", "errata"):
        assert {each for (each,) in peer.state.rows(f"SELECT conversation FROM {table}")} == left
    again = peer.send(body(3, "question 7"), session="s7")
    assert peer.works[-1].plan.action == "erratum"
    assert len(again["messages"]) == 4, "the system prompt, the question, and both lines"
    peer.send(body(3, "question 0"), session="s0")
    assert peer.works[-1].plan.before is None, "nothing is known of it any more"


def test_what_was_silent_for_days_is_forgotten_without_a_limit() -> None:
    peer = Peer()
    peer.send(body(1, "hi"), session="old")
    peer.send(body(1, "hi"), session="new")
    with peer.state.write() as run:
        run.execute(
            "UPDATE conversations SET used = used - ? WHERE key IN (SELECT key FROM conversations LIMIT 1)", (8e5,)
        )
    peer.store._forget()
    assert len(peer.store) == count(peer, "sessions") == 1


@pytest.mark.usefixtures("places")
def test_beginnings_are_bounded_and_the_latest_are_kept() -> None:
    peer = Peer()
    with peer.state.write() as run:
        for age in range(3 * stores._MOST_KEYS):
            run.execute("INSERT INTO beginnings VALUES (?, 1, epoch() - ?)", (f"key {age}", float(age)))
        run.execute("INSERT INTO beginnings VALUES ('old', 1, epoch() - ?)", (31 * 86400.0,))
    stores.ConversationStore(peer.state, most=1000)
    assert count(peer, "beginnings") == 3 * stores._MOST_KEYS, "the old one is gone"
    stores.ConversationStore(peer.state, most=50)
    left = {key for (key,) in peer.state.rows("SELECT key FROM beginnings")}
    assert left == {f"key {age}" for age in range(50 * stores._BEGINNINGS)}


def test_beginnings_are_forgotten_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_FORGET_EVERY", 2)
    monkeypatch.setattr(stores, "_FORGET_BEGINNINGS_EVERY", 4)
    peer = Peer()
    peer.store._most = 3
    found = []
    for number in range(24):
        peer.send(body(1, f"question {number}"), session=f"s{number}")
        found.append(count(peer, "beginnings"))
    assert max(found) < 3 * stores._BEGINNINGS + 4
    assert len(peer.store) <= 4


@pytest.mark.usefixtures("places")
def test_a_state_that_was_made_before_finds_old_beginnings_by_an_index_too(tmp_path: Path) -> None:
    peer = Peer(path=tmp_path / "state")
    peer.send(body(1, "hi"), session="s")
    with peer.state.write() as run:
        run.execute("DROP INDEX beginnings_by_use")
    peer.state.close()
    again = Peer(path=tmp_path / "state")
    indexes = (
        "SELECT indexname FROM pg_indexes WHERE schemaname = current_schema()"
        if again.state.remote
        else "SELECT name FROM sqlite_master WHERE type = 'index'"
    )
    assert ("beginnings_by_use",) in again.state.rows(indexes)
    assert count(again, "beginnings") == 1
    if not again.state.remote:
        plan = again.state.rows("EXPLAIN QUERY PLAN SELECT key FROM beginnings WHERE used < epoch() - 5")
        assert "beginnings_by_use" in str(plan)
    again.send(body(2, "hi"), session="s")
    assert again.action == "erratum"


def test_what_belongs_to_no_conversation_goes_at_the_next_start(tmp_path: Path) -> None:
    peer = Peer(path=tmp_path / "state")
    peer.send(body(1, "hi"), session="s")
    with peer.state.write() as run:
        run.execute("INSERT INTO sessions VALUES ('t', 'none')")
        run.execute("INSERT INTO errata VALUES ('none', 0, 1, 'system', 'x')")
    peer.state.close()
    peer = Peer(path=tmp_path / "state")
    assert (count(peer, "sessions"), count(peer, "errata")) == (1, 0)
    peer.send(body(2, "hi"), session="s")
    assert peer.works[-1].plan.action == "erratum"


PATTERNS = [
    "^Now: (.*)$", "Now: (\\d+)", "id=(\\w*)", "abc?(x)", "abcd{2}", "abc*", "abc|Now: ", "^aaa", "aaa", "aab?a", "[N]ow: (.)",
    "(?i)now: (.)", "(?:Now): (.)", "Now:\\s*(\\d)", "Now. (.)", "", "a", "Now: ", "a\\|b",
]  # fmt: skip
words = st.lists(
    st.sampled_from([*"ab cd\nx", "Now: ", "now: 1", "Now: 10", "id=", "id=7", "aaa", "abc", "|"]), max_size=14
)


@given(pattern=st.sampled_from(PATTERNS), parts=words)
def test_a_pattern_finds_the_same_whether_its_literal_is_looked_for_first(pattern: str, parts: list[str]) -> None:
    compiled, text = re.compile(pattern, re.MULTILINE), "".join(parts)
    found = [match.span() for match in _matches(compiled, literal_of(pattern), text)]
    assert found == [match.span() for match in compiled.finditer(text)]


@pytest.mark.parametrize(
    ("pattern", "literal"),
    [
        ("^Now: (.*)$", "Now: "), ("Now: (.*)", "Now: "), ("trace=(\\w+)", "trace="), ("abcd?", "abc"), ("abcd{2}", "abc"),
        ("abc|d", ""), ("(?i)now", ""), ("[Nn]ow", ""), ("ab", ""), ("abc?", ""), ("", ""),
    ],
)  # fmt: skip
def test_the_literal_of_a_pattern(pattern: str, literal: str) -> None:
    assert literal_of(pattern) == literal


def keys(rules: Rules, *messages: object) -> list[str]:
    whole = read(json.dumps({"model": "m", "messages": messages}).encode())
    prompt = prompt_of(MESSAGES, whole) if whole is not None else None
    assert isinstance(prompt, Prompt)
    return keys_of(prompt, rules, "t")


def blocks(*found: str) -> dict[str, object]:
    return {"role": "user", "content": [{"type": "text", "text": text} for text in found]}


def test_conversations_that_read_alike_but_are_parted_otherwise_have_other_keys() -> None:
    rules = rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]})
    messages = [blocks("ab", "c"), blocks("a", "bc"), blocks("abc"), blocks("abc", ""), blocks("", "abc")]
    found = [keys(rules, each)[-1] for each in messages]
    assert len(set(found)) == len(found)
    one, other = (keys(rules, blocks("a"), {"role": "user", "content": text})[-1] for text in ("b", "c"))
    assert one != other
    now, later = (keys(rules, blocks(f"Now: {text}\nhi"))[-1] for text in ("10:01", "10:02"))
    assert now == later, "a declared value leaves the key as it is"


@pytest.mark.parametrize("route", [CHAT, MESSAGES])
@pytest.mark.parametrize("message", [{"role": "user", "content": "hi"}, {"content": "hi", "role": "user"}])
def test_the_frame_of_a_plain_message_is_the_one_that_a_marked_one_has(route: str, message: dict[str, str]) -> None:
    """A plain message takes a shortcut. A message with `cache_control` does not, and has the same frame."""
    frames = []
    for each in (message, {**message, "cache_control": {"type": "ephemeral"}}):
        whole = read(json.dumps({"model": "m", "messages": [each]}).encode())
        prompt = prompt_of(route, whole) if whole is not None else None
        assert isinstance(prompt, Prompt)
        frames.append((prompt.units[0].frame, prompt.units[0].texts, prompt.units[0].paths))
    assert frames[0] == frames[1]
