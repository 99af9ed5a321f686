"""Which edits need more than the field itself? What each edit does to the decision is known; can a rule tell it?

Three fields of a policy are edited: the one that the question is about, one of another set of rules, and one that no
rule names. An edit needs more if the decision after it, made in place, differs from a full prefill's. The published
rule compares cheap edits: the erratum is needed if the field with an erratum decides otherwise than the stale cache, by
a margin, and otherwise than the field alone. The other rule costs nothing: some line after the field names it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments.cases import SEED, domain_names
from programmable_kv.lab.experiments.dose import cached
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import known_of
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import share
from programmable_kv.lab.tools.naming import naming, settled
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.readers import Why
from programmable_kv.scenarios.grammar import other_value

ASKED, OTHER, UNREAD = "asked", "other", "unread"
KINDS = (ASKED, OTHER, UNREAD)
STALE = "stale"
MODES = (Mode.IN_PLACE, Mode.FIELD_ERRATUM, Mode.FULL)
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
PUBLISHED = 0.2
"""The published margin."""
Edit = Mapping[str, Any]


def edits(pair: Pair) -> Iterator[tuple[str, str, str]]:
    """Yield kind, field and new value of each edit. A kind that the policy has no field for is left out."""
    rng, case = random.Random(f"{SEED}/diagnosis/{pair.case.number}"), pair.case
    yield ASKED, case.gate.field, pair.change[1]
    for gate in case.scenario.gates:
        if gate.field != case.gate.field:
            yield OTHER, gate.field, other_value(rng, gate, case.scenario.values[gate.field])
            break
    for name, values in sorted(case.scenario.irrelevant.items()):
        if values:
            yield UNREAD, name, rng.choice(list(values))
            break


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """By kind of edit, what each mode decides, and its probabilities of that choice and of the stale decision.

    The edits are the notebook's own, but their rows are computed together (`naming`).
    """
    shared = known_of(pair)
    model, engine = naming(pair.model, shared)
    notebook = cached(replace(pair, model=model))
    opening = pair.text.ids[len(notebook) :]
    edited = {kind: (name, value) for kind, name, value in edits(pair)}
    asks = {STALE: partial(likelihoods, pair, notebook, opening)}
    for kind, (name, value) in edited.items():
        for mode in MODES:
            asks[f"{kind}.{mode}"] = partial(likelihoods, pair, notebook, opening, {name: value}, mode)
    found = settled(engine, asks)
    before = _likeliest(found[STALE])
    row: Row = {"right": pair.actions[0], "before": before, "edits": {}}
    for kind, (name, _value) in edited.items():
        edit: dict[str, Any] = {"named": named(notebook, name)}
        for mode in MODES:
            scores = found[f"{kind}.{mode}"]
            choice = _likeliest(scores)
            edit[str(mode)] = {"choice": choice, "p": round(scores[choice], 5), "stale": round(scores[before], 5)}
        row["edits"][kind] = edit
    return row


def _likeliest(scores: Mapping[str, float]) -> str:
    return max(scores, key=lambda action: scores[action])


def likelihoods(
    pair: Pair,
    notebook: Notebook,
    opening: Sequence[int],
    edit: Mapping[str, str] | None = None,
    mode: Mode = Mode.IN_PLACE,
) -> dict[str, float]:
    """The probability of each action's first token after an answer's opening, and after an edit if one is given.

    It is a probability among all tokens.

    The notebook is unchanged.
    """
    mark = notebook.mark()
    if edit is not None:
        notebook.edit(edit, mode=mode)
    logits = notebook.model.engine.append(notebook.cache, opening)[-1]
    notebook.rollback(mark)
    found = torch.softmax(logits.cpu().double(), dim=-1)
    return {action: float(found[token]) for action, token in pair.first_tokens.items()}


def named(notebook: Notebook, name: str) -> bool:
    """Whether a line after the field mentions it."""
    return any(reader.why is Why.MENTIONS for reader in notebook.readers(name))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """How often each kind of edit needs more than the field, and how well each rule tells that.

    `calibrated`: the published rule with its margin chosen on one half of the domains and scored on the other, both
    ways.
    """
    edited = [
        {"domain": row["domain"], "kind": kind, "before": row["before"], **edit}
        for row in rows
        for kind, edit in row["edits"].items()
    ]
    summary: dict[str, Any] = {"edits": len(edited), "kinds": {}}
    for kind in KINDS:
        own = [edit for edit in edited if edit["kind"] == kind]
        summary["kinds"][kind] = {
            "needs": share(own, needs),
            "erratum_suffices": share(own, suffices),
            "named": share(own, lambda edit: bool(edit["named"])),
        }
    halves = _halves(edited)
    margins = [chosen(half) for half in halves]
    flagged = [
        (edit, published(edit, margin)) for half, margin in zip(halves[::-1], margins, strict=True) for edit in half
    ]
    summary["margins"] = dict(zip(("from_first_half", "from_second_half"), margins, strict=True))
    summary["rules"] = {
        "published": _scored([(edit, published(edit, PUBLISHED)) for edit in edited]),
        "calibrated": _scored(flagged),
        "named": _scored([(edit, bool(edit["named"])) for edit in edited]),
        "always": _scored([(edit, True) for edit in edited]),
    }
    return summary


def needs(edit: Edit) -> bool:
    """The truth: the decision after an edit in place differs from a full prefill's."""
    return bool(edit[Mode.IN_PLACE]["choice"] != edit[Mode.FULL]["choice"])


def suffices(edit: Edit) -> bool:
    """Whether the field with an erratum is decided as by a full prefill."""
    return bool(edit[Mode.FIELD_ERRATUM]["choice"] == edit[Mode.FULL]["choice"])


def published(edit: Edit, margin: float) -> bool:
    """The published rule's answer. It uses only edits that need no full prefill."""
    both, alone = edit[Mode.FIELD_ERRATUM], edit[Mode.IN_PLACE]
    surer = both["choice"] != edit["before"] and both["p"] - both["stale"] > margin
    return bool(surer and alone["choice"] != both["choice"])


def chosen(edited: Sequence[Edit]) -> float:
    """The margin that is right most often; of equals, the smallest."""
    return max(MARGINS, key=lambda margin: (sum(published(edit, margin) == needs(edit) for edit in edited), -margin))


def _halves(edited: Sequence[Edit]) -> list[list[Edit]]:
    half = {name: number % 2 for number, name in enumerate(domain_names())}
    return [[edit for edit in edited if half[edit["domain"]] == which] for which in range(2)]


def _scored(flagged: Sequence[tuple[Edit, bool]]) -> dict[str, Any]:
    """Precision, recall and accuracy, each a share with its interval."""
    pairs = [{"domain": edit["domain"], "needs": needs(edit), "flagged": flag} for edit, flag in flagged]
    return {
        "precision": share(pairs, partial(_given, "flagged", "needs")),
        "recall": share(pairs, partial(_given, "needs", "flagged")),
        "accuracy": share(pairs, lambda each: bool(each["needs"] == each["flagged"])),
    }


def _given(condition: str, outcome: str, each: Mapping[str, Any]) -> bool | None:
    return bool(each[outcome]) if each[condition] else None


DIAGNOSIS = Experiment(
    name="diagnosis",
    version=1,
    title="Whether it can be told which edits need more than the field itself",
    measure=measure,
    summarise=summarise,
    scenarios=384,
    sets=2,
    seconds=1.9,
)
