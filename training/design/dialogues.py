"""Policies with edits between turns, written down in three ways.

`under_design`: each edit writes the field and its readers again in place; earlier answers stay as history.
`with_errata`: causal; each edit is a line that says so. `rewritten`: causal; the last values stand in the policy.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, statement
from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario, other_value
from programmable_kv.scenarios.phrasings import PHRASINGS, Phrasing, Split, Stage, phrasing_of, question, update
from programmable_kv.scenarios.vocabulary import Domain
from training.design.lines import runs
from training.design.parts import PLAIN, TURNS, Encoding, TokenSequence, Writer

_STAGES: tuple[Stage, ...] = ("looked_up", "full", "full", "settle")
_GATES = ((1, 2, 3, 4), (11, 7, 1, 1))


@dataclass(frozen=True, slots=True)
class Exchange:
    """Edits, and then a question with its answer under the values of then."""

    edits: tuple[tuple[str, str], ...]
    """(field, new value), each with a wording of it in `said`"""
    said: tuple[str, ...]
    asked: str
    answer: str
    gate: Gate


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A policy and what is asked of it, in turn."""

    scenario: Scenario
    exchanges: tuple[Exchange, ...]
    spare: int
    """positions that a field's place has beyond its longest value"""
    spaced: bool
    """whether the space before a value is a part of it, as where a tokenizer joins the two"""

    @property
    def words(self) -> dict[str, list[str]]:
        """What an author would declare: the group that a field's value is looked up in."""
        return {gate.field: [gate.kind] for gate in self.scenario.gates if gate.kind is not None}

    def possible(self, field: str) -> tuple[str, ...]:
        """Every value that the field may take."""
        gated = [value for gate in self.scenario.gates if gate.field == field for value in gate.actions]
        return tuple(
            {self.scenario.values[field]: 0} | dict.fromkeys((*self.scenario.irrelevant.get(field, ()), *gated))
        )


def training_dialogue(rng: random.Random) -> Dialogue:
    """A policy of 1 to 4 gates among 0 to 40 unrelated rules, and 2 to 6 questions."""
    stage = rng.choice(_STAGES)
    gates = rng.choices(*_GATES)[0]
    two_hop = rng.random() < 0.5 if gates == 1 else None
    fillers = rng.randint(12, 40) if rng.random() < 0.1 else min(12, int(rng.expovariate(1 / 3)))
    scenario = make_scenario(rng, "train", gates=gates, two_hop=two_hop, fillers=fillers, stage=stage)
    turns = rng.choices((2, 3, 4, 5, 6), (5, 5, 4, 2, 1))[0]
    return _dialogue(rng, scenario, phrasing_of("train", stage), turns, edited=0.65)


def held_out_dialogue(
    rng: random.Random, domain: Domain, *, gates: int, two_hop: bool | None, turns: int = 3
) -> Dialogue:
    """A policy of a domain that training never saw; its last question comes after an edit of what decides it."""
    scenario = make_scenario(rng, "held_out", gates=gates, two_hop=two_hop, domain=domain)
    return _dialogue(rng, scenario, PHRASINGS["held_out"], turns, edited=0.6, split="held_out")


def _dialogue(
    rng: random.Random, scenario: Scenario, phrasing: Phrasing, turns: int, *, edited: float, split: Split = "train"
) -> Dialogue:
    values, before = dict(scenario.values), dict(scenario.values)
    exchanges = []
    for turn in range(turns):
        gate = rng.choice(scenario.gates)
        last_of_held_out = split == "held_out" and turn == turns - 1
        edits: list[tuple[str, str]] = []
        if last_of_held_out or ((turn or rng.random() < 0.2) and rng.random() < edited):
            edits = _edits(rng, scenario, gate, values, before, plainly=last_of_held_out)
        before = dict(values)
        values |= edits
        think = split == "train" and rng.random() < 0.06
        asked = question(rng, phrasing, gate.topic, think=think)
        answer = gate.thought(values[gate.field]) if think else gate.actions[values[gate.field]]
        said = tuple(
            statement(DEFAULT_TEMPLATE, *edit) if split == "held_out" else update(rng, phrasing, *edit)
            for edit in edits
        )
        exchanges.append(Exchange(tuple(edits), said, asked, answer, gate))
    return Dialogue(scenario, tuple(exchanges), rng.choice((0, 0, 1, 2)), rng.random() < 0.5)


def _edits(
    rng: random.Random, scenario: Scenario, gate: Gate, values: Mapping[str, str], before: Mapping[str, str], *,
    plainly: bool,
) -> list[tuple[str, str]]:  # fmt: skip
    """One or two changed fields: mostly what decides the next question, else another gate's or one that decides nothing."""
    draw = 0.0 if plainly else rng.random()
    if draw < 0.2 and not plainly and before[gate.field] != values[gate.field]:
        return [(gate.field, before[gate.field])]  # back to what it was
    if draw < 0.62:
        return [(gate.field, other_value(rng, gate, values[gate.field]))]
    if draw < 0.8:
        other = rng.choice(scenario.gates)
        found = [(other.field, rng.choice([value for value in sorted(other.actions) if value != values[other.field]]))]
    else:
        found = []
    idle = sorted(scenario.irrelevant)
    if idle and (not found or rng.random() < 0.3):
        name = rng.choice(idle)
        choices = [value for value in scenario.irrelevant[name] if value != values[name]]
        found += [(name, rng.choice(choices))] if choices else []
    return found


def ask(writer: Writer, encoding: Encoding, asked: str, answer: str, *, learned: bool = True) -> None:
    """A user's question and the assistant's answer; only the answer is learned."""
    chat = encoding.chat
    writer.add(encoding.ids(chat.message("user", asked) + chat.opens["assistant"]), TURNS)
    answer_with(writer, encoding, answer, learned=learned)


def answer_with(writer: Writer, encoding: Encoding, answer: str, *, learned: bool = True) -> None:
    """The assistant's answer, which was opened already, and what stands behind it."""
    writer.add(encoding.ids(answer + encoding.chat.answer_ends), TURNS, learned=learned)
    writer.add(encoding.ids(encoding.chat.between), TURNS)


@dataclass(slots=True)
class _Copy:
    """Where the living copy of a run lies, and how to write another."""

    part: int
    at: int
    indices: range
    fields: frozenset[str] = frozenset()
    ids: tuple[int, ...] = ()


def under_design(dialogue: Dialogue, encoding: Encoding, family: str = "design policies") -> TokenSequence:
    """Fields and readers as parts of their own; an edit writes them again in place."""
    writer = Writer()
    writer.add(encoding.ids(encoding.chat.first), PLAIN)
    fields, readers = _system(writer, dialogue, encoding)
    writer.add(encoding.ids(encoding.chat.closes["system"]), PLAIN)
    for exchange in dialogue.exchanges:
        new = {name: _value_ids(dialogue, encoding, value) for name, value in exchange.edits}
        if new:
            _edit(writer, fields, readers, new)
        ask(writer, encoding, exchange.asked, exchange.answer)
    return writer.finish(family)


def _system(writer: Writer, dialogue: Dialogue, encoding: Encoding) -> tuple[dict[str, _Copy], list[_Copy]]:
    scenario = dialogue.scenario
    fields: dict[str, _Copy] = {}
    readers: list[_Copy] = []
    cut = runs(scenario.prompt, scenario.values, dialogue.words)
    for number, run in enumerate(cut):
        if run.field:
            at, part = writer.position, writer.new_part((PLAIN,))
            indices = writer.add(_value_ids(dialogue, encoding, run.text), part)
            fields[run.field] = _Copy(part, at, indices)
            longest = max(len(_value_ids(dialogue, encoding, value)) for value in dialogue.possible(run.field))
            writer.skip_to(at + longest + dialogue.spare)
            continue
        text = run.text
        if dialogue.spaced and number + 1 < len(cut) and cut[number + 1].field and text.endswith(" "):
            text = text[:-1]
        ids = encoding.ids(text)
        if not run.fields:
            writer.add(ids, PLAIN)
            continue
        related = [reader.part for reader in readers if reader.fields & run.fields]
        part, at = writer.new_part((PLAIN, *(fields[name].part for name in run.fields), *related)), writer.position
        readers.append(_Copy(part, at, writer.add(ids, part), run.fields, ids))
    return fields, readers


def _edit(writer: Writer, fields: dict[str, _Copy], readers: list[_Copy], new: Mapping[str, tuple[int, ...]]) -> None:
    """The fields, their readers, and later readers of what is written again: old copies die, new ones stand in their place."""
    stale: list[_Copy] = []
    for reader in readers:
        if not reader.fields.isdisjoint(new) or any(reader.fields & earlier.fields for earlier in stale):
            stale.append(reader)
    for copy in (*(fields[name] for name in new), *stale):
        writer.kill(copy.indices)
    for name, ids in new.items():
        fields[name].indices = writer.add(ids, fields[name].part, at=fields[name].at)
    for reader in stale:
        reader.indices = writer.add(reader.ids, reader.part, at=reader.at)


def _value_ids(dialogue: Dialogue, encoding: Encoding, value: str) -> tuple[int, ...]:
    return encoding.ids(f" {value}" if dialogue.spaced else value)


def with_errata(dialogue: Dialogue, encoding: Encoding, family: str = "errata policies") -> TokenSequence:
    """Causal: the policy with its first values, and a line for each edit."""
    writer = Writer()
    writer.add(encoding.ids(encoding.chat.system(dialogue.scenario.text())), TURNS)
    for exchange in dialogue.exchanges:
        for line in exchange.said:
            writer.add(encoding.ids(encoding.chat.message("system", line)), TURNS)
        ask(writer, encoding, exchange.asked, exchange.answer)
    return writer.finish(family)


def rewritten(dialogue: Dialogue, encoding: Encoding, family: str = "rewritten policies") -> TokenSequence:
    """Causal: the policy with its last values, below it the same turns. Only answers that they make right are learned."""
    values = dict(dialogue.scenario.values)
    for exchange in dialogue.exchanges:
        values |= exchange.edits
    writer = Writer()
    writer.add(encoding.ids(encoding.chat.system(dialogue.scenario.prompt.format_map(values))), TURNS)
    for exchange in dialogue.exchanges:
        value = values[exchange.gate.field]
        right = exchange.answer in (exchange.gate.actions[value], exchange.gate.thought(value))
        ask(writer, encoding, exchange.asked, exchange.answer, learned=right)
    return writer.finish(family)
