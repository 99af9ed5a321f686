"""When are notes taken? By the field's place, by when the question is known, and by what the question asks.

The field is above, among or below its rules. The rival view: a model reads everything at the end, when it knows the
question, and notes form only where the conclusion can be computed before. Then a field below its rules, and a value
that is only looked up, should leave no notes on rules. Lines about other things after a field below its rules show
whether distance counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from programmable_kv.lab.composing.frame import other_lines
from programmable_kv.lab.experiments.cases import Case
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import NamedPair, known_of, named_pair
from programmable_kv.lab.experiments.pair import Pair, Texts, texts_of
from programmable_kv.lab.experiments.prevention import tail_of
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES, Part, Text, Written, ruled

LOOKUP = "What is the {field}? Reply with the value only."
MORE = 8
"""Lines about other things between a field below its rules and the question."""
GO_ON = "Your answer now."
"""The user's message if the question was asked before the policy."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to write a case."""

    name: str
    system: str
    asked: str
    asks_value: bool = False


def settings(case: Case) -> list[Setting]:
    """The same policy and question with the field in other places, and with other questions."""
    prompt, field = case.scenario.prompt, case.gate.field
    rules = [line for line in prompt.splitlines() if ruled(line, case) is not None]
    stated = next(line for line in prompt.splitlines() if "{" + field + "}" in line)
    without = prompt.replace(stated + "\n", "", 1)
    middle = rules[len(rules) // 2 - 1]
    lookup = LOOKUP.format(field=field)
    more = "\n".join(other_lines()[:MORE])
    return [
        Setting("above", prompt, case.asked),
        Setting("among", without.replace(middle, f"{middle}\n{stated}", 1), case.asked),
        Setting("below", f"{without}\n\n{stated}", case.asked),
        Setting("below_far", f"{without}\n\n{stated}\n\n{more}", case.asked),
        Setting("in_question", without, f"{stated}\n{case.asked}"),
        Setting("asked_first", f"{case.asked}\n\n{prompt}", GO_ON),
        Setting("lookup", prompt, lookup, asks_value=True),
    ]


def sets(text: Written) -> dict[str, tuple[int, ...]]:
    """The slots that are patched. Sets of rule slots are empty if the rules are above the field."""
    actions = tuple(slot for slot in text.of(Text.OLD_RULE, Text.NEW_RULE) if text.parts[slot] is Part.ACTION)
    return {
        "field": tuple(text.field.range),
        "actions": actions,
        "rules": text.of(*RULES),
        "tail": tail_of(text),
        "later": text.later,
    }


def measure(pair: Pair, _: Sequence[Row], *, places: Sequence[str] | None = None) -> Row:
    """In each setting (or those of some places), the gap after patching sets of tokens and after an edit.

    The edit recomputes the field and the question. Rows that several settings have in common are computed once, and the
    rows of all settings together.
    """
    shared, asked = known_of(pair), {}
    for setting in settings(pair.case):
        if places is not None and setting.name not in places:
            continue
        found = pair if setting.name == "above" else in_setting(pair, setting)
        if isinstance(found, Texts):
            asked[setting.name] = _Asked.of(named_pair(found, shared))
    shared.compute()
    return {"settings": {name: each.described() for name, each in asked.items()}}


def in_setting(pair: Texts, setting: Setting) -> Texts | str:
    """The same change of the same case in another setting; or the reason why that is not possible."""
    case = replace(pair.case, changes=(pair.change,), asked=setting.asked)
    return texts_of(pair.model, case, system=setting.system, asks_value=setting.asks_value)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """The decisions asked for in one setting, by the names of their rows."""

    pair: NamedPair
    patched: Mapping[str, int]
    asked_again: int

    @classmethod
    def of(cls, pair: NamedPair) -> _Asked:
        text = pair.texts.text
        patched = {name: pair.patched(slots) for name, slots in sets(text).items() if slots}
        return cls(pair, patched, pair.recomputed((*text.field.range, *tail_of(text))))

    def described(self) -> dict[str, Any]:
        """The gap after each set is patched, and after the field and the question are recomputed."""
        text, scale = self.pair.texts.text, self.pair.scale
        return {
            "old_gap": round(scale.old, 4),
            "new_gap": round(scale.new, 4),
            "valid": scale.valid,
            "between": text.last - text.field.stop,
            "patched": {name: round(self.pair.gap(each), 4) for name, each in self.patched.items()},
            "asked_again": round(self.pair.gap(self.asked_again), 4),
        }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By setting: how often both values are decided correctly; among these, what each set of tokens recovers."""
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row["settings"]):
        found = [_flat(row, name) for row in rows if name in row["settings"]]
        right = [row for row in found if row["valid"]]
        part: dict[str, Any] = {
            "right": share(found, lambda row: bool(row["valid"])),
            "between": mean_by_domain(right, at("between"))["value"],
        }
        part |= {key: arm(right, at(f"patched.{key}")) for key in ("field", "actions", "rules", "tail", "later")}
        part["asked_again"] = arm(right, at("asked_again"))
        summary[name] = part
    return {"settings": summary}


def _flat(row: Row, name: str) -> dict[str, Any]:
    setting: Mapping[str, Any] = row["settings"][name]
    return {"domain": row["domain"], **setting}


BOUNDARY = Experiment(
    name="boundary",
    version=1,
    title="Where notes are taken: by the place of the field, when the question is known, and what it asks",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=2.5,
    quick=partial(measure, places=("above", "below")),
)
