"""Conversations in bounded memory: sums stay right, and nothing of a forgotten conversation remains."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.pieces import Request
from programmable_kv.serve.sessions import Session, Sessions


def request(number: int, *said: str, session: str = "", system: str = "rules") -> Request:
    reader = LogReader()
    messages = [{"role": "user", "content": text} for text in said]
    body = {"model": "m", "messages": [{"role": "system", "content": system}, *messages]}
    reader.add({"body": body, "session_id": session, "url": "/v1/chat/completions"}, "")
    [found] = reader.requests
    object.__setattr__(found, "number", number)
    return found


def kept(sessions: Sessions, tenant: str, one: Request) -> Session:
    session = sessions.find(tenant, one)
    sessions.keep(session, one)
    return session


steps = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["", "", "s1", "s2"]),
        st.lists(st.sampled_from(["hi", "why?", "x" * 3000, "go on"]), min_size=1, max_size=5),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps, max_bytes=st.sampled_from([3000, 20_000, 10**7]))
def test_sums_and_index_stay_right(steps: list[tuple[str, str, list[str]]], max_bytes: int) -> None:
    sessions = Sessions(max_bytes)
    for number, (tenant, name, said) in enumerate(steps, start=1):
        one = request(number, *said, session=name)
        session = sessions.find(tenant, one)
        assert session.key[0] == tenant
        assert all(each.session == name for each in session.requests)
        sessions.keep(session, one)
        assert sessions.nbytes == sum(each.nbytes for each in sessions._sessions.values())
        assert sessions.nbytes <= max_bytes
        assert set(sessions._said.values()) <= set(sessions._sessions)
        for (owner, key), where in sessions._said.items():
            assert owner == where[0]
            assert key in sessions._sessions[where].said
    assert len({key for each in sessions._sessions.values() for key in [each.key]}) == len(sessions)


def test_equal_pieces_are_kept_once() -> None:
    sessions = Sessions(10**9)
    text = "t" * 100_000
    said = ["one"]
    for number in range(8):
        said.append(f"more {number}")
        session = kept(sessions, "t", request(number + 1, *said, system=text))
    assert sessions.nbytes < 200_000
    assert len(session.requests) == 8


def test_the_conversation_that_was_silent_longest_goes_first() -> None:
    sessions = Sessions(45_000)
    for number, name in enumerate(["a", "b", "a", "c", "a", "d"], start=1):
        kept(sessions, "t", request(number, "x" * 8000, session=name))
    assert [session.key[1] for session in sessions.of_tenant("t")] == ["named d", "named a", "named c"]
    assert sessions.evicted == 1


def test_a_conversation_without_a_name_is_found_by_its_messages() -> None:
    sessions = Sessions(10**7)
    first = kept(sessions, "t", request(1, "one", "two", system="10:01"))
    other = kept(sessions, "t", request(2, "three", system="10:01"))
    assert sessions.find("t", request(3, "one", "two", "four", system="10:02")) is first
    assert sessions.find("t", request(4, "three", "five", system="10:02")) is other
    assert sessions.find("u", request(5, "one", "two")) not in (first, other), "another tenant's"
