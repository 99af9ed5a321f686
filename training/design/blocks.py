"""Rule sets, facts and updates: texts that are compiled alone (each reads only itself) or in one causal piece."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, statement
from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario, other_value
from programmable_kv.scenarios.phrasings import FILLERS, PHRASINGS, Split, phrasing_of, question, update
from programmable_kv.scenarios.vocabulary import OBJECTS, VALUES, WORDS_A, Domain, draw_vocabulary
from training.design.dialogues import answer_with, ask
from training.design.parts import PLAIN, TURNS, Encoding, TokenSequence, Writer

TITLES = ("Rules of the house:\n", "What applies here:\n", "Notes for every case:\n", "# Handbook\n", "Guidelines\n")
HELD_OUT_TITLE = "House rules:\n"
_FOUND = ("Here is what I found:\n", "The lookup returned:\n", "Please read this:\n")


@dataclass(frozen=True, slots=True)
class Blocks:
    """An opening, the blocks of text after it, and questions about them."""

    opening: str
    pieces: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]
    """(question, answer)"""
    found: str = ""
    """if given, the blocks are in the first question, after these words"""


def write(blocks: Blocks, encoding: Encoding, family: str, *, alone: bool) -> TokenSequence:
    """Write the blocks, each compiled alone or all in one causal piece."""
    writer, chat = Writer(), encoding.chat
    plain = PLAIN if alone else TURNS
    writer.add(encoding.ids(chat.first + (chat.last(blocks.opening) if blocks.found else blocks.opening)), plain)
    first, *others = blocks.asked
    if blocks.found:
        writer.add(encoding.ids(chat.closes["system"]), plain)
        writer.add(encoding.ids(chat.opens["user"] + blocks.found), TURNS)
    pieces = blocks.pieces if blocks.found else (*blocks.pieces[:-1], chat.last(blocks.pieces[-1]))
    for piece in pieces:
        writer.add(encoding.ids(piece), writer.new_part() if alone else TURNS)
    if blocks.found:
        writer.add(encoding.ids(first[0] + chat.closes["user"] + chat.opens["assistant"]), TURNS)
        answer_with(writer, encoding, first[1])
    else:
        writer.add(encoding.ids(chat.closes["system"]), plain)
        ask(writer, encoding, *first)
    for asked, answer in others:
        ask(writer, encoding, asked, answer)
    return writer.finish(family)


def opening(rng: random.Random, split: Split, fillers: int) -> str:
    """Draw a title, `fillers` rules about which no question is asked, and perhaps an empty line."""
    if split == "held_out":
        lines = [FILLERS[split][i % len(FILLERS[split])] for i in range(fillers)]
        return HELD_OUT_TITLE + "".join(f"{line}\n" for line in lines) + "\n"
    idle = [
        f"If the {rng.choice(WORDS_A)} is {rng.choice(VALUES)}, tell the {rng.choice(OBJECTS)} team." for _ in range(6)
    ]
    lines = rng.sample([*FILLERS[split], *idle], fillers)
    bullet = rng.choice(("", "", "- "))
    return rng.choice(TITLES) + "".join(f"{bullet}{line}\n" for line in lines) + rng.choice(("\n", ""))


def training_rule_sets(rng: random.Random, words: Sequence[str] | None = None) -> Blocks:
    """Draw one to eight sets of rules, some of them with two hops or as whole policies, and one to four questions."""
    pieces = rng.choices((1, 2, 3, 4, 5, 6, 7, 8), (2, 5, 5, 3, 3, 4, 1, 1))[0]
    whole = rng.random() < 0.12
    scenarios: list[Scenario] = []
    taken: set[str] = set()
    for _ in range(60):
        one = make_scenario(
            rng, "train", gates=1, two_hop=rng.random() < 0.2, fillers=rng.randint(0, 3) if whole else 0,
            gated_values=2 if rng.random() < 0.6 else None, stage=rng.choice(("looked_up", "full")), words=words,
        )  # fmt: skip
        gate = one.gates[0]
        if taken.isdisjoint((gate.topic, gate.field)):
            taken |= {gate.topic, gate.field}
            scenarios.append(one)
        if len(scenarios) == (min(pieces, 4) if whole else pieces):
            break
    form = _form(rng) if rng.random() < 0.5 else None
    texts = [f"{one.text()}\n" if whole else rule_set(one, form or _form(rng)) for one in scenarios]
    phrasing = phrasing_of("train")
    if whole:  # the rules of a whole policy do not name the topic
        texts = [f"About {one.gates[0].topic}.\n{text}" for one, text in zip(scenarios, texts, strict=True)]
    chosen = [rng.choice(scenarios) for _ in range(rng.choices((1, 2, 3, 4), (2, 4, 2, 1))[0])]
    asked = [(question(rng, phrasing, one.gates[0].topic, think=False), _answer(one)) for one in chosen]
    fillers = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(0, 4)
    found = rng.choice(_FOUND) if rng.random() < 0.2 else ""
    return Blocks(opening(rng, "train", fillers), tuple(texts), tuple(asked), found)


def held_out_rule_sets(rng: random.Random, domains: Sequence[Domain]) -> Blocks:
    """Draw a rule set for each domain, in random order, and a question about the first domain's set."""
    sets = [
        make_scenario(rng, "held_out", domain=domain, gates=1, two_hop=False, fillers=0, gated_values=2)
        for domain in domains
    ]
    texts = [rule_set(one, "If {field} is {value}, {action}.") for one in sets]
    rng.shuffle(texts)
    asked = question(rng, PHRASINGS["held_out"], sets[0].gates[0].topic, think=False)
    return Blocks(opening(rng, "held_out", 12), tuple(texts), ((asked, _answer(sets[0])),))


def rule_set(scenario: Scenario, form: str) -> str:
    """Write the field's value, the lookups if there are groups, and the rules about one topic."""
    gate = scenario.gates[0]
    lines = [f"{gate.field}: {scenario.values[gate.field]}"]
    if gate.groups is None:
        rules = [(gate.field, value, action) for value, action in gate.actions.items()]
    else:
        lines += [f"{gate.field} {value} belongs to {gate.kind} {group}." for value, group in gate.groups.items()]
        by_group = {group: gate.actions[value] for value, group in gate.groups.items()}
        rules = [(str(gate.kind), group, action) for group, action in by_group.items()]
    lines += [f"For {gate.topic}: {form.format(field=name, value=v, action=action)}" for name, v, action in rules]
    return "".join(f"{line}\n" for line in lines)


def _form(rng: random.Random) -> str:
    return "If {field} is {value}, {action}." if rng.random() < 0.5 else rng.choice(PHRASINGS["train"].rules)


def _answer(scenario: Scenario) -> str:
    return _of(scenario.gates[0], scenario.values)


def _of(gate: Gate, values: object) -> str:
    return gate.actions[values[gate.field]]  # type: ignore[index]


_SAY = (
    "{field} of {case}: {value}\n", "Case {case} has {field} {value}.\n", "{case} shows {value} as its {field}.\n",
    "In case {case}, {field} equals {value}.\n", "File {case}: {field} = {value}\n", "We noted {field} {value} for {case}.\n",
    "case {case} | {field} | {value}\n", "{value} is what case {case} has under {field}.\n",
)  # fmt: skip
_ASK = (
    "Tell me the {field} of {case}, the value only.", "{field} of case {case}?", "Which {field} does case {case} have?",
    "Look up case {case}: {field}. One value, please.", "I need {field} for {case}. Give the value and nothing else.",
    "Read out the {field} that {case} has.",
)  # fmt: skip
_HELD_OUT_SAY = "The {field} of case {case} is {value}.\n"
_HELD_OUT_ASK = "What is the {field} of case {case}? Reply with the value only."


def training_facts(rng: random.Random, words: Sequence[str] | None = None) -> Blocks:
    """Draw facts about two to six cases, of which the last may be in the opening, and questions about some of them."""
    _, fields, _ = draw_vocabulary(rng, "train", words is not None or rng.random() < 0.6, None, words)
    names = rng.sample(sorted(fields), rng.choice((1, 1, 2)))
    say = rng.choice(_SAY)
    cases = _cases(rng, rng.randint(2, 6))
    facts = [(name, case, rng.choice(list(fields[name]))) for case in cases for name in names]
    facts = rng.sample(facts, min(len(facts), 6))
    texts = [say.format(field=name, case=case, value=value) for name, case, value in facts]
    before = opening(rng, "train", rng.randint(0, 12))
    alone = len(texts) - 1 if rng.random() < 0.6 else len(texts)
    before += "".join(texts[alone:])
    chosen = [rng.choice(facts) for _ in range(rng.randint(1, 3))]
    asked = [(rng.choice(_ASK).format(field=name, case=case), value) for name, case, value in chosen]
    return Blocks(before, tuple(texts[:alone]), tuple(asked))


def held_out_facts(rng: random.Random, domain: Domain) -> Blocks:
    """Draw a fact about another case, in the opening, and a fact about the case in question, as a block."""
    field = rng.choice(sorted(domain.fields))
    value, other = rng.sample(list(domain.fields[field]), 2)
    case, another = _cases(rng, 2)
    say = _HELD_OUT_SAY.format
    before = opening(rng, "held_out", 12) + say(field=field, case=another, value=other)
    asked = _HELD_OUT_ASK.format(field=field, case=case)
    return Blocks(before, (say(field=field, case=case, value=value),), ((asked, value),))


def _cases(rng: random.Random, count: int) -> list[str]:
    letters = rng.sample("ABCDEFGHKMPRT", count)
    if rng.random() < 0.3:
        letters = [letters[0]] * count
    digits = rng.sample(range(100, 9999), count)
    return [f"{letter}{number}" for letter, number in zip(letters, digits, strict=True)]


def training_updates(rng: random.Random, words: Sequence[str] | None = None) -> Blocks:
    """Draw a policy, in the opening, and one to four updates of its fields, as blocks. A field's last update counts."""
    gates = rng.choice((1, 1, 1, 2))
    fillers = min(12, int(rng.expovariate(1 / 3)))
    scenario = make_scenario(
        rng, "train", gates=gates, fillers=fillers, stage=rng.choice(("looked_up", "full")), words=words
    )
    phrasing, values = phrasing_of("train"), dict(scenario.values)
    lines = []
    for _ in range(rng.choices((1, 2, 3, 4), (2, 5, 2, 1))[0]):
        gate = rng.choice(scenario.gates)
        values[gate.field] = other_value(rng, gate, values[gate.field])
        lines.append(update(rng, phrasing, gate.field, values[gate.field]) + "\n")
    chosen = [rng.choice(scenario.gates) for _ in range(rng.randint(1, 2))]
    asked = [(question(rng, phrasing, gate.topic, think=False), _of(gate, values)) for gate in chosen]
    return Blocks(scenario.text() + "\n\n", tuple(lines), tuple(asked))


def held_out_updates(rng: random.Random, domain: Domain) -> Blocks:
    """Draw a policy, in the opening, and two updates of its field in the library's default wording."""
    scenario = make_scenario(rng, "held_out", domain=domain, gates=1)
    (gate,) = scenario.gates
    last = rng.choice(sorted(gate.actions))
    first = other_value(rng, gate, last)
    lines = tuple(statement(DEFAULT_TEMPLATE, gate.field, value) + "\n" for value in (first, last))
    asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
    before = opening(rng, "held_out", 12) + scenario.text() + "\n\n"
    return Blocks(before, lines, ((asked, gate.actions[last]),))
