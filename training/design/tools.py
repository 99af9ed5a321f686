"""Catalogues of invented tools, with each tool as a block, and requests that call for one of the tools."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from programmable_kv.scenarios.phrasings import Split
from training.design.blocks import Blocks, opening
from training.design.catalogues import CatalogueTool, drawn_catalogue, worded_catalogue
from training.design.tool_words import CHANGE, FIND, THINGS, VERBS, Thing, Verb

_SIZES = ((4, 5, 6, 8, 10, 12, 16), (4, 4, 4, 4, 3, 2, 3))
_QUESTIONS = (
    "Which tool fits? Answer with its name.", "Name the tool to call.", "What tool should be called here? Only the name.",
    "Give the name of the right tool and nothing else.", "Tool to use?", "Pick one tool for this. Its name, please.",
    "Which of the tools is the one to call? Say its name.", "Say which single tool you would call.",
    "The name of the function that does it?", "Choose the function for this request, by name.",
)  # fmt: skip
_FRAMES = (
    "A user writes: {wish}\n{question}", "{wish}\n{question}", "Request: {wish} {question}",
    "Message from a guest: {wish}\n{question}",
    "Somebody on the phone: {wish}\n{question}", "\"{wish}\"\n{question}", "{question}\nThe request: {wish}",
)  # fmt: skip
_HELD_OUT_FRAME = "A customer says: {wish}\nWhich one tool does what this customer wants? Reply with its name only."
_SPEAKERS = (
    "You want to {want}.", "I would like to {want}.", "Please help me {want}.", "You wish to {want}.", "I need to {want}.",
    "Can you help me {want}?", "Your goal is to {want}.", "You have decided to {want}.", "I called because I want to {want}.",
)  # fmt: skip
_BEFORE = (
    "You are in a hurry.", "It is about number {number}.", "My name is {name}.", "You have number {number}.",
    "You are {name} and do not remember the number.", "I wrote last week already.", "You are friendly but brief.",
    "Hello!", "You live abroad.",
)  # fmt: skip
_AFTER = (
    "If that does not work, you leave it as it is.", "Thank you.", "You prefer to have it today.", "The number is {number}.",
    "You do not want to pay for it.", "Please confirm by mail.", "You only want this one thing.", "I can wait.",
)  # fmt: skip
_HAND_WRITTEN_SHARE, _WORDED_SHARE = 0.55, 0.2
_NAMES = ("Ana Ruiz", "Jon Berg", "Mei Tan", "Ola Nilsen", "Ravi Shah", "Eva Klein", "Tom Okoro", "Lia Costa")
_PARAMETERS = (
    ("number", "Its number."), ("reason", "Why it is asked for."), ("person", "Name of the person."),
    ("until", "Last day, as year-month-day."), ("comment", "A free text."), ("confirmed_by", "Who agreed."),
    ("amount", "A number with two decimals."), ("channel", "mail, phone or letter."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """An invented tool, and wordings of requests for it."""

    name: str
    description: str
    wants: tuple[str, ...]
    """endings of "I want to ..."; empty for a tool that no request is for"""
    prepares: bool = False
    """whether the tool only looks something up"""
    does: str = ""
    """equal for two tools that a request cannot tell apart, so that a catalogue has only one of them"""


def catalogue(rng: random.Random, split: Split, count: int) -> list[Tool]:
    """Draw tools with different names: several with the same thing, and several with the same verb."""
    things = rng.sample(THINGS[split], rng.randint(2, min(5, len(THINGS[split]))))
    favourite = rng.choice((*VERBS[split], *CHANGE[split]))
    tools: dict[str, Tool] = {}
    while len(tools) < count:
        thing = things[0] if rng.random() < 0.5 else rng.choice(things)
        draw = rng.random()
        if draw < 0.12:
            name, description = rng.choice(FIND[split])
            x = thing.name
            tool = Tool(name.format(x=x), description.format(x=x), (), True, does=name.format(x=x))
        else:
            verb = favourite if draw < 0.3 else rng.choice((*VERBS[split], *CHANGE[split], *CHANGE[split]))
            tool = _tool(rng, verb, thing, changes=verb in CHANGE[split])
        if tool.does not in {other.does for other in tools.values()}:
            tools[tool.name] = tool
    found = list(tools.values())
    rng.shuffle(found)
    return found


def _tool(rng: random.Random, verb: Verb, thing: Thing, *, changes: bool) -> Tool:
    state, says = rng.choice(thing.states) if rng.random() < 0.5 and not verb.prepares else ("", "{it}")
    aspect, said = rng.choice(thing.aspects) if changes else ("", "")
    name = "_".join(word for word in (verb.name, state, thing.name, aspect) if word)
    bare = f"{state} {thing.name}".strip().replace("_", " ")
    article = "an" if bare[0] in "aeiou" else "a"
    description = rng.choice(verb.describe).format(a=f"{article} {bare}", bare=bare, aspect=aspect.replace("_", " "))
    wants = [
        want.format(the=f"{rng.choice(('the', 'your'))} {says.format(it=also)}", said=said)
        for want in verb.wants
        for also in dict.fromkeys(thing.also)
    ]
    does = f"change {bare} {aspect}" if changes else name
    return Tool(name, description, tuple(wants), verb.prepares, does)


def wish(rng: random.Random, wanted: Tool, others: Sequence[Tool], split: Split) -> str:
    """Draw a request for a tool. Something that another tool would look up may come before it."""
    sentences = []
    if rng.random() < 0.5:
        sentences.append(_detail(rng, _BEFORE))
    lookups = [tool for tool in others if tool.prepares and tool.wants]
    if lookups and not wanted.prepares and rng.random() < 0.35:
        sentences.append(_say(rng, rng.choice(lookups), split))
    sentences.append(_say(rng, wanted, split))
    if rng.random() < 0.5:
        sentences.append(_detail(rng, _AFTER))
    return " ".join(sentences)


def _say(rng: random.Random, tool: Tool, split: Split) -> str:
    speaker = _SPEAKERS[0] if split == "held_out" else rng.choice(_SPEAKERS)
    return speaker.format(want=rng.choice(tool.wants))


def _detail(rng: random.Random, sentences: Sequence[str]) -> str:
    number = f"{rng.choice('#NRTV')}{rng.randint(1000, 99999)}"
    return rng.choice(sentences).format(number=number, name=rng.choice(_NAMES))


def training_tools(rng: random.Random, words: Sequence[str] | None = None) -> Blocks:
    """Draw four to sixteen tools in random order, in one of several formats, and one to four requests.

    Some of the catalogues are hand-written, some have names of random words if `words` are given, and some are
    combinations of the verbs and things in `tool_words.py`.
    """
    count, draw = rng.choices(*_SIZES)[0], rng.random()
    turns = rng.choices((1, 2, 3, 4), (1, 3, 3, 2))[0]
    style = rng.choices(("json", "function", "line", "heading"), (6, 2, 2, 1))[0]
    if draw < _HAND_WRITTEN_SHARE:
        pieces, asked = _of_catalogue(rng, drawn_catalogue(rng, count), turns, style)
    elif words and draw < _HAND_WRITTEN_SHARE + _WORDED_SHARE:
        pieces, asked = _of_catalogue(rng, worded_catalogue(rng, words, count), turns, style)
    else:
        tools = catalogue(rng, "train", count)
        pieces = [written(rng, tool, style) for tool in tools]
        wants = [_wanted(rng, tools, always_acts=False) for _ in range(turns)]
        asked = [(_asked(rng, wish(rng, tool, tools, "train")), tool.name) for tool in wants]
    before = opening(rng, "train", rng.randint(0, 16) if rng.random() < 0.5 else 0)
    if rng.random() < 0.3:
        before = rng.choice(
            ("You have these tools:\n", "Tools:\n", "# Functions\n", "You help customers. Your tools:\n\n")
        )
    return Blocks(before, tuple(pieces), tuple(asked))


def _of_catalogue(
    rng: random.Random, tools: Sequence[CatalogueTool], turns: int, style: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """Write the tools as blocks, and draw requests with their answers."""
    pieces = [described(tool.name, tool.description, tool.parameters or _parameters(rng), style) for tool in tools]
    requested = [tool for tool in tools if tool.requests]
    wanted = [rng.choice(requested) for _ in range(turns)]
    return pieces, [(_asked(rng, rng.choice(tool.requests)), tool.name) for tool in wanted]


def _asked(rng: random.Random, said: str) -> str:
    return rng.choice(_FRAMES).format(wish=said, question=rng.choice(_QUESTIONS))


def held_out_tools(rng: random.Random, count: int) -> Blocks:
    """Draw `count` tools with verbs and things that training never saw, and a request for a tool that acts."""
    tools = catalogue(rng, "held_out", count)
    wanted = _wanted(rng, tools, always_acts=True)
    asked = _HELD_OUT_FRAME.format(wish=wish(rng, wanted, tools, "held_out"))
    pieces = tuple(written(rng, tool, "json") for tool in tools)
    return Blocks(opening(rng, "held_out", 12), pieces, ((asked, wanted.name),))


def _wanted(rng: random.Random, tools: Sequence[Tool], *, always_acts: bool) -> Tool:
    asked_for = [tool for tool in tools if tool.wants]
    acting = [tool for tool in asked_for if not tool.prepares]
    return rng.choice(acting if acting and (always_acts or rng.random() < 0.85) else asked_for)


def written(rng: random.Random, tool: Tool, style: str) -> str:
    """Write a tool as a block of text, with random parameters."""
    return described(tool.name, tool.description, _parameters(rng), style)


def _parameters(rng: random.Random) -> dict[str, str]:
    return dict(rng.sample(_PARAMETERS, rng.randint(1, 3)))


def described(name: str, description: str, parameters: Mapping[str, str], style: str) -> str:
    """Write a tool as a block of text."""
    typed = {parameter: {"type": "string", "description": text} for parameter, text in parameters.items()}
    body = {"name": name, "description": description, "parameters": typed}
    if style == "json":
        return json.dumps(body) + "\n"
    if style == "function":
        body["parameters"] = {"type": "object", "properties": typed, "required": list(typed)}
        return json.dumps({"type": "function", "function": body}) + "\n"
    if style == "line":
        return f"- {name}({', '.join(parameters)}): {description}\n"
    return f"## {name}\n{description}\nArguments: {', '.join(parameters)}\n"
