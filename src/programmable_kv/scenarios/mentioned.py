"""Policies that refer to the field they depend on in one chosen way: by name, by its value, by a pronoun, and so on.

They use the held-out vocabulary and have unrelated rules in between. `declared` has the words that an author who knows
the policy would pass to `Notebook.mentions`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from programmable_kv.scenarios.phrasings import CLOSINGS, FILLERS, PHRASINGS
from programmable_kv.scenarios.vocabulary import KINDS, LABELS, held_out_domains

GERMAN = {
    "branch": "Filiale", "soil_moisture": "Bodenfeuchte", "crowd_level": "Andrang", "battery_charge": "Ladestand",
    "sample_grade": "Probenqualität", "sea_swell": "Seegang", "oven_heat": "Ofenhitze", "grape_sugar": "Zuckergehalt",
    "toothache": "Zahnschmerz", "avalanche_risk": "Lawinengefahr", "snow_depth": "Schneehöhe", "water_salinity": "Salzgehalt",
    "coral_tint": "Korallenfarbe", "fabric_weave": "Gewebe", "rock_seam": "Gestein", "dust_haze": "Staubwolke",
}  # fmt: skip
"""fields with the German names that rules in German use"""
IDLE = (
    "Write the {field} into the report.", "Show the {field} on the first page.", "Ask for the {field} only once.",
    "Keep the {field} confidential.", "Spell the {field} in small letters.", "The {field} is checked every morning.",
)  # fmt: skip
"""rules that name the field and determine no action"""


_WHENEVER = "Whenever {field} reads {value}, go with {action}."


@dataclass(frozen=True, slots=True)
class Way:
    """A way in which the rules refer to the field."""

    name: str
    rules: tuple[str, ...]
    """wordings of a rule with `{field}`, `{value}` and `{action}`; one is drawn for a policy"""
    heads: tuple[str, ...] = ()
    """wordings of a line before the rules; one is drawn"""
    declares: tuple[str, ...] = ()
    """words that an author would declare, with `{value}` for each of the values, or with other placeholders"""
    idle: int = 0
    """how many lines of `IDLE` the policy has"""
    last: tuple[str, ...] = ()
    """wordings of the second of the two rules, if it covers all other values"""


WAYS = (
    Way("by_name", (_WHENEVER, "The right action under {field} {value} is {action}.")),
    Way("often", (_WHENEVER, "As long as {field} stays at {value}, choose {action}."), idle=len(IDLE)),
    Way(
        "under_a_heading",
        ("{value}: {action}", "at {value}, go with {action}"),
        heads=("What to do depends on {field}:",),
        declares=("{value}",),
    ),
    Way(
        "by_value",
        ("At {value}, go with {action}.", "The right action under {value} is {action}."),
        declares=("{value}",),
    ),
    Way(
        "by_pronoun",
        ("If it reads {value}, go with {action}.", "When it is {value}, choose {action}."),
        heads=("Look at {field} first.", "Everything depends on {field}."),
        declares=("it",),
    ),
    Way(
        "in_german",
        ("Wenn {german} {value} ist, dann {action}.", "Bei {german} {value}: {action}."),
        declares=("{german}",),
    ),
    Way(
        "through_a_group",
        ("Whenever {kind} reads {label}, go with {action}.", "The right action under {kind} {label} is {action}."),
        declares=("{kind}",),
    ),
    Way(
        "every_other",
        (_WHENEVER,),
        declares=("all other cases",),
        last=("In all other cases, go with {action}.",),
    ),
)


@dataclass(frozen=True, slots=True)
class Mentioned:
    """A policy with `{field}` placeholders, and an edit of the field that it depends on."""

    way: Way
    prompt: str
    values: Mapping[str, str]
    field: str
    new: str
    actions: Mapping[str, str]
    """value -> action"""
    declared: tuple[str, ...]
    asked: str

    @property
    def old(self) -> str:
        return self.values[self.field]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(self.actions.values())

    def text(self) -> str:
        return f"{self.prompt.format_map(self.values)}\n{self.field} -> {self.new}\n{self.asked}"


def mentioned(rng: random.Random, way: Way, number: int, fillers: int = 8) -> Mentioned:
    """Draw a policy. Its number selects the domain: each held-out domain in turn."""
    domains = [domain for domain in held_out_domains() if way.name != "in_german" or GERMAN.keys() & domain.fields]
    domain = domains[number % len(domains)]
    names = sorted(GERMAN.keys() & domain.fields) if way.name == "in_german" else sorted(domain.fields)
    field = rng.choice(names)
    values = rng.sample(list(domain.fields[field]), 2)
    actions = dict(zip(values, rng.sample(list(domain.actions), 2), strict=True))
    words = {"field": field, "german": GERMAN.get(field, ""), "kind": rng.choice(KINDS["held_out"])}
    labels = dict(zip(values, rng.sample(LABELS["held_out"], 2), strict=True))
    block = [*_drawn(rng, way.heads, words), *_rules(rng, way, words, actions, labels)]
    idle = [line.format(**words) for line in IDLE[: way.idle]]
    others = [*idle, *rng.sample(FILLERS["held_out"], fillers)]
    rng.shuffle(others)
    at = rng.randint(0, len(others))
    bullet = rng.choice(("- ", "* ", ""))
    lines = [*others[:at], *block, *others[at:]] if way.heads or way.last else _mixed(rng, block, others)
    if way.name == "through_a_group":
        lookup = rng.choice(PHRASINGS["held_out"].lookups)
        lines = [lookup.format(value=f"{field} {v}", kind=words["kind"], label=labels[v]) for v in values] + lines
    extra = [name for name in sorted(domain.fields) if name != field][:1]
    shown = {field: rng.choice(values)} | {name: rng.choice(list(domain.fields[name])) for name in extra}
    text = "\n\n".join(
        (
            rng.choice(PHRASINGS["held_out"].openings).format(role=domain.role),
            "# Session\n" + "\n".join(f"{name}: {{{name}}}" for name in shown),
            "# Policy\n" + "\n".join(bullet + line for line in lines),
            rng.choice(CLOSINGS),
        )
    )
    new = next(value for value in values if value != shown[field])
    declared = tuple(word.format(value=v, **words) for word in way.declares for v in values)
    asked = rng.choice(PHRASINGS["held_out"].questions).format(topic=rng.choice(list(domain.topics)))
    return Mentioned(way, text, shown, field, new, actions, tuple(dict.fromkeys(declared)), asked)


def _rules(
    rng: random.Random, way: Way, words: Mapping[str, str], actions: Mapping[str, str], labels: Mapping[str, str]
) -> list[str]:
    rule = rng.choice(way.rules)
    wordings = [rule] * (len(actions) - len(way.last)) + list(way.last)
    return [
        wording.format(value=value, action=action, label=labels[value], **words)
        for wording, (value, action) in zip(wordings, actions.items(), strict=True)
    ]


def _drawn(rng: random.Random, wordings: Sequence[str], words: Mapping[str, str]) -> list[str]:
    return [rng.choice(wordings).format(**words)] if wordings else []


def _mixed(rng: random.Random, block: list[str], others: list[str]) -> list[str]:
    lines = [*block, *others]
    rng.shuffle(lines)
    return lines
