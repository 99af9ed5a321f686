"""Rules that declare which pieces of a prompt may change: read from a file, by a pattern or by a path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from programmable_kv.errors import InvalidValueError
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.prompt import ROUTES, Unit

_NAME = re.compile(r"[^\x00-\x1f\x7f\"<>\[\]]{1,80}")
_PATH = re.compile(
    r"(?:system|instructions|(?:messages|input)\[\d+\]\.content)(?:\[\d+\]\.text)?(?:\.text|\.content|\[\d+\])*"
)
_FORM = (
    'Example: {"volatile": [{"name": "clock", "pattern": "Now: (.*)"}, {"name": "memory", "path": "system[1].text"}], '
    '"routes": {"/v1/messages": "observe"}, "learn": true, "share": "declared"}'
)
_PLAIN = re.compile(r"\^?([A-Za-z0-9 :;,=@#%&/_<>'\"!~-]+)")
_LEAST_LITERAL = 3
_MASK = "\x00{}\x00"


class Sharing(StrEnum):
    """Whether a conversation may begin with the system prompt of the tenant's earlier one, if only values differ."""

    NONE = "none"
    """Never."""
    DECLARED = "declared"
    """If the two differ only in declared clocks, or in pieces declared as shared."""
    LEARNED = "learned"
    """Also if learned lines differ, but only in a clock."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One declared piece of a prompt."""

    name: str
    """The value's name in the line that states it."""
    pattern: re.Pattern[str] | None = None
    """Its first group is the value; without a group, the whole match is."""
    path: str = ""
    """Instead of a pattern: the whole text at this path is the value."""
    tell: bool = True
    """Whether a change is stated. False if it is of no use to the model, such as an id for tracing."""
    share: bool | None = None
    """Whether one conversation's value may stay readable in another's system prompt; None: only if it is a clock."""
    literal: str = ""
    """The text with which every match of the pattern begins, as far as that is obvious. It is searched for first."""


@dataclass(frozen=True, slots=True)
class Found:
    """One declared value in a text."""

    rule: Rule
    start: int
    stop: int
    value: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with its declared values replaced by marks."""

    text: str = field(repr=False)
    values: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator declared about the clients' prompts."""

    declared: tuple[Rule, ...] = ()
    routes: Mapping[str, GatewayMode] = field(default_factory=dict)
    """Modes of individual routes."""
    learn: bool = True
    """Whether pieces that were seen to change repeatedly count as declared."""
    sharing: Sharing = Sharing.DECLARED

    def mask(self, unit: Unit, place: str, text: str) -> Masked:
        """A text of a unit with each declared value replaced by a mark.

        Patterns are searched for in what the client wrote (system prompt and user messages), paths everywhere.
        """
        values = _apart(self._found(unit, place, text))
        if not values:
            return Masked(text, ())
        parts: list[str] = []
        at = 0
        for value in values:
            parts += [text[at : value.start], _MASK.format(value.rule.name)]
            at = value.stop
        return Masked("".join([*parts, text[at:]]), values)

    def _found(self, unit: Unit, place: str, text: str) -> Iterable[Found]:
        for rule in self.declared:
            if rule.path:
                if rule.path == unit.paths.get(place):
                    yield Found(rule, 0, len(text), text)
            elif rule.pattern is not None and (unit.head or unit.role == "user"):
                for match in _matches(rule.pattern, rule.literal, text):
                    group = 1 if rule.pattern.groups else 0
                    if match.start(group) >= 0:
                        yield Found(rule, match.start(group), match.end(group), match[group])


def read_rules(path: Path) -> Rules:
    """Read the rules in a file.

    Raises:
        InvalidValueError: the file cannot be read, or its rules are invalid.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidValueError(f"{path} is not JSON: {error}. {_FORM}") from error
    return rules_of(given, path.name)


def rules_of(given: Any, name: str = "the rules") -> Rules:
    """Read rules from parsed JSON.

    Raises:
        InvalidValueError: the rules are invalid.
    """
    if not isinstance(given, Mapping) or not set(given) <= {"volatile", "routes", "learn", "share"}:
        raise InvalidValueError(f"{name}: expected an object with volatile, routes, learn or share. {_FORM}")
    pieces, routes, learn = given.get("volatile", []), given.get("routes", {}), given.get("learn", True)
    if not isinstance(pieces, list) or not isinstance(routes, Mapping) or not isinstance(learn, bool):
        raise InvalidValueError(f"{name}: volatile must be a list, routes an object, and learn true or false. {_FORM}")
    share = given.get("share", Sharing.DECLARED)
    if share not in tuple(Sharing):
        raise InvalidValueError(f"{name}: share must be one of {', '.join(Sharing)}, got {share!r:.90}")
    declared = tuple(_rule(piece, f"{name}, piece {number}") for number, piece in enumerate(pieces, start=1))
    modes = {}
    for route, mode in routes.items():
        if mode not in tuple(GatewayMode) or (GatewayMode(mode).rewrites and route not in ROUTES):
            raise InvalidValueError(
                f"{name}: a route must have one of the modes {', '.join(GatewayMode)}, and only {' and '.join(ROUTES)} can be "
                f"rewritten; got {route!r}: {mode!r}"
            )
        modes[str(route)] = GatewayMode(mode)
    return Rules(declared, modes, learn, Sharing(share))


def _rule(given: Any, where: str) -> Rule:
    if not isinstance(given, Mapping) or not set(given) <= {"name", "pattern", "path", "tell", "share"}:
        raise InvalidValueError(f"{where}: expected an object with name, pattern or path, tell and share. {_FORM}")
    name, pattern, path, tell = given.get("name"), given.get("pattern"), given.get("path"), given.get("tell", True)
    share = given.get("share")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{where}: the name must be up to 80 characters of plain text on one line, got {name!r:.90}"
        )
    if (pattern is None) == (path is None) or not isinstance(tell, bool) or not isinstance(share, bool | None):
        raise InvalidValueError(f"{where}: give a pattern or a path; tell and share must be true or false. {_FORM}")
    if path is not None:
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise InvalidValueError(
                f"{where}: a path must be one such as system[1].text or messages[0].content, got {path!r:.90}"
            )
        return Rule(name, None, path, tell, share)
    if not isinstance(pattern, str):
        raise InvalidValueError(f"{where}: a pattern must be text, got {type(pattern).__name__}")
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise InvalidValueError(f"{where}: the pattern is not a valid regular expression: {error}") from error
    if compiled.groups > 1:
        raise InvalidValueError(
            f"{where}: a pattern may have at most one group, got {compiled.groups}: use (?:...) for others"
        )
    if compiled.match("") is not None and compiled.groups == 0:
        raise InvalidValueError(f"{where}: the pattern matches an empty text, so it would match everywhere")
    return Rule(name, compiled, "", tell, share, literal_of(pattern))


def literal_of(pattern: str) -> str:
    """The text with which every match of a regular expression begins; empty if that is not obvious, or short."""
    found = _PLAIN.match(pattern)
    if found is None or "|" in pattern:
        return ""
    perhaps = pattern[found.end() :][:1] in ("*", "?", "{")  # the last character may be absent
    literal = found[1][:-1] if perhaps else found[1]
    return literal if len(literal) >= _LEAST_LITERAL else ""


def _matches(pattern: re.Pattern[str], literal: str, text: str) -> Iterator[re.Match[str]]:
    """All matches of a pattern. Searching a text for a literal is many times faster than for a pattern."""
    if not literal:
        yield from pattern.finditer(text)
        return
    at = text.find(literal)
    while at >= 0:
        match = pattern.match(text, at)
        if match is not None:
            yield match
        at = text.find(literal, at + 1 if match is None else match.end())


def _apart(found: Iterable[Found]) -> tuple[Found, ...]:
    """The values in order, without overlaps: of two that overlap, the one that begins first is kept."""
    kept: list[Found] = []
    for value in sorted(found, key=lambda each: (each.start, -each.stop)):
        if not kept or value.start >= kept[-1].stop:
            kept.append(value)
    return tuple(kept)
