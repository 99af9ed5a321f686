"""Policies with edits between turns, written in three ways.

`under_design`: each edit rewrites the field and its readers in place; earlier answers stay as history.
`with_errata`: causal; each edit is a line that states it. `rewritten`: causal; the policy has the last values.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    """Edits, and then a question with its answer under the values at that time."""

    edits: tuple[tuple[str, str], ...]
    """(field, new value)"""
    said: tuple[str, ...]
    """for each edit, a line that states it"""
    asked: str
    answer: str
    gate: Gate


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A policy and the exchanges about it, in order."""

    scenario: Scenario
    exchanges: tuple[Exchange, ...]
    spare: int
    """how many positions are reserved for a field beyond its longest value"""
    spaced: bool
    """whether the space before a value belongs to the value's part, as when a tokenizer joins the two"""

    @property
    def words(self) -> dict[str, list[str]]:
        """The words that an author would declare: the kind of group in which a field's value is looked up."""
        return {gate.field: [gate.kind] for gate in self.scenario.gates if gate.kind is not None}

    def possible(self, field: str) -> tuple[str, ...]:
        """Return all values that the field may take."""
        gated = [value for gate in self.scenario.gates if gate.field == field for value in gate.actions]
        return tuple(
            {self.scenario.values[field]: 0} | dict.fromkeys((*self.scenario.irrelevant.get(field, ()), *gated))
        )


def training_dialogue(rng: random.Random, words: Sequence[str] | None = None) -> Dialogue:
    """Draw a policy of 1 to 4 gates among 0 to 40 unrelated rules, and 2 to 6 questions. `words`: see `make_scenario`."""
    stage = rng.choice(_STAGES)
    gates = rng.choices(*_GATES)[0]
    two_hop = rng.random() < 0.5 if gates == 1 else None
    fillers = rng.randint(12, 40) if rng.random() < 0.1 else min(12, int(rng.expovariate(1 / 3)))
    scenario = make_scenario(rng, "train", gates=gates, two_hop=two_hop, fillers=fillers, stage=stage, words=words)
    turns = rng.choices((2, 3, 4, 5, 6), (5, 5, 4, 2, 1))[0]
    return _dialogue(rng, scenario, phrasing_of("train", stage), turns, edited=0.65)


def held_out_dialogue(
    rng: random.Random, domain: Domain, *, gates: int, two_hop: bool | None, turns: int = 3
) -> Dialogue:
    """Draw a policy from a domain that training never saw. An edit of the deciding field precedes its last question."""
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
    """Draw one or two edits: mostly of the field that decides the next question, else of another gate or of no gate."""
    draw = 0.0 if plainly else rng.random()
    if draw < 0.2 and not plainly and before[gate.field] != values[gate.field]:
        return [(gate.field, before[gate.field])]  # back to the earlier value
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
    """Write a user's question and the assistant's answer. Only the answer is learned."""
    chat = encoding.chat
    writer.add(encoding.ids(chat.message("user", asked) + chat.opens["assistant"]), TURNS)
    answer_with(writer, encoding, answer, learned=learned)


def answer_with(writer: Writer, encoding: Encoding, answer: str, *, learned: bool = True) -> None:
    """Write the answer of an assistant message that is already open, and the text between it and the next message."""
    writer.add(encoding.ids(answer + encoding.chat.answer_ends), TURNS, learned=learned)
    writer.add(encoding.ids(encoding.chat.between), TURNS)


@dataclass(slots=True)
class _Copy:
    """The living copy of a run, and what is needed to write another copy."""

    part: int
    at: int
    indices: range
    fields: frozenset[str] = frozenset()
    ids: tuple[int, ...] = ()


def under_design(dialogue: Dialogue, encoding: Encoding, family: str = "design policies") -> TokenSequence:
    """Write a dialogue with fields and readers as separate parts. An edit rewrites them in place."""
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
    """Rewrite the fields, their readers, and later readers of these. Old copies die; new ones get their positions."""
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
    """Write a causal dialogue: the policy with its first values, and a line for each edit."""
    writer = Writer()
    writer.add(encoding.ids(encoding.chat.system(dialogue.scenario.text())), TURNS)
    for exchange in dialogue.exchanges:
        for line in exchange.said:
            writer.add(encoding.ids(encoding.chat.message("system", line)), TURNS)
        ask(writer, encoding, exchange.asked, exchange.answer)
    return writer.finish(family)


def rewritten(dialogue: Dialogue, encoding: Encoding, family: str = "rewritten policies") -> TokenSequence:
    """Write a causal dialogue: the policy with its last values, then the same turns.

    Only answers that are right under the last values are learned.
    """
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
