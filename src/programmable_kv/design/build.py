"""What was built from what: the ledger of a context under `visibility="design"`.

Each part's keys and values are a function of its tokens and of what it has read, as in a build system. A part's *key* is a
digest of just that: its tokens, and the keys and distances of the parts it read. Two parts of one key hold the same numbers.
So a part is exact if its key is the one that a full prefill of the text would give it. Nothing is marked by hand.

A build is immutable. Its operations mirror those of the cache buffer, as those of `ledger.Ledger` do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared
from programmable_kv.design.parts import OWN, DesignPart, PartKind, Scope, parts_of
from programmable_kv.ledger.ledger import Ledger, Stretch
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.units import Unit
from programmable_kv.states import TokenState, weakest

_DIGEST_BYTES = 16
_ROUNDED = b"rounded"

Key = bytes
"""a digest of 16 bytes"""


@dataclass(frozen=True, slots=True)
class Built:
    """Slots whose keys and values were built together; `key` is None where it is not known from what."""

    tokens: int
    key: Key | None
    rounded: bool = False
    """kept in fewer bits than it was computed in"""


@dataclass(frozen=True, slots=True)
class Build:
    """What stands in the slots, in order, and what was declared of who reads what."""

    built: tuple[Built, ...] = ()
    declared: Declared = field(default_factory=Declared)

    def __len__(self) -> int:
        return sum(one.tokens for one in self.built)

    # -- the buffer's operations ---------------------------------------------------------------------------------------

    def truncated(self, length: int) -> Build:
        """Without the slots from `length` on."""
        return self._with(self._split(length)[0])

    def shifted(self, start: int, to: int) -> Build:
        """The tail from slot `start` goes to slot `to`; what lay between is gone, or a gap opens that has to be computed."""
        head, tail = self._split(min(start, to))[0], self._split(start)[1]
        gap = [Built(to - start, None)] if to > start else []
        return self._with([*head, *gap, *tail])

    def inserted(
        self, at: int, skill: Sequence[Unit], *, rounded: bool, replacing: int = 0, declared: Declared | None = None
    ) -> Build:
        """A compiled skill in the place of the `replacing` slots from `at` on.

        Args:
            rounded: it was kept in fewer bits.
            declared: what held when it was compiled, beside what it declares itself.
        """
        compiled = [Built(len(part.span), key, rounded) for part, key in _compiled(skill, declared or Declared())]
        return self._with([*self._split(at)[0], *compiled, *self._split(at + replacing)[1]])

    def exchanged(self, start: int, middle: int, stop: int) -> Build:
        """[start, middle) and [middle, stop) change places."""
        head, rest = self._split(start)
        first, rest = _split(rest, middle - start)
        second, tail = _split(rest, stop - middle)
        return self._with([*head, *second, *first, *tail])

    def computed(self, context: Context, spans: Sequence[Span]) -> Build:
        """Some slots were computed, in one forward, on what stands before them then. They may extend the build.

        `context` may be longer than what was computed so far; its first slots are those of this build.
        """
        length = max([len(self), *(span.stop for span in spans)])
        known = self._keys()
        keys = _Keys(context)
        made: list[Built] = []
        for part in parts_of(context, self.declared):
            tokens = min(part.span.stop, length) - part.span.start
            if tokens <= 0:
                break
            one = Built(tokens, keys.of(part))
            if tokens < len(part.span) or not any(_within(part.span, span) for span in spans):
                one = _found(known, part) if tokens == len(part.span) else Built(tokens, None)
            keys.add(part, one)
            made.append(one)
        return self._with(made)

    def _with(self, built: Iterable[Built]) -> Build:
        return replace(self, built=tuple(one for one in built if one.tokens))

    def _split(self, at: int) -> tuple[list[Built], list[Built]]:
        return _split(self.built, at)

    def _keys(self) -> dict[int, Built]:
        """What stands at each slot at which something begins."""
        found, slot = {}, 0
        for one in self.built:
            found[slot] = one
            slot += one.tokens
        return found

    # -- what follows from it ------------------------------------------------------------------------------------------

    def outdated(self, context: Context, kept: Collection[int] = ()) -> list[Span]:
        """The slots that have to be computed so that every part is built from what stands before it now.

        Args:
            context: as it is now, slot for slot as this build.
            kept: units of the context, turns, that stay as they are in any case.
        """
        known, found = self._keys(), []
        stand, unrounded = _Keys(context), _Keys(context)
        for part in parts_of(context, self.declared):
            was, now = _found(known, part), stand.of(part)
            # What was computed before the parts that it read were rounded is better than what would be computed now.
            if part.unit not in kept and (now is None or was.key not in (now, unrounded.of(part))):
                found.append(part.span)
                was = Built(len(part.span), now)
            stand.add(part, was)
            unrounded.add(part, replace(was, rounded=False))
        return found

    def parts(self, context: Context) -> Iterator[tuple[DesignPart, TokenState]]:
        """The parts of the context now, and how each can be trusted."""
        known, stand, true = self._keys(), _Keys(context), _Keys(context)
        for part in parts_of(context, self.declared):
            was, wanted, now = _found(known, part), true.of(part), stand.of(part)
            true.add(part, Built(len(part.span), wanted))
            stand.add(part, was)
            yield part, _state(was, wanted, now)

    def stretches(self, context: Context) -> Iterator[Stretch]:
        """The states of all slots, in order."""
        for part, state in self.parts(context):
            yield Stretch(part.span, state)

    def weakest(self, context: Context) -> TokenState:
        """The state of all tokens taken together."""
        return weakest({state for _, state in self.parts(context)})


def _found(known: Mapping[int, Built], part: DesignPart) -> Built:
    """What stands in the slots of a part; of unknown make if that is not one piece."""
    here = known.get(part.span.start)
    return here if here is not None and here.tokens == len(part.span) else Built(len(part.span), None)


def _state(was: Built, wanted: Key | None, now: Key | None) -> TokenState:
    if was.key is None or wanted is None:
        return TokenState.STALE
    if was.key == wanted:
        return TokenState.RELOCATED if was.rounded else TokenState.EXACT
    return TokenState.AFTER_EDIT if was.key == now else TokenState.STALE


def _compiled(skill: Sequence[Unit], declared: Declared) -> Iterator[tuple[DesignPart, Key | None]]:
    """The parts of a compiled skill, and their keys."""
    alone = Context(tuple(skill))
    keys = _Keys(alone)
    for part in parts_of(alone, declared):
        key = keys.of(part)
        keys.add(part, Built(len(part.span), key))
        yield part, key


class _Read:
    """What was built so far of one scope."""

    def __init__(self, before: bytes = b"") -> None:
        self.text: hashlib.blake2b | None = _digest()
        self.text.update(before)
        self.drawn: dict[str, hashlib.blake2b | None] = {}
        """field -> its values and readers so far"""


class _Keys:
    """The keys of a context's parts, from left to right."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._all: hashlib.blake2b | None = _digest()
        self._scopes: dict[Scope, _Read] = {OWN: _Read()}

    def of(self, part: DesignPart) -> Key | None:
        """The key of the next part, if it were built on what was added so far; None if it is not known what that is."""
        scope = self._scope(part.scope)
        read = self._all if part.kind is PartKind.TURN else scope.text
        if read is None:
            return None
        digest = read.copy()
        if part.kind is PartKind.READER:
            for name in sorted(part.fields & scope.drawn.keys()):
                drawn = scope.drawn[name]
                if drawn is None:
                    return None
                digest.update(b"field" + drawn.digest())
        digest.update(b"at" + _number(_within_scope(part)) + b"tokens" + self._context.packed(part.span))
        return digest.digest()

    def add(self, part: DesignPart, built: Built) -> None:
        """The part stands there, built so."""
        key, rounded = built.key, built.rounded
        self._all = _extended(self._all, part.position, key, rounded=rounded)
        scope, position = self._scope(part.scope), _within_scope(part)
        if part.kind is PartKind.TEXT:
            scope.text = _extended(scope.text, position, key, rounded=rounded)
        elif part.kind in (PartKind.VALUE, PartKind.READER):
            for name in part.fields:
                scope.drawn[name] = _extended(scope.drawn.get(name, _digest()), position, key, rounded=rounded)
        if part.scope.open:
            own = self._scopes[OWN]
            own.text = _extended(own.text, part.position, key, rounded=rounded)

    def _scope(self, scope: Scope) -> _Read:
        """What was built of a scope; of a skill that begins here, what it read while it was compiled."""
        if scope not in self._scopes:
            self._scopes[scope] = _Read(b"".join(map(_number, self._context.units[scope.skill].read)))
        return self._scopes[scope]


def _within_scope(part: DesignPart) -> int:
    """The part's position in its scope. Distances inside a skill do not change when it moves."""
    return part.position - part.scope.position


def _digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def _extended(
    digest: hashlib.blake2b | None, number: int, key: Key | None, *, rounded: bool = False
) -> hashlib.blake2b | None:
    if digest is None or key is None:
        return None
    longer = digest.copy()
    longer.update(_number(number) + key + (_ROUNDED if rounded else b""))
    return longer


def _number(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _within(part: Span, span: Span) -> bool:
    return span.start <= part.start and part.stop <= span.stop


def _split(built: Sequence[Built], at: int) -> tuple[list[Built], list[Built]]:
    """Before a slot, and from it on. What is cut apart is no longer known."""
    head: list[Built] = []
    for index, one in enumerate(built):
        if at <= 0:
            return head, list(built[index:])
        if one.tokens > at:
            return [*head, Built(at, None)], [Built(one.tokens - at, None), *built[index + 1 :]]
        head.append(one)
        at -= one.tokens
    return head, []


AnyLedger = Ledger | Build
"""what a context's cached tokens have read: a `Build` where visibility is by design"""
