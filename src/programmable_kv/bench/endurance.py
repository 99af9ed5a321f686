"""Hundreds of edits on one cache: does it grow, slow down, or drift from what a full prefill decides?

One policy with five fields that change in turn. After every edit a request is decided, and taken back. From time to time the
same request is put to a full prefill of the values in force. The turns are not kept, so every token that is added comes from
edits. At the end the errata are folded back into the text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.demo.demo import CASES, VALUES, policy
from programmable_kv.edits.modes import DEFAULT_MODE
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of, wilson

EDITS = 200
STRETCH = 20
"""edits that one row sums up"""
COMPARED_EVERY = 3
"""edits between two comparisons with a full prefill; no divisor of the fields, so that each is compared"""
CLOCK = "Time of the last message: {clock}.\n\n"
"""a fifth field, which decides nothing, as agents have it"""


def run(
    model: Model,
    path: Path,
    *,
    edits: int = EDITS,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Edit, decide and compare; a row for every `STRETCH` edits. A run that is interrupted begins again."""
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="Edits of five fields in turn on one cache",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of([CLOCK, policy(), *VALUES.values()]),
        seeds=[],
        settings={"edits": edits, "stretch": STRETCH, "compared_every": COMPARED_EVERY, "mode": str(DEFAULT_MODE)},
    )
    recorder.rows.clear()
    values = {"clock": "09:00", **VALUES}
    notebook = _prefilled(model, values)
    began = len(notebook)
    stretch: list[dict[str, Any]] = []
    for number in range(edits):
        stretch.append(_step(notebook, values, number))
        if len(stretch) == STRETCH or number == edits - 1:
            recorder.add({"edits": number + 1, **_summed(notebook, stretch)})
            stretch = []
        if report is not None:
            report(number + 1, edits)
    account = notebook.rebase()
    after = {"tokens_at_start": began, "tokens_after_rebase": len(notebook), "exact_after_rebase": account.exact}
    return recorder.finish(summarise(recorder.rows) | after)


def _prefilled(model: Model, values: dict[str, str]) -> Notebook:
    notebook = Notebook(model).message("system", CLOCK + policy(), **values)
    notebook.prefill()
    return notebook


def _step(notebook: Notebook, values: dict[str, str], number: int) -> dict[str, Any]:
    """One field takes its other value (the clock moves on), and a request is decided that depends on a field."""
    turn = number % (len(CASES) + 1)
    case = CASES[turn] if turn < len(CASES) else CASES[number // len(CASES) % len(CASES)]
    if turn < len(CASES):
        changed = {case.field: VALUES[case.field] if values[case.field] == case.value else case.value}
    else:
        changed = {"clock": f"{9 + number // 60:02}:{number % 60:02}"}
    values |= changed
    account = notebook.edit(changed, mode=DEFAULT_MODE)
    options = [case.before, case.after]
    decision = notebook.decide(case.request, options)
    row: dict[str, Any] = {"ms": 1e3 * account.seconds, "tokens": account.tokens_computed}
    if number % COMPARED_EVERY == 0:
        row["agrees"] = _full(notebook.model, values, case.request, options).choice == decision.choice
        row["right"] = decision.choice == (case.after if values[case.field] == case.value else case.before)
    return row


def _full(model: Model, values: dict[str, str], request: str, options: list[str]) -> Decision:
    return _prefilled(model, values).decide(request, options)


def _summed(notebook: Notebook, steps: list[dict[str, Any]]) -> dict[str, Any]:
    ledger = notebook._state.ledger
    assert isinstance(ledger, Ledger), "the bench runs a notebook whose visibility is causal"
    compared = [step for step in steps if "agrees" in step]
    return {
        "context_tokens": len(notebook),
        "cache_bytes": notebook.cache.capacity * notebook.cache.bytes_per_token,
        "runs": len(ledger.runs),
        "errata": sum(part.kind == "erratum" for part in notebook.parts),
        "edit_ms": round(statistics.median(step["ms"] for step in steps), 3),
        "edit_tokens": round(statistics.mean(step["tokens"] for step in steps), 2),
        "compared": len(compared),
        "agrees": sum(step["agrees"] for step in compared),
        "right": sum(step["right"] for step in compared),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last stretch over the first one, of tokens, milliseconds and bytes; and how often the decisions agreed."""
    first, last = rows[0], rows[-1]
    compared = sum(row["compared"] for row in rows)
    growth = {
        name: round(last[name] / first[name], 3)
        for name in ("context_tokens", "cache_bytes", "edit_ms", "edit_tokens", "runs")
    }
    return {
        "last_over_first": growth,
        "agreement": wilson(sum(row["agrees"] for row in rows), compared).model_dump(),
        "right": wilson(sum(row["right"] for row in rows), compared).model_dump(),
        "most_errata": max(row["errata"] for row in rows),
    }
