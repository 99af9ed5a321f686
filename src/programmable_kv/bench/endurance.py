"""Hundreds of edits on one cache: measures whether it grows, slows down, or drifts from a full prefill's decisions.

The five fields of one policy change in turn. After every edit the bench decides a request and rolls it back, so all
added tokens come from edits. At every `COMPARED_EVERY`-th edit, a full prefill with the current values decides the same
request. At the end the errata are folded back into the text.
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
"""Edits that one row sums up."""
COMPARED_EVERY = 3
"""Edits from one comparison with a full prefill to the next. It does not divide the number of fields, so every field is
compared."""
CLOCK = "Time of the last message: {clock}.\n\n"
"""A fifth field that decides nothing, as in the prompts of many agents."""


def run(
    model: Model,
    path: Path,
    *,
    edits: int = EDITS,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Edit, decide and compare, and write a row for every `STRETCH` edits. An interrupted run starts again."""
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
    """Give one field its other value (or advance the clock), and decide a request that depends on a field."""
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
    assert isinstance(ledger, Ledger), "the bench needs a notebook with causal visibility"
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
    """Tokens, milliseconds, bytes and runs of the last stretch over those of the first; and rates of agreement."""
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
