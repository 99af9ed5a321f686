"""`pkv demo` and `pkv edit`: edit fields of a cached prompt in every mode, and compare the decisions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.commands.common import (
    ModelOption,
    decoded,
    listed,
    load,
    out,
    pairs,
    progress,
    read_bytes,
)
from programmable_kv.errors import (
    InvalidEditError,
    InvalidOptionsError,
    TemplateError,
    UnknownFieldError,
    UnverifiedError,
)

if TYPE_CHECKING:
    from rich.table import Table

    from programmable_kv import Decision, Field, Mode, Model, Notebook


def demo(
    model: ModelOption = "embedded",
    page: Annotated[Path, typer.Option(help="where to write the HTML page")] = Path("pkv-demo.html"),
) -> None:
    """Edit four fields of a cached policy, and compare every edit mode with a full prefill."""
    from programmable_kv.demo.demo import CASES, VALUES, html_page, run

    page.parent.mkdir(parents=True, exist_ok=True)
    loaded = load(model)
    results = []
    with progress("Editing a cached policy", len(CASES)) as report:
        for number, result in enumerate(run(loaded), start=1):
            results.append(result)
            report(number, len(CASES))
    for case, before, outcomes in results:
        table = _table(f"{case.field}: {VALUES[case.field]} → {case.value}", before)
        table.add_column("faster", justify="right", no_wrap=True)
        for o in outcomes:
            table.add_row(*_cells(o.mode, o.decision, o.agrees), f"{o.ratio:.1f}x")
        out.print(table)
    page.write_text(html_page(loaded.name, results), encoding="utf-8")
    out.print(f"The tokens of every mode, coloured by state: {page}", soft_wrap=True)


def edit(
    prompt: Annotated[
        Path, typer.Option(allow_dash=True, help="a text file with {field} placeholders; - is standard input")
    ],
    field: Annotated[
        list[str],
        typer.Option(help="name=value, or name=@file: the value in the first cached prompt; repeatable"),
    ],
    set_: Annotated[list[str], typer.Option("--set", help="name=value, or name=@file: the new value; repeatable")],
    ask: Annotated[str, typer.Option(help="the question")],
    options: Annotated[
        str | None,
        typer.Option(help="the possible answers, separated by commas; quote one that has a comma: '\"Yes, do\",No'"),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="one possible answer; repeatable")] = None,
    model: ModelOption = "embedded",
    raw: Annotated[bool, typer.Option(help="give the prompt as raw text, without the chat template")] = False,
    mode: Annotated[
        list[str] | None, typer.Option(help="only these modes (full prefill is always run); repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Edit a field of your own prompt in every mode, and compare the decisions with a full prefill's.

    The question is part of the cached context, as for an agent that is asked first and then learns that its state
    changed.
    """
    data = read_bytes(prompt)
    text = decoded(data, prompt)
    fields, changes = pairs(field, "--field"), pairs(set_, "--set")
    choices = _choices(options, option)
    _check_fields(text, fields, changes)
    modes = _modes(mode)

    loaded = load(model)
    raw = raw or not loaded.has_chat_template
    notebook = _cached(loaded, text, _declared(fields, changes), ask, raw=raw)
    end = "Answer:" if raw else None  # after what an edit appends
    before = notebook.decide(end, choices)
    trials: list[_Trial] = []
    with progress("Editing", len(modes)) as report:
        for number, each in enumerate(modes, start=1):
            trials.append(_tried(notebook, end, choices, changes, each))
            report(number, len(modes))
    full = trials[0].decision
    assert full is not None, "full prefill is never refused silently"
    if as_json:
        body = {
            "modes": [trial.row(full) for trial in trials],
            "before": before.choice,
            "context_tokens": len(notebook),
            "prompt_sha256": hashlib.sha256(data).hexdigest(),
            "model": loaded.name,
            "model_fingerprint": loaded.fingerprint,
        }
        print(json.dumps(body, ensure_ascii=False, indent=1))
        return
    table = _table(", ".join(set_), before)
    for trial in trials:
        if trial.decision is None:
            table.add_row(str(trial.mode), "[yellow]refused[/]")
        else:
            table.add_row(*_cells(trial.mode, trial.decision, trial.decision.choice == full.choice))
    out.print(table)
    if full.choice == before.choice:
        out.print(
            "Full prefill decides the same before and after the edit, so this question cannot tell the modes apart."
        )
    for trial in trials:
        if trial.note:
            out.print(f"{trial.mode}: {trial.note}", markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one mode decided, or why the model refuses the mode."""

    mode: Mode
    decision: Decision | None
    note: str

    def row(self, full: Decision) -> dict[str, Any]:
        if self.decision is None:
            return {"mode": str(self.mode), "decision": None, "note": self.note}
        return {
            "mode": str(self.mode),
            "decision": self.decision.choice,
            "probabilities": {choice: round(value, 6) for choice, value in self.decision.probabilities.items()},
            "agrees_with_full": self.decision.choice == full.choice,
            "tokens_computed": self.decision.account.tokens_computed,
            "ttft_ms": round(self.decision.ttft_ms, 3),
            "note": self.note,
        }


def _choices(options: str | None, option: list[str] | None) -> list[str]:
    choices = [*(listed(options, "--options") if options is not None else []), *(option or [])]
    if len(choices) < 2:
        raise InvalidOptionsError(
            f"a decision needs at least two answers, got {choices}. Give --options a,b or --option once for each."
        )
    return choices


def _check_fields(text: str, fields: dict[str, str], changes: dict[str, str]) -> None:
    """Report a mistyped field name before a model is loaded."""
    for name in fields:
        if "{" + name + "}" not in text:
            raise UnknownFieldError(
                f"the prompt has no placeholder {{{name}}} for --field {name}. Write it where the value belongs, or leave the "
                "field out."
            )
    for name in changes:
        if name not in fields:
            raise UnknownFieldError(f"there is no field {name!r} to --set; the fields are: {', '.join(fields)}")
    if all(fields[name] == value for name, value in changes.items()):
        raise InvalidEditError("--set gives the same values as --field, so nothing is edited: give another value")


def _modes(names: Iterable[str] | None) -> list[Mode]:
    """Full prefill, which the others are compared with, then the modes asked for; all modes if none was named."""
    from programmable_kv.edits.modes import Mode, parse_mode

    wanted = {parse_mode(name) for name in names} if names else set(Mode)
    return [Mode.FULL, *(mode for mode in Mode if mode in wanted and mode is not Mode.FULL)]


def _declared(fields: dict[str, str], changes: dict[str, str]) -> dict[str, str | Field]:
    """The fields' values. A field that has several lines before or after the edit is a block."""
    from programmable_kv import Field

    return {
        name: Field.block(value) if "\n" in value or "\n" in changes.get(name, "") else value
        for name, value in fields.items()
    }


def _cached(model: Model, text: str, fields: dict[str, str | Field], ask: str, *, raw: bool) -> Notebook:
    """A notebook with the prompt and the question, prefilled."""
    from programmable_kv import Notebook

    notebook = Notebook(model)
    if raw:
        notebook.text(text, **fields).text(f"\n{ask}\n")
    else:
        notebook.message("system", text.strip(), **fields).message("user", ask)
    with progress("Prefilling", 1) as report:
        notebook.prefill(progress=report)
    return notebook


def _tried(notebook: Notebook, end: str | None, choices: list[str], changes: dict[str, str], mode: Mode) -> _Trial:
    """Edit, decide, and undo the edit."""
    from programmable_kv import Mode

    mark = notebook.mark()
    try:
        decision = notebook.decide(end, choices, edits=changes, mode=mode)
    except (UnverifiedError, TemplateError) as error:
        if mode is Mode.FULL:
            raise
        return _Trial(mode, None, str(error))
    finally:
        notebook.rollback(mark)
    return _Trial(mode, decision, decision.account.why)


def _table(title: str, before: Decision) -> Table:
    """A table for the outcomes of edits. With one more column it still fits 80 characters."""
    from rich.markup import escape
    from rich.table import Table

    shown = f"{title}   (before: {before.choice} {before.probabilities[before.choice]:.3f})"
    table = Table(title=escape(shown), title_justify="left")
    table.add_column("mode", no_wrap=True)
    table.add_column("decision", overflow="fold", min_width=12)
    for column in ("prob.", "as full?", "tokens", "ms"):
        table.add_column(column, justify="right" if column in ("tokens", "ms") else "left", no_wrap=True)
    return table


def _cells(mode: str, decision: Decision, agrees: bool) -> list[str]:
    from rich.markup import escape

    return [
        str(mode),
        escape(decision.choice),
        f"{decision.probabilities[decision.choice]:.3f}",
        "[green]yes[/]" if agrees else "[red]no[/]",
        str(decision.account.tokens_computed),
        f"{decision.ttft_ms:.0f}",
    ]
