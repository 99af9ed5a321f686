"""The ledger of a cached context: its runs in slot order, what each run has read, and the states that follow from it.

A ledger is immutable. Its operations mirror those of the cache buffer (`truncated`, `shifted`, `inserted`, `exchanged`,
`computed`), and a plan applies each step to both. States are derived, never set: a run is exact if the tokens before it
are the ones that it was computed behind, if it read all of them, and if they were exact at that time. So a value that
changes and changes back leaves its readers exact.

Cost: operations and states take time proportional to the number of runs, plus hashing the tokens after the change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise

from programmable_kv.cache.span import Span
from programmable_kv.ledger.run import Origin, Run
from programmable_kv.ledger.version import (
    NOTHING,
    TOKEN_BYTES,
    Content,
    Seen,
    Statement,
    Version,
    merged,
    with_statements,
)
from programmable_kv.states import TokenState, weakest

FirstPlace = tuple[int, str]
"""(slot, field): tokens from this slot on can have read the field."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive slots of one state."""

    span: Span
    state: TokenState


@dataclass(slots=True)
class _Standing:
    """The version before each run, and each run's state; computed lazily from the left."""

    versions: list[Version] = field(default_factory=lambda: [NOTHING])
    states: list[TokenState] = field(default_factory=list)


class Ledger:
    """The runs of a cached context, in slot order."""

    __slots__ = ("_ends", "_standing", "runs")

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self.runs: tuple[Run, ...] = tuple(run for run in runs if run.tokens)
        self._ends: list[int] = list(accumulate(map(len, self.runs)))
        self._standing = _Standing()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    # -- the buffer's operations, on the ledger --------------------------------------------------------------------

    def truncated(self, length: int) -> Ledger:
        """The ledger without the slots from `length` on."""
        ledger, index = self._cut_at(length)
        return ledger._with(ledger.runs[:index], index)

    def shifted(self, start: int, to: int) -> Ledger:
        """Move the tail from slot `start` to slot `to`. Slots in between are removed, or a gap to compute opens."""
        ledger, index = self._cut_at(start)
        if to < start:
            ledger, first = ledger._cut_at(to)
            ledger, index = ledger._cut_at(start)
            return ledger._with(ledger.runs[:first] + ledger.runs[index:], first)
        gap = Run(bytes(TOKEN_BYTES * (to - start)), NOTHING, origin=Origin.PENDING)
        return ledger._with((*ledger.runs[:index], gap, *ledger.runs[index:]), index)

    def inserted(self, at: int, runs: Sequence[Run], *, replacing: int = 0) -> Ledger:
        """Insert runs at slot `at`, in place of the `replacing` slots from there on."""
        ledger, first = self._cut_at(at)
        ledger, last = ledger._cut_at(at + replacing)
        return ledger._with((*ledger.runs[:first], *runs, *ledger.runs[last:]), first)

    def exchanged(self, start: int, middle: int, stop: int) -> Ledger:
        """Swap the adjacent slots [start, middle) and [middle, stop)."""
        ledger, first = self._cut_at(start)
        ledger, second = ledger._cut_at(middle)
        ledger, end = ledger._cut_at(stop)
        runs = ledger.runs
        return ledger._with((*runs[:first], *runs[second:end], *runs[first:second], *runs[end:]), first)

    def computed(
        self, start: int, tokens: bytes, statements: Iterable[Statement] = (), *, origin: Origin, partly: bool = False
    ) -> Ledger:
        """Record that `tokens` were computed in the slots from `start` on, behind the tokens that precede them now.

        They may extend the context. `partly`: they did not read all of those tokens, so they are not exact.
        """
        count = len(tokens) // TOKEN_BYTES
        ledger, first = self._cut_at(start)
        ledger, last = ledger._cut_at(min(start + count, len(ledger)))
        version = ledger.version_at(first)
        run = Run(tokens, replace(version, exact=False) if partly else version, tuple(statements), origin)
        return ledger._with((*ledger.runs[:first], run, *ledger.runs[last:]), first)

    def _cut_at(self, slot: int) -> tuple[Ledger, int]:
        """A ledger in which a run begins at `slot`, and that run's index. This changes no state and no version."""
        index = bisect_right(self._ends, slot)
        begins = self._ends[index - 1] if index else 0
        if begins == slot:
            return self, index
        assert index < len(self.runs), f"there is no slot {slot} in a ledger of {len(self)}"
        return self._with(
            (*self.runs[:index], *self.runs[index].split(slot - begins), *self.runs[index + 1 :]), index
        ), index + 1

    def _with(self, runs: tuple[Run, ...], unchanged: int) -> Ledger:
        """A ledger with other runs; the first `unchanged` are this ledger's, so their versions and states are kept."""
        ledger = Ledger()
        ledger.runs = runs if all(run.tokens for run in runs[unchanged:]) else tuple(run for run in runs if run.tokens)
        ends, begins = self._ends[:unchanged], self._ends[unchanged - 1] if unchanged else 0
        ledger._ends = [*ends, *islice(accumulate(map(len, ledger.runs[unchanged:]), initial=begins), 1, None)]
        known = self._standing
        ledger._standing = _Standing(known.versions[: unchanged + 1], known.states[:unchanged])
        return ledger

    # -- the state of each run -----------------------------------------------------------------------------------

    def version_at(self, index: int) -> Version:
        """The version before run `index` now. The number of runs as index gives the version of the whole context."""
        known = self._standing
        held: Seen | None = None  # merged last: later tokens have read all of it, so it need not be compared again
        while len(known.versions) <= index:
            number = len(known.versions) - 1
            before, run = known.versions[number], self.runs[number]
            known.states.append(self._state(number, run, before))
            unknown_preface = run.origin is Origin.COMPILED and run.version.preface and not known.states[-1].exact
            known.versions.append(
                Version(
                    before.content.extended(run.tokens),
                    before.exact and known.states[-1].exact,
                    with_statements(
                        before.seen if run.version.seen is held else merged(before.seen, run.version.seen),
                        run.statements,
                    ),
                    before.preface or unknown_preface or (run.origin is not Origin.COMPILED and run.version.preface),
                )
            )
            held = run.version.seen
        return known.versions[index]

    def _state(self, index: int, run: Run, before: Version) -> TokenState:
        """The state of a run from the tokens before it, regardless of field values, which an erratum may correct."""
        if run.version.content.same(before.content):
            if run.version.exact:
                return TokenState.REPAIRED if run.origin is Origin.REPAIRED else TokenState.EXACT
            if run.origin is Origin.COMPILED:
                return TokenState.RELOCATED
            return TokenState.AFTER_EDIT if run.origin is Origin.COMPUTED else TokenState.REFRESHED
        if run.skill is not None and self._follows(index, run.skill):
            return TokenState.RELOCATED
        return TokenState.STALE

    def _follows(self, index: int, skill: Content) -> bool:
        """Whether the tokens right before run `index` are `skill`, the earlier tokens of the run's own skill."""
        if not skill.length:
            return True
        wanted, pieces = skill.length * TOKEN_BYTES, []
        for run in reversed(self.runs[:index]):
            pieces.append(run.tokens[-wanted:] if wanted < len(run.tokens) else run.tokens)
            wanted -= len(pieces[-1])
            if not wanted:
                return skill.same(Content.of(b"".join(reversed(pieces))))
        return False

    @property
    def standing(self) -> Version:
        """The version that a token appended now would read."""
        return self.version_at(len(self.runs))

    def seen_before(self, slot: int) -> Version:
        """The version that a token computed now at `slot` would read."""
        ledger, index = self._cut_at(slot)
        return ledger.version_at(index)

    def stretches(self, fields: Mapping[str, str], places: Sequence[FirstPlace]) -> Iterator[Stretch]:
        """The states of all slots, in order.

        Args:
            fields: every field's current value. A token that has read only other values is stale; one that has read the
                current value and another was computed after the edit.
            places: where each field can first be read, ascending by slot.
        """
        begins = 0
        for stop, state in self._borders(fields, places):
            yield Stretch(Span(begins, stop), state)
            begins = stop

    def weakest(self, fields: Mapping[str, str], places: Sequence[FirstPlace]) -> TokenState:
        """The weakest state of any token. Arguments as in `stretches`."""
        found: set[TokenState] = set()
        for _, state in self._borders(fields, places):
            found.add(state)
            if state is TokenState.STALE:  # nothing is weaker
                break
        return weakest(found)

    def _borders(self, fields: Mapping[str, str], places: Sequence[FirstPlace]) -> Iterator[tuple[int, TokenState]]:
        """(stop, state) of consecutive slots of one state. Arguments as in `stretches`."""
        self.version_at(len(self.runs))
        borders = sorted({slot for slot, _ in places})
        worth: dict[tuple[int, int], TokenState] = {}
        begins = 0
        for state, run, ends in zip(self._standing.states, self.runs, self._ends, strict=True):
            seen = run.version.seen
            low, high = bisect_right(borders, begins), bisect_right(borders, ends - 1)
            edges = [begins, ends]
            if run.statements or low != high:
                edges = sorted(
                    {begins, ends, *(begins + offset for offset, _, _ in run.statements), *borders[low:high]}
                )
            for start, stop in pairwise(edges):
                held = [statement for statement in run.statements if statement[0] <= start - begins]
                if held:
                    by_values = _by_values(with_statements(seen, held), fields, places, start)
                else:
                    key = (id(seen), bisect_right(borders, start))
                    if key not in worth:
                        worth[key] = _by_values(seen, fields, places, start)
                    by_values = worth[key]
                # A refreshed token reads the old value through its neighbours, which its state already says.
                told = state is TokenState.REFRESHED and by_values is TokenState.AFTER_EDIT
                yield stop, state if told or by_values.rank < state.rank else by_values
            begins = ends

    def first_inexact(self, start: int) -> int:
        """The first slot from `start` on that is not exact for the current text; the length if all are exact."""
        self.version_at(len(self.runs))
        for index in range(bisect_right(self._ends, start), len(self.runs)):
            if not self._standing.states[index].exact:
                return max(start, self._ends[index] - len(self.runs[index]))
        return len(self)

    def has_read_only(self, name: str, value: str, place: int) -> bool:
        """Whether every token from slot `place` on has read this value of a field and no other."""
        allowed = {value}
        begins = 0
        for index, run in enumerate(self.runs):
            ends = self._ends[index]
            if ends > place:
                # If a run begins before the place, its token at the place has read the run's version and its own
                # statements up to there.
                if begins >= place and not run.version.seen.get(name, frozenset()) <= allowed:
                    return False
                if begins < place and not self._read_by(run, place - begins, name) <= allowed:
                    return False
                if any(
                    field == name and stated != value
                    for offset, field, stated in run.statements
                    if begins + offset < ends
                ):
                    return False
            begins = ends
        return True

    def noted_behind(self, slot: int, name: str) -> frozenset[str]:
        """The values of a field that the first token from `slot` on has read that read any, and that no edit computed
        again; none if there is no such token.
        """
        for run, ends in zip(self.runs, self._ends, strict=True):
            if ends > slot and run.origin is not Origin.REFRESHED:
                found = self._read_by(run, max(0, slot - ends + len(run)), name)
                if found:
                    return found
        return frozenset()

    @staticmethod
    def _read_by(run: Run, offset: int, name: str) -> frozenset[str]:
        """The values of a field that the run's token at `offset` has read."""
        held = frozenset(value for at, field, value in run.statements if field == name and at <= offset)
        return run.version.seen.get(name, frozenset()) | held

    def written_before(self, slot: int) -> Seen:
        """The field values that are written in the text before `slot`, without values that tokens have only read."""
        ledger, index = self._cut_at(slot)
        return with_statements({}, [statement for run in ledger.runs[:index] for statement in run.statements])

    @property
    def reads_preface(self) -> bool:
        """Whether a token has read a preface that is not in the context."""
        return self.standing.preface


def _by_values(seen: Seen, fields: Mapping[str, str], places: Sequence[FirstPlace], slot: int) -> TokenState:
    """The state of a token at `slot` from the field values that it has read."""
    state = TokenState.EXACT
    for place, name in places:
        if place > slot:
            break
        values = seen.get(name)
        if not values or (len(values) == 1 and fields[name] in values):
            continue
        if fields[name] not in values:
            return TokenState.STALE
        state = TokenState.AFTER_EDIT
    return state
