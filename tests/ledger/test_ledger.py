"""The ledger, compared with a slow reference that remembers for every token all that it has read."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.cache.span import Span
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin, Run
from programmable_kv.ledger.version import Content, Version
from programmable_kv.states import TokenState, weakest


def packed(ids: list[int]) -> bytes:
    return array("I", ids).tobytes()


@dataclass(frozen=True)
class Token:
    """A token that remembers what it read: ids, whether they were exact, and values of fields."""

    id: int
    read: tuple[int, ...]
    read_exact: bool
    seen: frozenset[tuple[str, str]]
    origin: Origin
    states: tuple[tuple[str, str], ...] = ()
    """(field, value) pairs that the token itself states"""


class Reference:
    """What a ledger says, computed token by token."""

    def __init__(self, tokens: list[Token] | None = None) -> None:
        self.tokens = tokens or []

    def exact(self, slot: int) -> bool:
        token = self.tokens[slot]
        return token.read_exact and token.read == tuple(it.id for it in self.tokens[:slot])

    def compute(
        self, start: int, ids: list[int], values: dict[int, tuple[str, str]], origin: Origin, partly: bool = False
    ) -> None:
        """`partly`: the tokens do not read everything before them."""
        for offset, token_id in enumerate(ids):
            slot = start + offset
            before = self.tokens[:slot]
            seen = {item for it in before for item in (*it.seen, *it.states)}
            own = (values[offset],) if offset in values else ()
            token = Token(
                token_id,
                tuple(it.id for it in before),
                not partly and all(self.exact(earlier) for earlier in range(slot)),
                frozenset(seen | set(own)),
                origin,
                own,
            )
            self.tokens[slot : slot + 1] = [token]

    def state(self, slot: int, fields: dict[str, str], places: dict[str, int]) -> TokenState:
        token = self.tokens[slot]
        same = token.read == tuple(it.id for it in self.tokens[:slot])
        if same and token.read_exact:
            state = TokenState.REPAIRED if token.origin is Origin.REPAIRED else TokenState.EXACT
        elif same:
            state = TokenState.AFTER_EDIT if token.origin is Origin.COMPUTED else TokenState.REFRESHED
        else:
            state = TokenState.STALE
        for name, place in places.items():
            values = {value for field, value in token.seen if field == name}
            if slot < place or not values or values == {fields[name]}:
                continue
            by_value = TokenState.AFTER_EDIT if fields[name] in values else TokenState.STALE
            if not (state is TokenState.REFRESHED and by_value is TokenState.AFTER_EDIT):
                state = weakest((state, by_value))
        return state


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_ledger_says_what_the_reference_says(data: st.DataObject) -> None:
    """After tokens are appended, recomputed, replaced, cut and exchanged, the states agree token by token."""
    ledger, reference = Ledger(), Reference()
    fields = {"f": "a"}
    for _ in range(data.draw(st.integers(1, 9))):
        length = len(reference.tokens)
        what = data.draw(
            st.sampled_from(["append", "compute", "replace", "cut", "exchange", "value"] if length else ["append"])
        )
        start = data.draw(st.integers(0, length - 1)) if length else 0
        origin = data.draw(st.sampled_from([Origin.COMPUTED, Origin.REPAIRED, Origin.REFRESHED]))
        partly = data.draw(st.booleans())
        if what == "append":
            ids = data.draw(IDS)
            values = {0: ("f", data.draw(st.sampled_from("ab")))} if data.draw(st.booleans()) else {}
            reference.compute(length, ids, values, Origin.COMPUTED, partly)
            ledger = ledger.computed(length, packed(ids), statements(values), origin=Origin.COMPUTED, partly=partly)
        elif what == "compute":
            stop = data.draw(st.integers(start + 1, length))
            ids = [it.id for it in reference.tokens[start:stop]]
            values = {i: it.states[0] for i, it in enumerate(reference.tokens[start:stop]) if it.states}
            reference.compute(start, ids, values, origin, partly)
            ledger = ledger.computed(start, packed(ids), statements(values), origin=origin, partly=partly)
        elif what == "replace":
            stop, ids = data.draw(st.integers(start + 1, length)), data.draw(IDS)
            ledger = ledger.shifted(stop, start + len(ids))
            tail = reference.tokens[stop:]
            gap = [replace(reference.tokens[0], id=-1)] * len(ids)
            reference.tokens = [*reference.tokens[:start], *gap, *tail]
            reference.compute(start, ids, {}, origin)
            ledger = ledger.computed(start, packed(ids), (), origin=origin)
        elif what == "cut":
            stop = data.draw(st.integers(start + 1, length))
            del reference.tokens[start:stop]
            ledger = ledger.shifted(stop, start) if stop < length else ledger.truncated(start)
        elif what == "exchange":
            middle = data.draw(st.integers(start, length))
            stop = data.draw(st.integers(middle, length))
            tokens = reference.tokens
            reference.tokens = [*tokens[:start], *tokens[middle:stop], *tokens[start:middle], *tokens[stop:]]
            ledger = ledger.exchanged(start, middle, stop)
        else:
            fields = {"f": data.draw(st.sampled_from("abc"))}
        assert len(ledger) == len(reference.tokens)
        assert b"".join(run.tokens for run in ledger.runs) == packed([it.id for it in reference.tokens])
        holds = [slot for slot, it in enumerate(reference.tokens) if it.states]
        places = {"f": min(holds)} if holds else {}
        found: list[TokenState] = []
        for stretch in ledger.stretches(fields, [(slot, name) for name, slot in places.items()]):
            assert stretch.span.start == len(found), "stretches follow on each other"
            found += [stretch.state] * len(stretch.span)
        assert found == [reference.state(slot, fields, places) for slot in range(len(reference.tokens))]
        inexact = [slot for slot in range(len(reference.tokens)) if not reference.exact(slot)]
        assert ledger.first_inexact(0) == min(inexact, default=len(ledger))


def statements(values: dict[int, tuple[str, str]]) -> list[tuple[int, str, str]]:
    return [(offset, name, value) for offset, (name, value) in sorted(values.items())]


def read(ledger: Ledger, ids: list[int], *stated: tuple[int, str, str]) -> Ledger:
    return ledger.computed(len(ledger), packed(ids), stated, origin=Origin.COMPUTED)


def states(ledger: Ledger, **fields: str) -> list[TokenState]:
    places = [(0, name) for name in fields]
    return [stretch.state for stretch in ledger.stretches(fields, places) for _ in stretch.span.range]


def test_a_value_that_changes_back_leaves_its_readers_exact() -> None:
    ledger = read(read(Ledger(), [1, 2], (1, "f", "a")), [3, 4])
    changed = ledger.computed(1, packed([9]), [(0, "f", "b")], origin=Origin.REFRESHED)
    assert states(changed, f="b") == [TokenState.EXACT, TokenState.EXACT, TokenState.STALE, TokenState.STALE]
    back = changed.computed(1, packed([2]), [(0, "f", "a")], origin=Origin.REFRESHED)
    assert set(states(back, f="a")) == {TokenState.EXACT}
    assert back.has_read_only("f", "a", 1)
    assert not changed.has_read_only("f", "b", 1), "the tokens after it have read the value before"


def test_what_reads_a_stale_token_is_never_exact_again() -> None:
    """Not even if the text is again the one that it read: it was computed from other keys and values."""
    ledger = read(read(Ledger(), [1, 2], (1, "f", "a")), [3])
    changed = ledger.computed(1, packed([9]), [(0, "f", "b")], origin=Origin.REFRESHED)
    later = read(changed, [5])
    assert states(later, f="b")[-1] is TokenState.AFTER_EDIT
    back = later.computed(1, packed([2]), [(0, "f", "a")], origin=Origin.REFRESHED)
    assert states(back, f="a") == [TokenState.EXACT] * 3 + [TokenState.STALE]


def test_a_part_of_a_run_that_is_computed_again_leaves_the_rest_alone() -> None:
    ledger = read(Ledger(), list(range(8)))
    again = ledger.computed(3, packed([3]), (), origin=Origin.REFRESHED)
    assert set(states(again)) == {TokenState.EXACT}
    changed = ledger.computed(3, packed([99]), (), origin=Origin.REFRESHED)
    assert states(changed) == [TokenState.EXACT] * 4 + [TokenState.STALE] * 4


def test_an_older_statement_is_stale_and_the_newest_one_tells() -> None:
    ledger = read(read(Ledger(), [1], (0, "f", "a")), [2])
    told = read(read(ledger, [7, 7], (0, "f", "b")), [8, 8], (0, "f", "c"))
    assert states(told, f="c") == [TokenState.STALE] * 4 + [TokenState.AFTER_EDIT] * 2


def test_a_compiled_run_is_relocated_until_its_own_text_changes() -> None:
    skill = Run(packed([5, 6, 7]), Version(Content.of(packed([9])), True, {}, True), (), Origin.COMPILED, Content.of())
    ledger = read(Ledger(), [1, 2]).inserted(2, [skill])
    assert states(ledger) == [TokenState.EXACT] * 2 + [TokenState.RELOCATED] * 3
    assert ledger.reads_preface
    seam = ledger.computed(2, packed([5]), (), origin=Origin.REPAIRED)
    assert states(seam) == [TokenState.EXACT] * 2 + [TokenState.REPAIRED] + [TokenState.RELOCATED] * 2
    inside = seam.computed(3, packed([66]), (), origin=Origin.REFRESHED)
    assert states(inside)[-1] is TokenState.STALE
    moved = seam.exchanged(0, 2, 5)
    assert states(moved)[1:3] == [TokenState.RELOCATED] * 2, "a skill's later tokens move with it"
    behind = read(Ledger(), [9]).inserted(1, [skill])
    assert set(states(behind)) == {TokenState.EXACT}, "just the tokens stand before it that it was compiled behind"
    assert not behind.reads_preface


def test_rounded_runs_are_never_exact() -> None:
    skill = Run(packed([5, 6]), Version(Content.of(), False), (), Origin.COMPILED, Content.of())
    assert set(states(Ledger([skill]))) == {TokenState.RELOCATED}
    assert states(read(Ledger([skill]), [7]))[-1] is TokenState.AFTER_EDIT


def test_contents_are_equal_however_they_were_put_together() -> None:
    whole = Content.of(packed([1, 2, 3, 4]))
    assert Content.of(packed([1])).extended(packed([2, 3])).extended(packed([4])).same(whole)
    assert not Content.of(packed([1, 2, 3])).same(whole)
    saved = Content.saved(whole.digest, whole.length)
    assert saved.same(whole)
    assert not saved.extended(packed([5])).same(whole.extended(packed([5]))), "a loaded digest cannot be extended"


def test_what_does_not_read_everything_before_it_is_not_exact() -> None:
    ledger = read(Ledger(), [1, 2])
    line = ledger.computed(2, packed([3]), (), origin=Origin.COMPUTED, partly=True)
    assert states(line) == [TokenState.EXACT] * 2 + [TokenState.AFTER_EDIT]
    assert states(read(line, [4]))[-1] is TokenState.AFTER_EDIT


def test_the_weakest_state_counts() -> None:
    ledger = read(Ledger(), [1, 2])
    assert ledger.weakest({}, []) is TokenState.EXACT
    assert ledger.truncated(0).weakest({}, []) is TokenState.EXACT
    changed = ledger.computed(0, packed([7]), (), origin=Origin.REFRESHED)
    assert changed.weakest({}, []) is TokenState.STALE
    assert Span(0, 2).stop == len(changed)
