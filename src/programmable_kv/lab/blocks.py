"""Does an edited block of lines decide as a full prefill would? By kind of change and by edit mode.

A block is a field of several lines, as agents keep them: a memory of a user, a todo list, a table of states. One line
of it changes: a fact is replaced, an item is done, a box is checked, a line is added. The run decides in every edit
mode and compares with full prefill. The `everyday` cases are worded for models that were not trained on the grammar.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.fields import Field
from programmable_kv.records import Record, Recorder, digest_of, wilson
from programmable_kv.scenarios.everyday import ACTIONS, FIELDS
from programmable_kv.scenarios.phrasings import PHRASINGS, question
from programmable_kv.scenarios.vocabulary import Domain, held_out_domains

SEED = 93_000
NAME = "notes"
"""Field name of the block."""
LINES = 4
"""Largest number of lines in a block."""
LAYOUTS = ("asked before", "asked after")
"""Whether the request is part of the cached context, or comes with the decision after the edit."""
ITEMS = (
    "call the supplier", "print the labels", "check the address", "send the invoice", "book the courier",
    "update the file", "count the stock", "sign the form",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A policy about a block, a change to one of its lines, and the right action before and after."""

    kind: str
    number: int
    prompt: str
    """The policy, with a placeholder for the block."""
    old: str
    new: str
    subject: str
    """What the changed line is about. The rules name it."""
    right_before: str
    right_after: str
    asked: str

    @property
    def options(self) -> tuple[str, str]:
        return self.right_before, self.right_after

    def text(self) -> str:
        return f"{self.prompt}\n{self.old}\n->\n{self.new}\n{self.asked}"


@dataclass(frozen=True, slots=True)
class _Change:
    """A change to one line: the block before and after, its subject, and the two conditions as the rules state them."""

    old: tuple[str, ...]
    new: tuple[str, ...]
    subject: str
    before: str
    after: str


def _fact_replaced(rng: random.Random, domain: Domain) -> _Change:
    lines = _facts(rng, domain)
    place = rng.randrange(len(lines))
    name = lines[place][0]
    before, after = rng.sample(list(domain.fields[name]), 2)
    facts = [(each, before if each == name else value) for each, value in lines]
    changed = [(each, after if each == name else value) for each, value in lines]
    return _Change(_stated(facts), _stated(changed), name, f"{name} is {before}", f"{name} is {after}")


def _line_added(rng: random.Random, domain: Domain) -> _Change:
    *known, (name, value) = _facts(rng, domain)
    added = [*known, (name, value)]
    return _Change(_stated(known), _stated(added), name, f"{name} is not listed", f"{name} is {value}")


def _item_done(rng: random.Random, domain: Domain) -> _Change:
    del domain
    return _item(rng, lambda item, done: f"- {item}: {'done' if done else 'open'}", "open", "done")


def _box_checked(rng: random.Random, domain: Domain) -> _Change:
    del domain
    return _item(rng, lambda item, done: f"- [{'x' if done else ' '}] {item}", "still open", "checked off")


def _item(rng: random.Random, line: Callable[[str, bool], str], before: str, after: str) -> _Change:
    items = {item: rng.random() < 0.5 for item in rng.sample(ITEMS, LINES)}
    subject = rng.choice(sorted(items))
    old = tuple(line(item, done and item != subject) for item, done in items.items())
    new = tuple(line(item, done or item == subject) for item, done in items.items())
    return _Change(old, new, subject, f"'{subject}' is {before}", f"'{subject}' is {after}")


KINDS: dict[str, Callable[[random.Random, Domain], _Change]] = {
    "fact_replaced": _fact_replaced,
    "line_added": _line_added,
    "item_done": _item_done,
    "box_checked": _box_checked,
}


def _facts(rng: random.Random, domain: Domain) -> list[tuple[str, str]]:
    names = rng.sample(sorted(domain.fields), min(LINES, len(domain.fields)))
    return [(name, rng.choice(list(domain.fields[name]))) for name in names]


def _stated(facts: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(f"- {name}: {value}" for name, value in facts)


def cases(count: int, *, everyday: bool = False) -> Iterator[Case]:
    """Yield `count` cases of each kind, from the held-out domains in turn. A longer draw starts with a shorter one."""
    domains = (_EVERYDAY,) if everyday else held_out_domains()
    for number in range(count):
        for kind, draw in KINDS.items():
            rng = random.Random(f"{SEED}/{kind}/{number}")
            domain = domains[number % len(domains)]
            change = draw(rng, domain)
            actions = (right_before, right_after) = rng.sample(list(domain.actions), 2)
            rules = [
                (_EVERYDAY_RULE if everyday else _RULE).format(holds=holds, action=action)
                for holds, action in zip((change.before, change.after), actions, strict=True)
            ]
            rng.shuffle(rules)
            prompt = (_EVERYDAY_PROMPT if everyday else _PROMPT).format(
                role=domain.role, block="{" + NAME + "}", rules="\n".join(f"- {rule}" for rule in rules)
            )
            if everyday:
                asked = f"What is the action for the current state of {change.subject}?"
            else:
                asked = question(rng, PHRASINGS["held_out"], rng.choice(list(domain.topics)), think=False)
            yield Case(
                kind, number, prompt, "\n".join(change.old), "\n".join(change.new), change.subject,
                right_before, right_after, asked,
            )  # fmt: skip


_RULE = "If {holds}, choose {action}."
_PROMPT = (
    "You serve as the {role}.\n\n# Notes\n{block}\n\n# Policy\n{rules}\n\nAnswer with one action and nothing else."
)
_EVERYDAY = Domain("everyday", "support agent", FIELDS, ACTIONS, ())
_EVERYDAY_RULE = "If {holds}, the action is {action}."
_EVERYDAY_PROMPT = "You are a {role}.\n\nNotes:\n{block}\n\nRules:\n{rules}\n\nAnswer with the action only."


def run(
    model: Model,
    count: int,
    path: Path,
    *,
    everyday: bool = False,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Change one line in each of `count` blocks of each kind, in every mode, and compare with full prefill."""
    drawn = list(cases(count, everyday=everyday))
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="Agreement with full prefill after a line of a block has changed, by edit mode",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for case in drawn),
        seeds=[SEED],
        settings={"count": count} | ({"everyday": True} if everyday else {}),
    )
    recorder.collect(
        drawn,
        lambda it: {"kind": it.kind, "number": it.number},
        lambda it: {"kind": it.kind, "number": it.number, **_measured(model, it)},
        report,
    )
    return recorder.finish(summarise(recorder.rows))


def notebook_of(model: Model, case: Case, *, asked: bool) -> Notebook:
    """A prefilled notebook with the policy, and with the request if `asked`."""
    notebook = Notebook(model).message("system", case.prompt, **{NAME: Field.block(case.old)})
    if asked:
        notebook.message("user", case.asked)
    notebook.prefill()
    return notebook


def _measured(model: Model, case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"old": case.right_before, "new": case.right_after}
    for layout in LAYOUTS:
        notebook = notebook_of(model, case, asked=layout == "asked before")
        prompt = None if layout == "asked before" else case.asked
        row[layout] = {"before": notebook.decide(prompt, case.options).choice}
        for mode in Mode:
            mark = notebook.mark()
            decision = notebook.decide(prompt, case.options, edits={NAME: case.new}, mode=mode)
            notebook.rollback(mark)
            row[layout][str(mode)] = {
                "choice": decision.choice,
                "tokens_computed": decision.account.tokens_computed,
            }
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement of each mode with full prefill (Wilson intervals), by kind of change and by layout.

    Only cases that full prefill gets right before and after the change count: otherwise there is no decision to
    preserve.
    """
    groups = {"all": rows, **{kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}}
    return {
        group: {layout.replace(" ", "_"): _agreement(members, layout) for layout in LAYOUTS}
        for group, members in groups.items()
    }


def _agreement(rows: list[dict[str, Any]], layout: str) -> dict[str, Any]:
    counted = [
        row[layout]
        for row in rows
        if row[layout]["before"] == row["old"] and row[layout][Mode.FULL]["choice"] == row["new"]
    ]
    part: dict[str, Any] = {"drawn": len(rows), "counted": len(counted)}
    for mode in Mode:
        agreed = sum(row[mode]["choice"] == row[Mode.FULL]["choice"] for row in counted)
        tokens = [row[mode]["tokens_computed"] for row in counted]
        part[str(mode)] = {
            "agreement": wilson(agreed, len(counted)).model_dump(),
            "mean_tokens_computed": round(sum(tokens) / max(1, len(tokens)), 1),
        }
    return part
