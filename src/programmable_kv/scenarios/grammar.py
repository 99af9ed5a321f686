"""A grammar of gated decisions: policies whose right action depends on the value of one field.

A `Scenario` is a policy text with `{field}` placeholders near its top, a few rules that map values of a
gating field to actions (directly, or through a group that is looked up: two hops), and unrelated rules in
between. Its gates say which action is right for any field values. Which value leads to which action is
random, so only the policy tells it.

The same grammar makes the adapter's training data (`split="train"`) and the data of every held-out
measurement (`split="held_out"`). The splits share no domain, field name, action, rule phrasing or update wording.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from programmable_kv.scenarios.phrasings import (
    CLOSINGS,
    FIELD_LINES,
    FILLERS,
    NARROW,
    Phrasing,
    Split,
    Stage,
    phrasing_of,
)
from programmable_kv.scenarios.vocabulary import (
    KINDS,
    LABELS,
    OBJECTS,
    VALUES,
    WORDS_A,
    Domain,
    draw_vocabulary,
    english,
    other_topics,
)

TWO_HOP_SHARE = 0.25
TRAINED_TWO_HOP_SHARE = 0.4
"""share of the gates that are looked up through a group; higher in training, because these gates are harder"""
PAIR_SHARE = 0.35
TRAINED_PAIR_SHARE = 0.5
"""share of scenarios with two gates, told apart by topic; higher at the end of training, because these are harder"""


@dataclass(frozen=True, slots=True)
class Gate:
    """One decision rule: the value of `field`, or the group in which the value is looked up, determines the action."""

    field: str
    topic: str
    actions: Mapping[str, str]
    """value -> action"""
    kind: str | None = None
    groups: Mapping[str, str] | None = None
    """value -> group label, for two-hop gates"""

    def thought(self, value: str) -> str:
        """Return one line of reasoning that restates the field and then decides."""
        hop = f", {self.kind} {self.groups[value]}" if self.groups is not None else ""
        return f"{self.field} is {value}{hop}, so {self.actions[value]}"

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.actions.values()))

    @property
    def rules(self) -> int:
        """How many rules name an action: one for each value, or one for each group."""
        return len(self.actions if self.groups is None else set(self.groups.values()))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A policy with `{field}` placeholders, the values that fill them, and the gates that give the right actions."""

    domain: str
    prompt: str
    values: Mapping[str, str]
    gates: tuple[Gate, ...]
    irrelevant: Mapping[str, Sequence[str]]
    """fields that no rule mentions -> other values they may take"""

    def text(self) -> str:
        return self.prompt.format_map(self.values)

    @property
    def options(self) -> tuple[str, ...]:
        """All actions that the policy's rules name."""
        return tuple(dict.fromkeys(option for gate in self.gates for option in gate.options))


def other_value(rng: random.Random, gate: Gate, value: str) -> str:
    """Draw a value under which the gate decides differently."""
    return rng.choice([v for v in sorted(gate.actions) if gate.actions[v] != gate.actions[value]])


def _filler_count(rng: random.Random) -> int:
    """Draw the number of unrelated rules: mostly few, because short policies teach more per token, and at most 30."""
    return rng.randint(12, 30) if rng.random() < 0.12 else min(30, int(rng.expovariate(1 / 4)))


def make_scenario(
    rng: random.Random,
    split: Split = "train",
    *,
    fillers: int | None = None,
    gates: int | None = None,
    two_hop: bool | None = None,
    gated_values: int | None = None,
    ordered: bool = False,
    stage: Stage = "full",
    domain: Domain | None = None,
    words: Sequence[str] | None = None,
) -> Scenario:
    """Draw one scenario.

    Arguments that are None are drawn at random.

    Args:
        fillers: how many unrelated rules; drawn from 0 to 30.
        gates: how many gates, at most 4; drawn from 1 and 2.
        two_hop: whether gates are looked up through a group; drawn for each gate.
        gated_values: how many values each gate distinguishes; drawn from 2 to 4.
        ordered: whether all lookups come before the rules.
        stage: stage of training; scenarios of earlier stages have fewer wordings and fewer words.
        words: words of which training scenarios make names, instead of `english()`.
    """
    wide = split == "train" and stage not in NARROW
    any_kind = wide and stage != "wide"
    phrasing = phrasing_of(split, stage)
    hops = TRAINED_TWO_HOP_SHARE if wide else TWO_HOP_SHARE
    trade, fields, actions = draw_vocabulary(rng, split, wide, domain, words)
    pairs = TRAINED_PAIR_SHARE if any_kind else PAIR_SHARE
    gate_count = gates if gates is not None else (2 if rng.random() < pairs else 1)
    filler_count = fillers if fillers is not None else _filler_count(rng)
    names = rng.sample(sorted(fields), k=len(fields))
    topics = rng.sample(list(trade.topics), k=min(gate_count, len(trade.topics)))
    if gate_count > len(topics):
        topics += rng.sample(other_topics(split, trade), k=gate_count - len(topics))
    made: list[Gate] = []
    rules: list[str] = []
    for index in range(gate_count):
        hop = rng.random() < hops if two_hop is None else two_hop
        taken = {gate.kind for gate in made}
        kinds = english() if any_kind and rng.random() < 0.6 else KINDS[split]
        kind = rng.choice([kind for kind in kinds if kind not in taken]) if hop else None
        gate, gate_lines = _make_gate(
            rng,
            split,
            phrasing,
            names[index],
            fields[names[index]],
            actions,
            topics[index],
            kind,
            gated_values,
            any_kind,
        )
        prefix = f"For {gate.topic}: " if gate_count > 1 else ""
        rules += [prefix + line if line_is_rule else line for line, line_is_rule in gate_lines]
        made.append(gate)
    if not ordered:
        rng.shuffle(rules)
    pool = list(FILLERS[split])
    if split == "train" and rng.random() < 0.4:
        # Rules about other things in the form of a gate, so that the form alone does not identify a gate.
        pool += [
            f"If the {rng.choice(WORDS_A)} is {rng.choice(VALUES)}, tell the {rng.choice(OBJECTS)} team."
            for _ in range(4)
        ]
    lines = rules + [pool[i % len(pool)] for i in rng.sample(range(max(len(pool), filler_count)), filler_count)]
    if rng.random() < 0.5 and not ordered:
        rng.shuffle(lines)
    else:
        spread = sorted(rng.sample(range(len(lines)), len(rules)))
        rest = lines[len(rules) :]
        lines = [rules[spread.index(i)] if i in spread else rest.pop() for i in range(len(lines))]

    extra = names[gate_count : gate_count + rng.randint(1, 2)]
    shown = [gate.field for gate in made] + list(extra)
    rng.shuffle(shown)
    values = {name: rng.choice(list(fields[name])) for name in shown}
    for gate in made:
        values[gate.field] = rng.choice(sorted(gate.actions))
    style = rng.choice(FIELD_LINES)
    field_lines = [style.format(name=name, placeholder="{" + name + "}") for name in shown]
    if rng.random() < 0.6:
        field_lines.insert(
            rng.randint(0, len(field_lines)), f"case_id: {rng.choice('ABCDEF')}{rng.randint(1000, 9999)}"
        )
    bullet = rng.choice(("- ", "* ", ""))
    blocks = [
        rng.choice(phrasing.openings).format(role=trade.role),
        rng.choice(("# Session", "Current state:", "## State", "Facts")) + "\n" + "\n".join(field_lines),
        rng.choice(("# Policy", "Rules:", "## Rules", "Policy")) + "\n" + "\n".join(bullet + line for line in lines),
    ]
    if rng.random() < 0.7:
        blocks.append(rng.choice(CLOSINGS))
    if rng.random() < 0.25:
        shown_options = [option for gate in made for option in gate.options]
        rng.shuffle(shown_options)
        blocks.append("Possible actions: " + ", ".join(dict.fromkeys(shown_options)))
    irrelevant = {name: [v for v in fields[name] if v != values[name]] for name in extra}
    return Scenario(trade.name, "\n\n".join(blocks), values, tuple(made), irrelevant)


def _make_gate(
    rng: random.Random,
    split: Split,
    phrasing: Phrasing,
    field: str,
    values: Sequence[str],
    actions: list[str],
    topic: str,
    kind: str | None,
    count: int | None,
    any_label: bool,
) -> tuple[Gate, list[tuple[str, bool]]]:
    """Draw a gate over 2 to 4 of the field's values, and its lines: (text, True for a rule and False for a lookup)."""
    chosen = rng.sample(list(values), count or rng.randint(2, min(4, len(values))))
    phrase = rng.choice(phrasing.rules)
    if kind is None:
        picked = rng.sample(actions, len(chosen))
        table = dict(zip(chosen, picked, strict=True))
        lines = [(phrase.format(field=field, value=v, action=a), True) for v, a in table.items()]
        return Gate(field, topic, table), lines
    # With only two groups, a model could answer right by choosing the other action than last time, without a lookup.
    group_count = 3 if any_label and len(chosen) > 2 and rng.random() < 0.5 else 2
    labels = rng.sample(english() if any_label and rng.random() < 0.4 else LABELS[split], group_count)
    groups = {value: labels[i % group_count] for i, value in enumerate(chosen)}
    per_label = dict(zip(labels, rng.sample(actions, group_count), strict=True))
    lookup = rng.choice(phrasing.lookups)
    lines = [(lookup.format(value=f"{field} {v}", kind=kind, label=label), False) for v, label in groups.items()]
    lines += [(phrase.format(field=kind, value=label, action=action), True) for label, action in per_label.items()]
    return Gate(field, topic, {v: per_label[groups[v]] for v in chosen}, kind, groups), lines
