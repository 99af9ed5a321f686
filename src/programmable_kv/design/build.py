"""Builds: the ledger of a context under `visibility="design"`, which records from what each part was built.

As in a build system, a part's keys and values are a function of its tokens and of what it has read. A part's *key* is a
digest of exactly that: its tokens and position, and the keys and positions of the parts it read (inside a skill,
positions count from its start). Two parts with the same key have the same keys and values. So a part is exact if its
key equals the one that a full prefill of the text would give it.

A build is immutable. Its operations mirror those of the cache buffer, like those of `ledger.Ledger`.
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
"""A digest of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Built:
    """Slots whose keys and values were built together; `key` is None if it is unknown what they were built from."""

    tokens: int
    key: Key | None
    rounded: bool = False
    """whether it was stored in fewer bits than it was computed in"""


@dataclass(frozen=True, slots=True)
class Build:
    """What the slots contain, in order, and what the author declared about who reads what."""

    built: tuple[Built, ...] = ()
    declared: Declared = field(default_factory=Declared)

    def __len__(self) -> int:
        return sum(one.tokens for one in self.built)

    # -- the buffer's operations ---------------------------------------------------------------------------------------

    def truncated(self, length: int) -> Build:
        """The build without the slots from `length` on."""
        return self._with(self._split(length)[0])

    def shifted(self, start: int, to: int) -> Build:
        """Move the tail from slot `start` to slot `to`. Slots in between are removed, or a gap to compute opens."""
        head, tail = self._split(min(start, to))[0], self._split(start)[1]
        gap = [Built(to - start, None)] if to > start else []
        return self._with([*head, *gap, *tail])

    def inserted(
        self, at: int, skill: Sequence[Unit], *, rounded: bool, replacing: int = 0, declared: Declared | None = None
    ) -> Build:
        """Insert a compiled skill at slot `at`, in place of the `replacing` slots from there on.

        Args:
            rounded: whether the skill was stored in fewer bits.
            declared: the declarations at the time of compiling, in addition to the skill's own.
        """
        compiled = [Built(len(part.span), key, rounded) for part, key in _compiled(skill, declared or Declared())]
        return self._with([*self._split(at)[0], *compiled, *self._split(at + replacing)[1]])

    def exchanged(self, start: int, middle: int, stop: int) -> Build:
        """Swap the adjacent slots [start, middle) and [middle, stop)."""
        head, rest = self._split(start)
        first, rest = _split(rest, middle - start)
        second, tail = _split(rest, stop - middle)
        return self._with([*head, *second, *first, *tail])

    def computed(self, context: Context, spans: Sequence[Span]) -> Build:
        """Record that some slots were computed in one forward, behind what precedes them. They may extend the build.

        `context` may be longer than what has been computed so far; its first slots are those of this build.
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
        """Start slot -> the `Built` that begins there."""
        found, slot = {}, 0
        for one in self.built:
            found[slot] = one
            slot += one.tokens
        return found

    # -- what follows from it ------------------------------------------------------------------------------------------

    def outdated(self, context: Context, kept: Collection[int] = ()) -> list[Span]:
        """The slots that must be recomputed so that every part is built from what precedes it now.

        Args:
            context: the current context, slot for slot as in this build.
            kept: indices of units (turns) that are never recomputed.
        """
        known, found = self._keys(), []
        stand, unrounded = _Keys(context), _Keys(context)
        for part in parts_of(context, self.declared):
            was, now = _found(known, part), stand.of(part)
            # A part computed before the parts that it read were rounded is better than one computed from them now.
            if part.unit not in kept and (now is None or was.key not in (now, unrounded.of(part))):
                found.append(part.span)
                was = Built(len(part.span), now)
            stand.add(part, was)
            unrounded.add(part, replace(was, rounded=False))
        return found

    def parts(self, context: Context) -> Iterator[tuple[DesignPart, TokenState]]:
        """The parts of the current context with their states."""
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
        """The weakest state of any token."""
        return weakest({state for _, state in self.parts(context)})


def _found(known: Mapping[int, Built], part: DesignPart) -> Built:
    """What the slots of a part contain; with an unknown key if they were not built as one piece."""
    here = known.get(part.span.start)
    return here if here is not None and here.tokens == len(part.span) else Built(len(part.span), None)


def _state(was: Built, wanted: Key | None, now: Key | None) -> TokenState:
    if was.key is None or wanted is None:
        return TokenState.STALE
    if was.key == wanted:
        return TokenState.RELOCATED if was.rounded else TokenState.EXACT
    return TokenState.AFTER_EDIT if was.key == now else TokenState.STALE


def _compiled(skill: Sequence[Unit], declared: Declared) -> Iterator[tuple[DesignPart, Key | None]]:
    """The parts of a compiled skill with their keys."""
    alone = Context(tuple(skill))
    keys = _Keys(alone)
    for part in parts_of(alone, declared):
        key = keys.of(part)
        keys.add(part, Built(len(part.span), key))
        yield part, key


class _Read:
    """Digests of what has been built so far in one scope."""

    def __init__(self, before: bytes = b"") -> None:
        self.text: hashlib.blake2b | None = _digest()
        self.text.update(before)
        self.drawn: dict[str, hashlib.blake2b | None] = {}
        """field -> digest of its values and readers so far"""


class _Keys:
    """Computes the keys of a context's parts, from left to right."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._all: hashlib.blake2b | None = _digest()
        self._scopes: dict[Scope, _Read] = {OWN: _Read()}

    def of(self, part: DesignPart) -> Key | None:
        """The key that the next part would get behind what was added so far; None if part of that is unknown."""
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
        """Add the next part, which was built as `built` says."""
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
        """The digests of a scope; a skill's scope begins with what the skill read while it was compiled."""
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
    """What is before a slot, and what is from it on. A `Built` that is cut loses its key."""
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
"""The ledger of a context: a `Build` under `visibility="design"`, else a `Ledger`."""
