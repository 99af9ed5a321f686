"""Wordings of the grammar's policies and conversations. The two splits share no rule, update or question."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from programmable_kv.prompt.wording import THINK_INSTRUCTION

Split = Literal["train", "held_out"]
Stage = Literal["pair", "short", "mixed", "wide", "hop", "full", "topics", "hard", "settle", "obey", "looked_up"]
"""Stages of training:

- `pair`: two rules and one question.
- `short`: few rules and two or three turns.
- `mixed`: everything, in few words.
- `wide`: everything, in many words and wordings.
- `hop`: short two-hop policies, mostly with the lookups first.
- `full`: everything, with groups of any name, and two gates more often.
- `topics`: short policies of two gates.
- `hard`: what the model still gets wrong: two hops or two gates, many updates, filler rules.
- `settle`: up to four gates, mostly with an update first.
- `obey`: short conversations that open with one update of the field that is asked about.
- `looked_up`: the same as `obey`, mostly with values that are looked up.
"""
NARROW: frozenset[Stage] = frozenset({"pair", "short", "mixed"})


@dataclass(frozen=True, slots=True)
class Phrasing:
    """Alternative wordings of rules, lookups of a group, state updates, questions and openings."""

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


# The default erratum, longer. An adapter that obeys it also obeys the short form (measured as `default_update`).
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
"""wordings of the first stages of training: models learn the lookup sooner when it has few wordings"""
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
    return FEW_PHRASINGS if stage in NARROW else PHRASINGS[split]


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


def question(rng: random.Random, phrasing: Phrasing, topic: str, *, think: bool) -> str:
    text = rng.choice(phrasing.questions).format(topic=topic)
    return f"{text} {THINK_INSTRUCTION}" if think else text


def update(rng: random.Random, phrasing: Phrasing, name: str, value: str) -> str:
    return rng.choice(phrasing.updates).format(name=name, value=value)
