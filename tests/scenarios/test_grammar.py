"""The grammar of scenarios: its splits share nothing, and the answers follow from the text."""

from __future__ import annotations

import random
import re
from dataclasses import fields

from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.scenarios import phrasings, vocabulary
from programmable_kv.scenarios.grammar import make_scenario
from programmable_kv.scenarios.phrasings import Phrasing, Split
from programmable_kv.scenarios.vocabulary import domains, held_out_domains


def test_twelve_training_domains_and_held_out_ones() -> None:
    assert len(domains("train")) >= 12
    assert len(held_out_domains()) >= 16


def test_the_splits_share_no_name_value_action_or_phrasing() -> None:
    train, held_out = domains("train"), held_out_domains()
    values = {value for domain in train for several in domain.fields.values() for value in several}
    known = {
        *values,
        *vocabulary.VALUES,
        *vocabulary.KINDS["train"],
        *vocabulary.LABELS["train"],
        *vocabulary.english(),
    }
    for domain in held_out:
        assert not known & {value for several in domain.fields.values() for value in several}
        assert not {*vocabulary.VERBS, *vocabulary.english()} & set(domain.actions)
    assert not known & {*vocabulary.KINDS["held_out"], *vocabulary.LABELS["held_out"]}
    for what in ("fields", "actions", "topics"):
        ours = {item for domain in train for item in getattr(domain, what)}
        theirs = {item for domain in held_out for item in getattr(domain, what)}
        assert not ours & theirs, what
    for said in fields(Phrasing):
        ours, theirs = (set(getattr(phrasings.PHRASINGS[split], said.name)) for split in ("train", "held_out"))
        assert not ours & theirs, said.name
    assert not set(phrasings.FILLERS["train"]) & set(phrasings.FILLERS["held_out"])
    invented = {f"{a}_{b}" for a in vocabulary.WORDS_A for b in vocabulary.WORDS_B}
    assert not invented & {field for domain in held_out for field in domain.fields}
    invented_actions = {f"{a}_{b}" for a in vocabulary.VERBS for b in vocabulary.OBJECTS}
    assert not invented_actions & {action for domain in held_out for action in domain.actions}


@given(st.integers(0, 10**6), st.sampled_from(["train", "held_out"]))
@settings(max_examples=150, deadline=None)
def test_a_scenario_can_be_answered_from_its_text(seed: int, split: Split) -> None:
    scenario = make_scenario(random.Random(seed), split)
    text = scenario.text()
    rules = text.splitlines()
    assert "{" not in text
    for gate in scenario.gates:
        assert scenario.values[gate.field] in gate.actions
        assert len(set(gate.actions.values())) >= 2
        for value, action in gate.actions.items():
            if gate.groups is None:
                matching = [
                    r for r in rules if gate.field in r and re.search(rf"\b{re.escape(value)}\b", r) and action in r
                ]
                assert len(matching) >= 1, (value, action)
            else:
                label = gate.groups[value]
                assert any(f"{gate.field} {value}" in r and f"{gate.kind} {label}" in r for r in rules)
                assert any(str(gate.kind) in r and label in r and action in r for r in rules)
    kinds = [gate.kind for gate in scenario.gates if gate.kind is not None]
    assert len(kinds) == len(set(kinds)), "two gates with one kind of group would contradict each other"
    gated = {gate.field for gate in scenario.gates}
    assert not gated & set(scenario.irrelevant)
    position = min(text.index(scenario.values[gate.field]) for gate in scenario.gates)
    assert position < len(text) / 2 or len(text) < 900, "fields stand near the top"
