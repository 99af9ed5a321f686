"""Questions about spliced pieces. The right answer is known and is stated in the pieces.

The kinds are held-out policies, facts, several sets of rules at once, two updates of one field, and two that show the
limits of splicing: a *coupled* policy, whose facts are outside the piece, and a two-hop lookup that is *split* over two
pieces. All are about domains that the embedded model never saw in training; sets and lookups are worded as in training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from programmable_kv.lab.composing.frame import TITLE, other_lines
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, statement
from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario, other_value
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import Domain, held_out_domains
from programmable_kv.skills.draft import Preface

SEED = 99_000
MOST_PIECES = 6
PREFACE_RULES = 4


@dataclass(frozen=True, slots=True)
class Task:
    """A question about pieces of text that are compiled separately. `shared` is computed in place before them.

    `prefaces` has one entry for each piece or none at all: what the piece may read while it is compiled.
    """

    kind: str
    domain: str
    pieces: tuple[str, ...]
    request: str
    options: tuple[str, ...]
    right: frozenset[str]
    shared: str = ""
    prefaces: tuple[Preface, ...] = ()


def policies(count: int) -> Iterator[Task]:
    """Whole policies, each of them one piece. A preface contains another policy."""
    trades = held_out_domains()
    for number, domain in _domains(count):
        rng, scenario, gate = _drawn("policy", number, domain)
        _, stranger, _ = _drawn("stranger", number, trades[(number + 1) % len(trades)])
        task = _task("policy", rng, scenario, gate, (scenario.text() + "\n",))
        yield replace(task, prefaces=_behind(task, stranger.text() + "\n"))


def coupled(count: int) -> Iterator[Task]:
    """Policies whose facts are outside the piece: its rules never read them, except in a preface."""
    for number, domain in _domains(count):
        rng, scenario, gate = _drawn("policy", number, domain)
        role, facts, rules = scenario.text().split("\n\n", 2)
        task = _task("coupled", rng, scenario, gate, (rules + "\n",), shared=f"{role}\n\n{facts}\n\n")
        yield replace(task, prefaces=_behind(task, task.shared))


def facts(count: int) -> Iterator[Task]:
    """One fact about a case. A fact about another case precedes it, and the preface has one about a third case."""
    for number, domain in _domains(count):
        rng = random.Random(f"{SEED}/fact/{number}")
        field = rng.choice(sorted(domain.fields))
        value, other = rng.sample(list(domain.fields[field]), 2)
        case, another = rng.sample([f"{letter}{rng.randint(1000, 9999)}" for letter in "ABCDEF"], 2)
        say = "The {field} of case {case} is {value}.\n"
        third = say.format(field=field, case=f"G{rng.randint(1000, 9999)}", value=other)
        task = Task(
            "fact", domain.name, (say.format(field=field, case=case, value=value),),
            f"What is the {field} of case {case}? Reply with the value only.",
            tuple(domain.fields[field]), frozenset({value}), say.format(field=field, case=another, value=other),
        )  # fmt: skip
        yield replace(task, prefaces=_behind(task, third))


def several(count: int, pieces: int) -> Iterator[Task]:
    """Several sets of rules of different domains, each of them one piece. The request is about one of them.

    The options are every set's actions. A task with more pieces contains the sets of the task with fewer. A preface
    contains a set of yet another domain.
    """
    trades = held_out_domains()
    for number, first in _domains(count):
        rng = random.Random(f"{SEED}/several/{number}")
        chosen = [first, *rng.sample([trade for trade in trades if trade is not first], MOST_PIECES - 1)]
        stranger = random.Random(f"{SEED}/stranger/{number}").choice([trade for trade in trades if trade not in chosen])
        sets = [
            make_scenario(rng, "held_out", domain=trade, gates=1, two_hop=False, fillers=0, gated_values=2)
            for trade in chosen[:pieces]
        ]
        texts = [_rule_set(one) for one in sets]
        order = rng.sample(range(pieces), pieces)
        task = _task(f"rule_sets_{pieces}", rng, sets[0], sets[0].gates[0], tuple(texts[i] for i in order))
        alien = make_scenario(rng, "held_out", domain=stranger, gates=1, two_hop=False, fillers=0, gated_values=2)
        options = tuple(dict.fromkeys(option for one in sets for option in one.options))
        yield replace(task, options=options, prefaces=_behind(task, _rule_set(alien)))


def updates(count: int) -> Iterator[Task]:
    """A policy in place, and two updates of its field as pieces. Only their position says which one is the last.

    A preface contains the policy.
    """
    for number, domain in _domains(count):
        rng, scenario, gate = _drawn("updates", number, domain, gates=1)
        last = rng.choice(sorted(gate.actions))
        first = other_value(rng, gate, last)
        lines = tuple(statement(DEFAULT_TEMPLATE, gate.field, value) + "\n" for value in (first, last))
        task = _task("updates", rng, scenario, gate, lines, value=last, shared=scenario.text() + "\n\n")
        yield replace(task, prefaces=_behind(task, task.shared))


def two_hops(count: int, *, together: bool) -> Iterator[Task]:
    """The groups of the values in one piece and the rules about groups in another, or both in one piece.

    If they are split, the preface of the rules contains the groups.
    """
    for number, domain in _domains(count):
        rng, scenario, gate = _drawn("two hops", number, domain, gates=1, two_hop=True, fillers=0)
        assert gate.groups is not None
        value = scenario.values[gate.field]
        lookups = "".join(f"{gate.field} {v} belongs to {gate.kind} {group}.\n" for v, group in gate.groups.items())
        by_group = {group: gate.actions[v] for v, group in gate.groups.items()}
        rules = "".join(f"If {gate.kind} is {group}, {action}.\n" for group, action in by_group.items())
        first = f"{gate.field}: {value}\n{lookups}"
        pieces = (first + rules,) if together else (first, rules)
        task = _task("two_hops_together" if together else "two_hops_split", rng, scenario, gate, pieces)
        yield task if together else replace(task, prefaces=("", _behind(task, first)[1]))


def _domains(count: int) -> Iterator[tuple[int, Domain]]:
    trades = held_out_domains()
    return ((number, trades[number % len(trades)]) for number in range(count))


def _drawn(
    kind: str, number: int, domain: Domain, *, gates: int | None = None, two_hop: bool | None = None,
    fillers: int | None = None,
) -> tuple[random.Random, Scenario, Gate]:  # fmt: skip
    rng = random.Random(f"{SEED}/{kind}/{number}")
    scenario = make_scenario(rng, "held_out", domain=domain, gates=gates, two_hop=two_hop, fillers=fillers)
    return rng, scenario, rng.choice(scenario.gates)


def _task(
    kind: str, rng: random.Random, scenario: Scenario, gate: Gate, pieces: tuple[str, ...], *, value: str | None = None,
    shared: str = "",
) -> Task:  # fmt: skip
    asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
    right = gate.actions[scenario.values[gate.field] if value is None else value]
    return Task(kind, scenario.domain, pieces, asked, scenario.options, frozenset({right}), shared)


def other_rules(count: int) -> str:
    """`count` rules that no request is about, 25 tokens each, and an empty line.

    The frames take theirs from the list's other end, and the longest use all of it. A policy has some of these rules
    too.
    """
    return TITLE + "".join(f"{line}\n" for line in other_lines()[-count:]) + "\n"


def _behind(task: Task, text: str) -> tuple[Preface, ...]:
    """For every piece, a preface of a few other rules and that text."""
    return (other_rules(PREFACE_RULES) + text,) * len(task.pieces)


def _rule_set(scenario: Scenario) -> str:
    gate = scenario.gates[0]
    value = scenario.values[gate.field]
    rules = "".join(f"For {gate.topic}: If {gate.field} is {v}, {action}.\n" for v, action in gate.actions.items())
    return f"{gate.field}: {value}\n{rules}"
