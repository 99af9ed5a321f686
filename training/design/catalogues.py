"""Catalogues of tools for training: written by hand, or with names of random words.

The hand-written catalogues (`catalogues.toml`) belong to 32 agents. None is an online shop, because the tools of a retail
agent are the test. Most requests say what a person wants in other words than the tool's own. Tools with names of random
words teach the model to find a tool by its words, and to spell its name.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

_WORDED = (
    ("I need to {verb} the {thing}.", "{Verb} a {thing}."), ("Please {verb} my {thing}.", "{Verb} the {thing} of a customer."),
    ("You want to {verb} your {thing}.", "{Verb} one {thing}."),
    ("Can somebody {verb} this {thing}?", "Does it: {verb} a {thing}."),
    ("The {thing} is what I would like to {verb}.", "For a {thing}: {verb} it."), ("{verb} {thing}", "{verb} {thing}"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CatalogueTool:
    """A tool of a catalogue, and requests that only this tool of its catalogue fits."""

    name: str
    description: str
    parameters: Mapping[str, str]
    requests: tuple[str, ...]


@cache
def hand_written() -> tuple[tuple[CatalogueTool, ...], ...]:
    """Return the tools of each hand-written catalogue."""
    text = resources.files(__package__).joinpath("catalogues.toml").read_text(encoding="utf-8")
    return tuple(
        tuple(
            CatalogueTool(tool["name"], tool["description"], tool["parameters"], tuple(tool["requests"]))
            for tool in body["tools"]
        )
        for body in tomllib.loads(text).values()
    )


def drawn_catalogue(rng: random.Random, count: int) -> list[CatalogueTool]:
    """Draw at most `count` tools of one hand-written catalogue, or of two, of which at least two have requests."""
    catalogues = rng.sample(hand_written(), 2)
    tools = list(catalogues[0])
    if rng.random() < 0.25:
        taken = {tool.name for tool in tools}
        tools = tools[: len(tools) // 2] + [tool for tool in catalogues[1] if tool.name not in taken][: len(tools) // 2]
    asked = rng.sample([tool for tool in tools if tool.requests], 2)
    rest = [tool for tool in tools if tool not in asked]
    found = asked + rng.sample(rest, min(len(rest), max(0, count - 2)))
    rng.shuffle(found)
    return found


def worded_catalogue(rng: random.Random, words: Sequence[str], count: int) -> list[CatalogueTool]:
    """Draw `count` tools whose names are random words: some with the same verb, some with the same thing."""
    verbs = rng.sample(words, max(3, count // 2))
    things = rng.sample(words, max(3, count // 2))
    state = rng.choice(words) if rng.random() < 0.4 else ""
    wish, description = rng.choice(_WORDED)
    found: dict[str, CatalogueTool] = {}
    while len(found) < count:
        verb, thing = rng.choice(verbs), rng.choice(things)
        said = f"{state} {thing}" if state and rng.random() < 0.5 else thing
        name = "_".join([verb, *said.split(" ")])
        told = {"verb": verb, "Verb": verb.capitalize(), "thing": said}
        found[name] = CatalogueTool(name, description.format(**told), {}, (wish.format(**told),))
    return list(found.values())
