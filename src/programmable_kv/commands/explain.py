"""`pkv explain-miss`: explains from a log of requests why a prefix cache missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from programmable_kv.commands.common import err, out, progress
from programmable_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from programmable_kv.explain.report import MissCause, MissReport, RequestFinding

_WIDTH_OF_NAMES = 9


def explain_miss(
    logs: Annotated[
        list[Path],
        typer.Argument(
            help="a log with one request on each line, or two files with a request each; '-' is standard input"
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="count in this model's tokens: 'embedded', a Hub id, a folder, a .gguf file"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="tokens in a block of the engine's cache, with --model")] = 16,
    prices: Annotated[Path | None, typer.Option(help="a JSON file with prices, instead of the built-in table")] = None,
    html: Annotated[Path | None, typer.Option(help="write the report to this HTML page")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="print no text of a prompt")] = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="leave out lines that cannot be read, and count them")
    ] = False,
    top: Annotated[int, typer.Option(help="how many causes are shown in detail")] = 5,
) -> None:
    """Explain why a prefix cache missed, from a log of requests.

    For each request the report has the first difference from what was sent before, its cause, what it cost, and the
    fix.

    Reads Chat Completions, Responses and Messages requests, as they are or inside the objects of a log. Nothing is sent
    anywhere, and no model is loaded.
    """
    if top < 1:
        raise InvalidArgumentError(f"--top is at least 1, got {top}")
    from programmable_kv.explain.explain import explain_miss as explained

    with progress("Requests", 0) as tell:
        report = explained(
            *logs, model=model, block_size=block_size, prices=prices, skip_bad_lines=skip_bad_lines, show_text=not no_text,
            progress=tell,
        )  # fmt: skip
    if html is not None:
        from programmable_kv.explain.page import page

        html.write_text(page(report), encoding="utf-8", errors="replace")
        err.print(f"wrote {html}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1, ensure_ascii=False).encode("utf-8", "replace"))
        return
    _show(report, top)


def _show(report: MissReport, top: int) -> None:
    from rich.markup import escape

    out.print(f"[bold]{escape(report.headline)}[/bold]", highlight=False)
    if report.causes:
        _show_ranking(report)
    by_number = {finding.number: finding for finding in report.findings}
    for rank, cause in enumerate(report.causes[:top], start=1):
        _show_cause(rank, cause, by_number[cause.worst], report)
    if len(report.causes) > top:
        out.print(f"\n{len(report.causes) - top} more causes: --top {len(report.causes)} shows them.", highlight=False)
    out.print()
    for note in (*report.notes, *_skipped(report)):
        out.print(_printable(note), markup=False, highlight=False, style="dim")


def _show_ranking(report: MissReport) -> None:
    from rich.table import Table

    money = any(cause.money is not None for cause in report.causes)
    table = Table()
    table.add_column("", justify="right")
    table.add_column("cause", overflow="fold")
    table.add_column("where", overflow="fold")
    for name in ("requests", report.unit, "share", *([report.currency] if money else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for rank, cause in enumerate(report.causes, start=1):
        price = [] if not money else ["" if cause.money is None else _amount(cause.money)]
        table.add_row(
            str(rank),
            cause.name,
            cause.place,
            f"{len(cause.requests):,}",
            f"{cause.lost:,}",
            f"{cause.share:.1%}",
            *price,
        )
    out.print(table)


def _show_cause(rank: int, cause: MissCause, worst: RequestFinding, report: MissReport) -> None:
    from rich.markup import escape

    out.print(f"\n[bold]{rank}. {escape(cause.name)}[/bold]  {escape(cause.what)}", highlight=False)
    rows = [("where", _where(worst)), ("in", _requests(cause, worst))]
    rows += [("line", cause.line)] if cause.line else []
    rows += [("was", worst.before)] if worst.before else []
    rows += [("is", worst.after)] if worst.after else []
    rows += [("behind", "; ".join(worst.behind))] if worst.behind else []
    rows += [("fix", cause.fix)] if cause.fix else []
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(width=_WIDTH_OF_NAMES - 2, justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(_printable(text)))
    out.print(table, highlight=False)


def _where(finding: RequestFinding) -> str:
    if not finding.place:
        return "the whole request"
    at = [f"byte {finding.byte:,}"] if finding.byte is not None else []
    at += [f"token {finding.token:,}"] if finding.token is not None else []
    path = f", {finding.path}" if finding.path and finding.path != finding.place else ""
    return f"{finding.place}{path}{', at ' + ', '.join(at) if at else ''}"


def _requests(cause: MissCause, worst: RequestFinding) -> str:
    text = f"{worst.source}, after request {worst.compared_with}"
    return text if len(cause.requests) == 1 else f"{len(cause.requests)} requests, most in {text}"


def _skipped(report: MissReport) -> list[str]:
    if not report.skipped:
        return []
    lines = "line was" if len(report.skipped) == 1 else "lines were"
    return [f"{len(report.skipped)} {lines} left out. The first: {report.skipped[0]}"]


def _amount(money: float) -> str:
    return f"{money:,.2f}" if money >= 0.1 else f"{money:.4f}"


def _printable(text: str) -> str:
    """Text from a log, without characters that would control a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
