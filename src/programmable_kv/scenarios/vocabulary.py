"""The words of the grammar: domains with their fields, values and actions, and invented names for training.

Which value leads to which action is drawn at random for every scenario, so no word predicts it. Training draws no
held-out name.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from programmable_kv.scenarios.phrasings import Split
from programmable_kv.scenarios.plain_text import documents

KINDS: dict[Split, tuple[str, ...]] = {
    "train": ("class", "group", "category", "bucket", "lane"),
    "held_out": ("band", "shelf"),
}
LABELS: dict[Split, tuple[str, ...]] = {
    "train": ("A", "B", "C", "red", "blue", "one", "two", "north", "south"),
    "held_out": ("K", "M", "R", "ochre", "violet", "eleven", "nine"),
}
# Invented names widen the training vocabulary: a model that has seen thousands of random field
# names copies the one in front of it instead of remembering a list.
WORDS_A = (
    "lane", "pump", "order", "case", "user", "lamp", "gate", "batch", "seat", "file", "route", "plan",
    "score", "phase", "region", "signal", "stage", "shift", "cargo", "team",
)  # fmt: skip
WORDS_B = (
    "state", "kind", "color", "level", "mode", "rank", "flag", "type", "grade", "zone", "size", "code",
)  # fmt: skip
VALUES = (
    "alpha", "beta", "gamma", "delta", "round", "square", "light", "heavy", "early", "late", "fresh",
    "stale", "wet", "sharp", "blunt", "loud", "hidden", "shown", "empty", "filled", "left", "right",
    "upper", "lower", "fast", "slow", "warm", "cold", "linked", "broken", "ready", "parked", "blocked",
    "solid", "liquid", "silver", "copper", "east", "west", "maple", "cedar", "falcon", "otter",
)  # fmt: skip
VERBS = (
    "send", "stop", "check", "move", "open", "close", "mark", "drop", "keep", "raise", "lower", "swap",
    "copy", "sign", "split", "join", "call", "skip", "print", "scan", "hand_over", "flag", "store",
)  # fmt: skip
OBJECTS = (
    "box", "form", "desk", "owner", "crew", "alarm", "price", "token", "door", "line", "record", "note",
    "client", "engine", "label", "queue",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Domain:
    """The vocabulary of one trade: its fields with their values, its actions, and the topics of its requests."""

    name: str
    role: str
    fields: Mapping[str, Sequence[str]]
    actions: Sequence[str]
    topics: Sequence[str]


@cache
def domains(split: Split | Literal["held_out_more"]) -> tuple[Domain, ...]:
    """Return the domains of a split.

    `held_out_more` are held-out domains that were added later. `english()` was filtered without them, so a word that
    training draws may be part of one of their names, but no such word is a whole name.
    """
    text = resources.files(__package__).joinpath("domains.toml").read_text(encoding="utf-8")
    return tuple(Domain(name, **body) for name, body in tomllib.loads(text)[split].items())


def held_out_domains() -> tuple[Domain, ...]:
    """Return all domains that training never saw."""
    return *domains("held_out"), *domains("held_out_more")


def _invented(rng: random.Random, count: int) -> dict[str, Sequence[str]]:
    fields: dict[str, Sequence[str]] = {}
    while len(fields) < count:
        name = f"{rng.choice(WORDS_A)}_{rng.choice(WORDS_B)}"
        draw = rng.random()
        values: list[str]
        if draw < 0.12:
            values = [f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(4)]
            name = rng.choice(("today", "date", "due_date", "arrival_day", name))
        elif draw < 0.2:
            values = [str(rng.randint(1, 90)) for _ in range(4)]
        elif draw < 0.28:
            values = [f"{rng.choice('ABCDEFGH')}{rng.randint(10, 99)}" for _ in range(4)]
        else:
            values = rng.sample(VALUES, 4)
        if len(set(values)) == len(values):
            fields[name] = values
    return fields


def held_out_words() -> frozenset[str]:
    """Return all words of the names of the held-out domains' fields, values and actions, and of held-out groups."""
    groups = {name.lower() for name in (*KINDS["held_out"], *LABELS["held_out"])}
    return _words_of(held_out_domains()) | groups


def _words_of(chosen: Sequence[Domain]) -> frozenset[str]:
    """Return the words of the names of these domains' fields, values and actions."""
    return frozenset(
        word
        for domain in chosen
        for name in (*domain.fields, *(v for values in domain.fields.values() for v in values), *domain.actions)
        for word in re.split(r"[^a-z]+", name.lower())
        if word
    )


@cache
def english() -> tuple[str, ...]:
    """Return the words of the replayed plain text, without the words that occur in a name of the `held_out` domains."""
    found = {word for text in documents("replay") for word in re.findall(r"\b[a-z]{4,10}\b", text)}
    return tuple(sorted(found - _words_of(domains("held_out"))))


def _names(rng: random.Random, words: Sequence[str], count: int) -> list[str]:
    first = [rng.choice(words) for _ in range(count)]
    return [f"{word}_{rng.choice(words)}" if rng.random() < 0.4 else word for word in first]


def draw_vocabulary(
    rng: random.Random, split: Split, wide: bool, chosen: Domain | None, words: Sequence[str] | None = None
) -> tuple[Domain, dict[str, Sequence[str]], list[str]]:
    """Draw a domain, fields with their values, and actions.

    With `wide`, part of the fields and actions are made of random words: `english()`, or `words`, from which a larger
    part is made.
    """
    domain = chosen or rng.choice(domains(split))
    fields = dict(domain.fields)
    actions = list(domain.actions)
    field_share, action_share = (0.3, 0.45) if words is None else (0.5, 0.7)
    drawn_from = english() if words is None else words
    if wide and rng.random() < field_share:
        fields = {f"{a}_{b}": _distinct(_names(rng, drawn_from, 5)) for a, b in
                  (rng.sample(drawn_from, 2) for _ in range(4))}  # fmt: skip
    elif split == "train" and rng.random() < 0.45:
        fields = _invented(rng, 4)
    if wide and rng.random() < action_share:
        actions = _names(rng, drawn_from, 14)
    elif split == "train":
        if rng.random() < 0.35:
            actions = [f"{rng.choice(VERBS)}_{rng.choice(OBJECTS)}" for _ in range(12)]
        elif rng.random() < 0.15:
            actions = [option.replace("_", " ") for option in actions]
    return domain, fields, _distinct(actions)


def other_topics(split: Split, trade: Domain) -> list[str]:
    return sorted({topic for domain in domains(split) for topic in domain.topics} - set(trade.topics))


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))
