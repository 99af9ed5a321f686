"""`pkv demo` and `pkv edit`: fields of a cached prompt, edited in every mode."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from programmable_kv.commands.common import ModelOption, out, pairs, progress, read_text
from programmable_kv.errors import InvalidOptionsError, TemplateError, UnverifiedError


def demo(
    model: ModelOption = "embedded",
    page: Annotated[Path, typer.Option(help="where to write the HTML page")] = Path("pkv-demo.html"),
) -> None:
    """Flip four fields of one cached policy; every edit mode against a full prefill."""
    from programmable_kv.demo.demo import CASES, VALUES, html_page, run
    from programmable_kv.models.load import load_model

    page.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_model(model)
    results = []
    with progress("Editing a cached policy", len(CASES)) as report:
        for number, result in enumerate(run(loaded), start=1):
            results.append(result)
            report(number, len(CASES))
    for case, before, outcomes in results:
        table = Table(
            title=f"{case.field}: {VALUES[case.field]} → {case.value}   (before: {before.choice} "
            f"{before.probabilities[before.choice]:.3f})",
            title_justify="left",
        )
        for column in ("mode", "decision"):
            table.add_column(column, min_width=13)
        for column in ("probability", "as full prefill?"):
            table.add_column(column)
        for column in ("tokens", "ms", "times faster"):
            table.add_column(column, justify="right")
        for o in outcomes:
            chosen = o.decision.choice
            table.add_row(
                str(o.mode), chosen, f"{o.decision.probabilities[chosen]:.3f}", "[green]yes[/]" if o.agrees else "[red]no[/]",
                str(o.decision.account.tokens_computed), f"{o.decision.ttft_ms:.0f}", f"{o.ratio:.1f}",
            )  # fmt: skip
        out.print(table)
    page.write_text(html_page(loaded.name, results), encoding="utf-8")
    out.print(f"The tokens of every mode, coloured by state: {page.resolve()}")


def edit(
    prompt: Annotated[Path, typer.Option(help="a text file with {field} placeholders")],
    field: Annotated[list[str], typer.Option(help="name=value, as the prompt is first cached; repeatable")],
    set_: Annotated[list[str], typer.Option("--set", help="name=value, the edit; repeatable")],
    ask: Annotated[str, typer.Option(help="the question")],
    options: Annotated[str, typer.Option(help="the possible answers, separated by commas")],
    model: ModelOption = "embedded",
    raw: Annotated[bool, typer.Option(help="give the prompt as raw text, without the chat template")] = False,
    mode: Annotated[
        list[str] | None, typer.Option(help="only these modes (full prefill is always run); repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Edit a field of your own prompt in every mode, and compare the decisions with a full prefill's.

    The question is part of the cached context, as in an agent that is asked and then learns that its state changed.
    """
    from programmable_kv.edits.modes import Mode, parse_mode
    from programmable_kv.models.load import load_model
    from programmable_kv.notebook.notebook import Notebook

    text = read_text(prompt)
    fields, changes = pairs(field, "--field"), pairs(set_, "--set")
    choices = [option.strip() for option in options.split(",") if option.strip()]
    if len(choices) < 2:
        raise InvalidOptionsError(f"--options needs at least two answers separated by commas, got {options!r}")
    loaded = load_model(model)
    notebook = Notebook(loaded)
    raw = raw or not loaded.has_chat_template
    if raw:
        notebook.text(text, **fields).text(f"\n{ask}\n")
    else:
        notebook.message("system", text.strip(), **fields).message("user", ask)
    notebook.prefill()
    end = "Answer:" if raw else None  # after what an edit appends
    before = notebook.decide(end, choices)
    wanted = [parse_mode(name) for name in mode] if mode else list(Mode)
    modes = [Mode.FULL, *(m for m in Mode if m in wanted and m is not Mode.FULL)]
    rows: list[dict[str, Any]] = []
    with progress("Editing", len(modes)) as report:
        for number, each in enumerate(modes, start=1):
            mark = notebook.mark()
            try:
                decision = notebook.decide(end, choices, edits=changes, mode=each)
            except (UnverifiedError, TemplateError) as error:
                if each is Mode.FULL:
                    raise
                rows.append({"mode": str(each), "decision": None, "note": str(error)})
            else:
                full = rows[0]["decision"] if rows else decision.choice
                rows.append(
                    {
                        "mode": str(each),
                        "decision": decision.choice,
                        "probabilities": {k: round(v, 6) for k, v in decision.probabilities.items()},
                        "agrees_with_full": decision.choice == full,
                        "tokens_computed": decision.account.tokens_computed,
                        "ttft_ms": round(decision.ttft_ms, 3),
                        "note": decision.account.why,
                    }
                )
            notebook.rollback(mark)
            report(number, len(modes))
    if as_json:
        body = {
            "modes": rows,
            "before": before.choice,
            "context_tokens": len(notebook),
            "prompt_sha256": hashlib.sha256(prompt.read_bytes()).hexdigest(),
            "model": loaded.name,
            "model_fingerprint": loaded.fingerprint,
        }
        print(json.dumps(body, ensure_ascii=False, indent=1))
        return
    table = Table(title=f"{', '.join(set_)}   (before: {before.choice} {before.probabilities[before.choice]:.3f})")
    table.add_column("mode", no_wrap=True, min_width=13)
    for column in ("decision", "probability", "as full prefill?"):
        table.add_column(column)
    for column in ("tokens", "ms"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in rows:
        if row["decision"] is None:
            table.add_row(row["mode"], "[yellow]refused[/]", "", "", "", "", row["note"])
            continue
        table.add_row(
            row["mode"], row["decision"], f"{row['probabilities'][row['decision']]:.3f}",
            "[green]yes[/]" if row["agrees_with_full"] else "[red]no[/]",
            str(row["tokens_computed"]), f"{row['ttft_ms']:.0f}", row["note"],
        )  # fmt: skip
    out.print(table)
