"""Where does `readers` fail without declared words, and do `mentions` and `suggest_readers` fix it?

Cases are grouped by how the rules refer to the field. Three arms use `readers`: with the lines that name the field,
with the words that an author would declare, and with the lines that `suggest_readers` finds missing (declared, then
edited). The errata run for comparison.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.notebook.suggesting import SHARE
from programmable_kv.records import Record, Recorder, digest_of, wilson
from programmable_kv.scenarios.mentioned import WAYS, Mentioned, mentioned

SEED = 92_000
BY_NAME = "by_name"
DECLARED = "declared"
SUGGESTED = "suggested"
ARMS = (BY_NAME, DECLARED, SUGGESTED, str(Mode.ERRATUM), str(Mode.FIELD_ERRATUM), str(Mode.IN_PLACE))


def cases(count: int) -> Iterator[tuple[int, Mentioned]]:
    """Yield `count` policies of each way, in turn, with their numbers. A longer draw starts with a shorter one."""
    for number in range(count):
        for way in WAYS:
            yield number, mentioned(random.Random(f"{SEED}/{way.name}/{number}"), way, number)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Change the field of `count` policies of each way, in every arm, and compare with full prefill."""
    drawn = list(cases(count))
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="Agreement with full prefill of readers that are named, declared and suggested",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for _, case in drawn),
        seeds=[SEED],
        settings={"count": count, "share": SHARE},
    )
    recorder.collect(
        drawn,
        lambda it: {"number": it[0], "way": it[1].way.name},
        lambda it: {"number": it[0], **_row(model, it[1])},
        report,
    )
    return recorder.finish(summarise(recorder.rows))


def _row(model: Model, case: Mentioned) -> dict[str, Any]:
    notebook = notebook_of(model, case)
    return outcome(notebook, case) | arms(notebook, case)


def notebook_of(model: Model, case: Mentioned) -> Notebook:
    """A prefilled notebook with the policy and the request, and nothing declared."""
    notebook = written(Notebook(model), case, case.values)
    notebook.prefill()
    return notebook


def written(notebook: Notebook, case: Mentioned, values: Mapping[str, str]) -> Notebook:
    """Add the policy and the request: as messages, or as raw text for a model without a chat template."""
    if notebook.model.has_chat_template:
        return notebook.message("system", case.prompt, **values).message("user", case.asked)
    return notebook.text(f"{case.prompt}\n\nQuestion: {case.asked}\nAnswer:", **values)


def outcome(notebook: Notebook, case: Mentioned) -> dict[str, Any]:
    """The right actions under both values, and what full prefill decides."""
    return {
        "way": case.way.name, "field": case.field, "old": case.actions[case.old], "new": case.actions[case.new],
        "before": notebook.decide(None, case.options).choice, "full": edited(notebook, case, Mode.FULL),
    }  # fmt: skip


def solved(row: dict[str, Any]) -> bool:
    """Whether full prefill is right under both values."""
    return bool(row["before"] == row["old"] and row["full"]["choice"] == row["new"])


def arms(notebook: Notebook, case: Mentioned) -> dict[str, Any]:
    """The suggestions of `suggest_readers`, and the decision of each arm."""
    suggestions = notebook.suggest_readers(case.field, case.new)
    row: dict[str, Any] = {
        "suggesting": {
            "tokens_computed": suggestions.account.tokens_computed,
            "lines": [
                {"share": round(line.share, 4), "decides": _decides(line.text, case), "known": bool(line.known)}
                for line in suggestions.lines
            ],
        }
    }
    words: dict[str, tuple[str, ...]] = {BY_NAME: (), DECLARED: case.declared, SUGGESTED: suggestions.words}
    for arm in ARMS:
        if arm in words:
            row[arm] = edited(declaring(notebook, case.field, words[arm]), case, Mode.READERS)
        else:
            row[arm] = edited(notebook, case, Mode(arm))
    return row


def _decides(line: str, case: Mentioned) -> bool:
    return any(action in line for action in case.options)


def declaring(notebook: Notebook, name: str, words: tuple[str, ...]) -> Notebook:
    """A copy of the notebook with these words declared."""
    other = notebook.fork()
    return other.mentions(name, *words) if words else other


def edited(notebook: Notebook, case: Mentioned, mode: Mode) -> dict[str, Any]:
    """The decision after the edit. Rolls the notebook back."""
    mark = notebook.mark()
    decision = notebook.decide(None, case.options, edits={case.field: case.new}, mode=mode)
    notebook.rollback(mark)
    return measured(decision)


def measured(decision: Decision) -> dict[str, Any]:
    return {"choice": decision.choice, "tokens_computed": decision.account.tokens_computed}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement (Wilson) and what the suggestions found, by way, where full prefill is right under both values."""
    ways = {way.name: [row for row in rows if row["way"] == way.name] for way in WAYS}
    return {name: part_of(found, ARMS) for name, found in {"all": rows, **ways}.items()}


def part_of(rows: list[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """Summarise some rows. Only those that full prefill solves count."""
    right = [row for row in rows if solved(row)]
    part: dict[str, Any] = {"drawn": len(rows), "counted": len(right), "suggesting": _found(right)}
    part["full"] = {"mean_tokens_computed": _mean([row["full"]["tokens_computed"] for row in right])}
    for arm in arms:
        agreed = sum(row[arm]["choice"] == row["full"]["choice"] for row in right)
        part[arm] = {
            "agreement": wilson(agreed, len(right)).model_dump(),
            "mean_tokens_computed": _mean([row[arm]["tokens_computed"] for row in right]),
        }
    return part


def _found(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of deciding lines that were suggested or known, and the number of other suggested lines per policy."""
    lines = [line for row in rows for line in row["suggesting"]["lines"]]
    deciding = [line for line in lines if line["decides"]]
    others = [line for line in lines if not line["decides"] and not line["known"]]
    found = sum(line["known"] or line["share"] >= SHARE for line in deciding)
    return {
        "found": wilson(found, len(deciding)).model_dump(),
        "other_lines": round(sum(line["share"] >= SHARE for line in others) / max(1, len(rows)), 2),
        "mean_tokens_computed": _mean([row["suggesting"]["tokens_computed"] for row in rows]),
    }


def _mean(values: list[int]) -> float:
    return round(sum(values) / max(1, len(values)), 1)
