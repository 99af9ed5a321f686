"""`pkv zoo`: checks on which architectures relocation is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from programmable_kv.commands.common import OutOption, command, out, progress, record_path


def zoo(
    types: Annotated[
        list[str] | None, typer.Option("--type", help="only this transformers model type; repeatable, writes no page")
    ] = None,
    out_path: OutOption = None,
    page: Annotated[
        Path, typer.Option(help="the page of the support matrix, written if every type is examined")
    ] = Path("docs/architectures.md"),
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Check on which architectures relocation is exact, with a tiny random model of every decoder type."""
    from rich.table import Table

    from programmable_kv.lab.zoo import examine_apart, run, variants_named
    from programmable_kv.lab.zoo_page import page as written

    wanted = variants_named(types or [])
    with progress("Architectures", len(wanted)) as report:
        if types and out_path is None:
            rows = []
            for number, each in enumerate(wanted, start=1):
                rows.append(examine_apart(each))
                report(number, len(wanted))
        else:
            record = run(record_path(out_path, "zoo"), wanted, command=command(), report=report)
            rows = record.rows
            if not types:
                page.write_text(written(record), encoding="utf-8")
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table()
    for column in ("type", "verdict", "what rotates", "worst", "reason"):
        table.add_column(column, overflow="fold")
    for row in rows:
        side = "" if row["side"] == "causal LM" else f" ({row['side']})"
        table.add_row(
            row["type"] + side,
            row["verdict"],
            row.get("family", ""),
            f"{row.get('worst', float('nan')):.0e}",
            row["reason"],
        )
    out.print(table)
