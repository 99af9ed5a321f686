"""A grammar of gated decisions: policies whose right action depends on the value of one field.

A `Scenario` is a policy text with `{field}` placeholders near its top, a few rules that map values of a
gating field to actions (directly, or through a looked-up group: two hops), unrelated rules in between, and
the arithmetic that says which action is right for any field values. Which value leads to which action is
random, so nothing but the policy can tell.

The same grammar makes the adapter's training data (`split="train"`) and every held-out measurement
(`split="held_out"`): the splits share no domain, field name, action, rule phrasing or update wording.
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

from programmable_kv.adapter.replay import documents
from programmable_kv.notebook.wording import THINK_INSTRUCTION

Split = Literal["train", "held_out"]
Stage = Literal["pair", "short", "mixed", "wide", "hop", "full", "topics", "hard"]
"""what training goes through: two rules and one question; few rules and two or three turns; everything, in few words;
everything, in many words and wordings; short two-hop policies, lookups mostly first; everything, groups of any name,
two gates more often; short policies of two gates; what is still missed: two hops or two gates, many updates, filler rules"""
_NARROW = frozenset({"pair", "short", "mixed"})


@dataclass(frozen=True, slots=True)
class Phrasing:
    """How things are said: rules, lookups of a group, state updates, questions and openings."""

    rules: tuple[str, ...]
    lookups: tuple[str, ...]
    updates: tuple[str, ...]
    questions: tuple[str, ...]
    openings: tuple[str, ...]

    def and_also(self, other: Phrasing) -> Phrasing:
        return Phrasing(
            self.rules + other.rules,
            self.lookups + other.lookups,
            self.updates + other.updates,
            self.questions + other.questions,
            self.openings + other.openings,
        )


# The default erratum, drawn out: obeying this, the adapter obeys the short form too (measured as `default_update`).
_EMPHATIC_UPDATE = (
    "[STATE UPDATE] {name} is now: {value}. This replaces every earlier value of {name} "
    "and every conclusion drawn from it."
)
FEW_PHRASINGS = Phrasing(
    rules=(
        "If {field} is {value}, {action}.",
        "When {field} is {value}: {action}.",
        "{action} if {field} equals {value}.",
        "Should {field} be {value}, the answer is {action}.",
        "Use {action} for {field} = {value}.",
        "Cases with {field} {value} get {action}.",
        "{field} {value} means {action}.",
    ),
    lookups=(
        "{value} belongs to {kind} {label}.",
        "{kind} {label} includes {value}.",
        "Treat {value} as {kind} {label}.",
    ),
    updates=(
        *(3 * [_EMPHATIC_UPDATE]),
        "Update: {name} changed to {value}.",
        "Correction: {name} is {value}, not what was said above.",
        "{name} = {value} from now on.",
        "Notice: {name} has been set to {value}.",
        "[CORRECTION] The value of {name} is {value}. Disregard earlier values.",
    ),
    questions=(
        "Somebody asks for {topic}. What do you do?",
        "Request: {topic}. Which action?",
        "Next case: {topic}.",
        "Please handle {topic}.",
        "We have {topic} here. Decide.",
    ),
    openings=("You are the {role}.", "Act as the {role}.", "You work as the {role}. Follow the policy below."),
)
"""what the first stages of training are worded in: the lookup is found sooner where it is said in few ways"""
_MORE_PHRASINGS = Phrasing(
    rules=(
        "In case {field} shows {value}, we {action}.",
        "With {field} at {value}, the step to take is {action}.",
        "Given {field} {value}, respond with {action}.",
        "{action} applies once {field} becomes {value}.",
        "On {field}={value} -> {action}",
        "During {field} {value}, do {action}.",
        "{field}: {value} => {action}",
        "The response to {field} {value} has to be {action}.",
        "Pick {action} where {field} says {value}.",
    ),
    lookups=(
        "{value} goes into {kind} {label}.",
        "{kind} {label} covers {value}.",
        "{value} is listed under {kind} {label}.",
        "We count {value} towards {kind} {label}.",
        "{value} -> {kind} {label}",
    ),
    updates=(
        *(2 * ["[STATE UPDATE] {name} is now: {value}."]),
        "{name} went over to {value}.",
        "FYI, {name} now reads {value}.",
        "The current {name} is {value}.",
        "{name} was just switched to {value}; use that.",
        "Latest on {name}: {value}.",
        "From here on, treat {name} as {value}.",
        "Heads up: {name} went to {value}.",
        "Since a minute ago {name} is at {value}, whatever was stated before.",
        "Note: we have a new {name}, {value}.",
        "System message: {name}={value}",
        "Status change! {name}: {value}",
        "Forget the earlier {name}. It is {value} now.",
    ),
    questions=(
        "There is {topic} waiting. What is your decision?",
        "This one concerns {topic}. Say what to do.",
        "What should happen with {topic}?",
        "Case at hand: {topic}. Your answer?",
        "Someone brought up {topic}; name the step.",
    ),
    openings=("Your role is {role}.", "You are on duty as the {role}. These rules bind you.", "Role: {role}"),
)
PHRASINGS: dict[Split, Phrasing] = {
    "train": FEW_PHRASINGS.and_also(_MORE_PHRASINGS),
    "held_out": Phrasing(
        rules=(
            "Whenever {field} reads {value}, go with {action}.",
            "The right action under {field} {value} is {action}.",
            "As long as {field} stays at {value}, choose {action}.",
        ),
        lookups=("{value} falls under {kind} {label}.", "Anything {value} is filed in {kind} {label}."),
        updates=(
            "Please note that {name} has moved to {value}.",
            "New reading for {name}: {value}.",
            "As of this moment {name} stands at {value}; forget what it was.",
        ),
        questions=(
            "Now it is about {topic}. Your call?",
            "Incoming: {topic}. State the action.",
            "How should {topic} be dealt with?",
        ),
        openings=("You serve as the {role}.", "Your job: {role}. Obey the policy."),
    ),
}


def phrasing_of(split: Split, stage: Stage = "full") -> Phrasing:
    return FEW_PHRASINGS if stage in _NARROW else PHRASINGS[split]


CLOSINGS = (
    "Reply with the action only.",
    "Answer with one action and nothing else.",
    "Name the action, no explanation.",
)
FIELD_LINES = ("{name}: {placeholder}", "- {name} = {placeholder}", "{name} is {placeholder}.")
FILLERS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Be polite and brief in every message.",
        "Never share internal notes with outsiders.",
        "Write times in the 24 hour format.",
        "Keep a record of every case for two years.",
        "Do not promise anything that is not written here.",
        "Amounts are given in the local currency.",
        "If a message cannot be read, ask for it to be sent again.",
        "Use the person's family name in letters.",
        "Complaints about the website go to the web team.",
        "Attachments larger than ten megabytes are not opened.",
        "The quarterly report is prepared by another department.",
        "Phone calls are recorded for training purposes.",
        "Surveys are sent out on Fridays.",
        "Holidays are listed in the shared calendar.",
        "Test accounts start with the letter Z.",
        "Old forms remain valid until the end of the year.",
        "Spelling mistakes in names are corrected silently.",
        "All colleagues use the same mailbox.",
        "Photographs need written consent.",
        "The archive is cleaned up every spring.",
        "Questions about parking go to the front desk.",
        "Translations are checked by a second person.",
        "A case number has eight digits.",
        "Passwords are never sent by mail.",
        "The kitchen on the second floor is being renovated.",
        "Links in messages must be shortened.",
    ),
    "held_out": (
        "Greet people with the time of day.",
        "Invoices are numbered without gaps.",
        "Drafts are stored for thirty days.",
        "The printer near the stairs is for staff.",
        "Signatures may be electronic.",
        "Newsletters are written once a month.",
        "Report broken chairs to the caretaker.",
        "Names of minors are abbreviated.",
        "Backups run after midnight.",
        "Lost property is kept in the blue box.",
        "Feedback forms are anonymous.",
        "Numbers above one thousand get a separator.",
    ),
}
TWO_HOP_SHARE = 0.25
TRAINED_TWO_HOP_SHARE = 0.4
"""of the gates, how many are looked up through a group; more in training, because they are the harder ones"""
PAIR_SHARE = 0.35
TRAINED_PAIR_SHARE = 0.5
"""of the scenarios, how many hold two gates, told apart by the topic; more at the end of training, for the same reason"""
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
    """What an agent of one trade knows: its fields with their values, its actions, its requests."""

    name: str
    role: str
    fields: Mapping[str, Sequence[str]]
    actions: Sequence[str]
    topics: Sequence[str]


@dataclass(frozen=True, slots=True)
class Gate:
    """One decision rule: the value of `field` (or the `group` it is looked up in) names the action."""

    field: str
    topic: str
    actions: Mapping[str, str]
    """value -> action"""
    kind: str | None = None
    groups: Mapping[str, str] | None = None
    """value -> group label, for two-hop gates"""

    def thought(self, value: str) -> str:
        """The one-line reasoning that restates the field and then decides."""
        hop = f", {self.kind} {self.groups[value]}" if self.groups is not None else ""
        return f"{self.field} is {value}{hop}, so {self.actions[value]}"

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.actions.values()))

    @property
    def rules(self) -> int:
        """How many rules say what to do: one a value, or one a group."""
        return len(self.actions if self.groups is None else set(self.groups.values()))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A policy with `{field}` placeholders, the values that fill them, and what is right."""

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
        """Every action that some rule of the policy names."""
        return tuple(dict.fromkeys(option for gate in self.gates for option in gate.options))


@cache
def domains(split: Split | Literal["held_out_more"]) -> tuple[Domain, ...]:
    """The domains of a split. `held_out_more` are held out as well, but came later: the English words that training draws were
    chosen without them, so those words may be a part of their names, though none is the whole of one."""
    text = resources.files(__package__).joinpath("domains.toml").read_text(encoding="utf-8")
    return tuple(Domain(name, **body) for name, body in tomllib.loads(text)[split].items())


HELD_OUT_DOMAINS = (*domains("held_out"), *domains("held_out_more"))
"""all that training never saw"""


def _filler_count(rng: random.Random) -> int:
    """Mostly short policies, which teach more per token, and a tail of up to 30 unrelated rules."""
    return rng.randint(12, 30) if rng.random() < 0.12 else min(30, int(rng.expovariate(1 / 4)))


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


@cache
def _english() -> tuple[str, ...]:
    """Words of the replayed plain text, without any that a held-out name is made of."""
    kept_out = {
        word
        for domain in domains("held_out")
        for name in (*domain.fields, *(v for values in domain.fields.values() for v in values), *domain.actions)
        for word in re.split(r"[^a-z]+", name.lower())
    }
    found = {word for text in documents("replay") for word in re.findall(r"\b[a-z]{4,10}\b", text)}
    return tuple(sorted(found - kept_out))


def _english_names(rng: random.Random, count: int) -> list[str]:
    words = [rng.choice(_english()) for _ in range(count)]
    return [f"{word}_{rng.choice(_english())}" if rng.random() < 0.4 else word for word in words]


def _vocabulary(
    rng: random.Random, split: Split, wide: bool, chosen: Domain | None
) -> tuple[Domain, dict[str, Sequence[str]], list[str]]:
    domain = chosen or rng.choice(domains(split))
    fields = dict(domain.fields)
    actions = list(domain.actions)
    if wide and rng.random() < 0.3:
        fields = {f"{a}_{b}": _distinct(_english_names(rng, 5)) for a, b in
                  (rng.sample(_english(), 2) for _ in range(4))}  # fmt: skip
    elif split == "train" and rng.random() < 0.45:
        fields = _invented(rng, 4)
    if wide and rng.random() < 0.45:
        actions = _english_names(rng, 14)
    elif split == "train":
        if rng.random() < 0.35:
            actions = [f"{rng.choice(VERBS)}_{rng.choice(OBJECTS)}" for _ in range(12)]
        elif rng.random() < 0.15:
            actions = [option.replace("_", " ") for option in actions]
    return domain, fields, _distinct(actions)


def _distinct(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


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
) -> Scenario:
    """Draw one scenario. What is left out is drawn too: the `domain`, `fillers` (0 to 30), `gates` (1 or 2), `two_hop`, and
    how many values each gate tells apart (`gated_values`, 2 to 4). In an `ordered` one the lookups come before the rules. A
    training scenario of an earlier `stage` is worded in fewer ways, from fewer words."""
    wide = split == "train" and stage not in _NARROW
    any_kind = wide and stage != "wide"
    phrasing = phrasing_of(split, stage)
    hops = TRAINED_TWO_HOP_SHARE if wide else TWO_HOP_SHARE
    trade, fields, actions = _vocabulary(rng, split, wide, domain)
    pairs = TRAINED_PAIR_SHARE if any_kind else PAIR_SHARE
    gate_count = gates if gates is not None else (2 if rng.random() < pairs else 1)
    filler_count = fillers if fillers is not None else _filler_count(rng)
    names = rng.sample(sorted(fields), k=len(fields))
    topics = rng.sample(list(trade.topics), k=gate_count)
    made: list[Gate] = []
    rules: list[str] = []
    for index in range(gate_count):
        hop = rng.random() < hops if two_hop is None else two_hop
        taken = {gate.kind for gate in made}
        kinds = _english() if any_kind and rng.random() < 0.6 else KINDS[split]
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
        # Rules about other things, in the very form of a gate, so that form alone decides nothing.
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
    """A gate over 2 to 4 of the field's values, and its lines (text, is it a rule or a lookup)."""
    chosen = rng.sample(list(values), count or rng.randint(2, min(4, len(values))))
    phrase = rng.choice(phrasing.rules)
    if kind is None:
        picked = rng.sample(actions, len(chosen))
        table = dict(zip(chosen, picked, strict=True))
        lines = [(phrase.format(field=field, value=v, action=a), True) for v, a in table.items()]
        return Gate(field, topic, table), lines
    # With two groups, "the other action than last time" would pass for a looked-up answer.
    group_count = 3 if any_label and len(chosen) > 2 and rng.random() < 0.5 else 2
    labels = rng.sample(_english() if any_label and rng.random() < 0.4 else LABELS[split], group_count)
    groups = {value: labels[i % group_count] for i, value in enumerate(chosen)}
    per_label = dict(zip(labels, rng.sample(actions, group_count), strict=True))
    lookup = rng.choice(phrasing.lookups)
    lines = [(lookup.format(value=f"{field} {v}", kind=kind, label=label), False) for v, label in groups.items()]
    lines += [(phrase.format(field=kind, value=label, action=action), True) for label, action in per_label.items()]
    return Gate(field, topic, {v: per_label[groups[v]] for v in chosen}, kind, groups), lines


def question(rng: random.Random, phrasing: Phrasing, gate: Gate, *, think: bool) -> str:
    text = rng.choice(phrasing.questions).format(topic=gate.topic)
    return f"{text} {THINK_INSTRUCTION}" if think else text


def update(rng: random.Random, phrasing: Phrasing, name: str, value: str) -> str:
    return rng.choice(phrasing.updates).format(name=name, value=value)
