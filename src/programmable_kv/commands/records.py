"""`pkv results` and `pkv figures`: list the records of measurements, and draw figures from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from programmable_kv.commands.common import out


def results(as_json: Annotated[bool, typer.Option("--json", help="print the summaries as JSON")] = False) -> None:
    """List the records in results/."""
    from programmable_kv.records import all_records

    records = all_records()
    if as_json:
        print(json.dumps({r.name: r.model_dump(mode="json")["summary"] for r in records}, indent=1))
        return
    console = out.console
    from rich.table import Table

    table = Table()
    table.add_column("record", overflow="fold", ratio=1)
    for column in ("rows", "fingerprint", "started", "minutes"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        table.add_row(
            r.name, str(len(r.rows)), r.model_fingerprint[:8], f"{r.started:%Y-%m-%d}", f"{r.wall_seconds / 60:.1f}"
        )
    console.print(table)


def figures(folder: Annotated[Path, typer.Option(help="the documents' folder")] = Path("docs")) -> None:
    """Draw every figure, and update every number that the documents quote, from the records in results/."""
    from programmable_kv.extras import require_extra

    require_extra("lab", "matplotlib")
    from programmable_kv.figures import draw_all
    from programmable_kv.quotes import documents, refreshed

    for path in draw_all(folder / "figures"):
        out.print(str(path))
    for path in documents(folder):
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")
