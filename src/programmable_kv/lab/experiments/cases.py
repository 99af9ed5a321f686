"""The cases of the experiments: policies with one or more sets of rules, a field that changes, and a question about it.

Policies are held out: their domains, fields, values, actions and wordings occur in no training data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

from programmable_kv.scenarios.everyday import FIELDS, RULES
from programmable_kv.scenarios.everyday import everyday as everyday_policy
from programmable_kv.scenarios.grammar import Gate, Scenario, make_scenario
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import held_out_domains

SEED = 94_000
RANKING_SEED = 95_000
"""Seed of the policies on which positions are ranked. They are scored on others, of other domains."""
FILLERS = 8
"""Number of rules about other things in a policy."""


@dataclass(frozen=True, slots=True)
class Case:
    """A policy and a question. Its field changes from one value to another with as many tokens."""

    number: int
    scenario: Scenario
    gate: Gate
    changes: tuple[tuple[str, str], ...]
    """(old value, new value), each with its own action. The first pair that a model's tokens allow is used."""
    asked: str

    @property
    def domain(self) -> str:
        return self.scenario.domain

    def values(self, value: str) -> Mapping[str, str]:
        """The value of every field, with `value` for the gated one."""
        return {**self.scenario.values, self.gate.field: value}

    def text(self) -> str:
        return f"{self.scenario.text()}\n{self.gate.field}: {self.changes}\n{self.asked}"


def cases(
    count: int,
    seed: int = SEED,
    *,
    everyday: bool = False,
    sets: int = 1,
    values: int | None = None,
    fillers: int = FILLERS,
) -> list[Case]:
    """`count` cases, from the held-out domains in turn. A longer draw starts with a shorter one.

    Args:
        everyday: draw short policies in everyday words, which models that were not trained on the grammar solve. Their
            domains are their fields.
        sets: sets of rules in each policy that is not an everyday one. The question is about one of them.
        values: values that each of these sets tells apart (None: two to four). Everyday policies tell two apart.
        fillers: rules about other things in each policy that is not an everyday one.
    """
    return _everyday(count, seed) if everyday else _held_out(count, seed, sets, values, fillers)


def domain_names() -> list[str]:
    """Every domain that a case may have, in a fixed order."""
    return [domain.name for domain in held_out_domains()] + sorted(FIELDS)


def _held_out(count: int, seed: int, sets: int, values: int | None, fillers: int) -> list[Case]:
    domains = held_out_domains()
    drawn = []
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        scenario = make_scenario(
            rng, "held_out", gates=sets, two_hop=False, gated_values=values, fillers=fillers,
            domain=domains[number % len(domains)],
        )  # fmt: skip
        gate = scenario.gates[0] if sets == 1 else rng.choice(scenario.gates)
        changes = list(permutations(sorted(gate.actions), 2))
        rng.shuffle(changes)
        asked = question(rng, PHRASINGS["held_out"], gate.topic, think=False)
        drawn.append(Case(number, scenario, gate, tuple(changes), asked))
    return drawn


def _everyday(count: int, seed: int) -> list[Case]:
    drawn = []
    for number in range(count):
        rng = random.Random(f"{seed}/everyday/{number}")
        policy = everyday_policy(rng, RULES)
        gate = Gate(policy.field, policy.field, policy.actions)
        scenario = Scenario(policy.field, policy.prompt, policy.values, (gate,), {})
        changes = list(permutations(sorted(gate.actions), 2))
        rng.shuffle(changes)
        drawn.append(Case(number, scenario, gate, tuple(changes), policy.asked))
    return drawn
