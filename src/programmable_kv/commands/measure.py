"""`pkv bench`, `pkv lab` and `pkv zoo`: what takes minutes or hours and ends in a record.

An interrupted run keeps its rows; the same command goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.commands.common import ModelOption, OutOption, command, err, out, progress, record_path

if TYPE_CHECKING:
    from programmable_kv.lab.composing.suites import Suite
    from programmable_kv.models.load import Model
    from programmable_kv.records import Record

bench_app = typer.Typer(
    help="How fast: benches against what a user would do instead.", no_args_is_help=True, rich_markup_mode=None
)
lab_app = typer.Typer(
    help="Why it works: experiments on the loaded model.", no_args_is_help=True, rich_markup_mode=None
)

LengthsOption = Annotated[str, typer.Option(help="lengths in tokens, separated by commas")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="measurements of each way")]
DtypeOption = Annotated[str, typer.Option(help="a torch dtype's name, or 'auto' for the one on disk")]
_ALL_LENGTHS = "512,1024,2048,4096,7936"


@bench_app.command("edit")
def bench_edit(
    model: ModelOption = "embedded",
    lengths: LengthsOption = _ALL_LENGTHS,
    repeats: RepeatsOption = 7,
    out_path: OutOption = None,
) -> None:
    """TTFT of every edit mode against full prefill, cloning a cache, and a bare forward."""
    from programmable_kv.bench.edit import run

    _measure_lengths(run, model, out_path, "edit-ttft", lengths, repeats)


@bench_app.command("splice")
def bench_splice(
    model: ModelOption = "embedded",
    lengths: LengthsOption = _ALL_LENGTHS,
    repeats: RepeatsOption = 7,
    out_path: OutOption = None,
) -> None:
    """TTFT of a spliced skill against full prefill, the concatenating way, and a plain copy."""
    from programmable_kv.bench.splice import run

    _measure_lengths(run, model, out_path, "splice-ttft", lengths, repeats)


@bench_app.command("agent")
def bench_agent(
    model: ModelOption = "embedded",
    instances: Annotated[int, typer.Option(min=0, help="policies of each held-out domain")] = 10,
    lengths: LengthsOption = "1024,2048,4096",
    turns: Annotated[int, typer.Option(min=1, help="turns of each timed policy")] = 12,
    out_path: OutOption = None,
) -> None:
    """An agent on a live cache against re-prefilling every turn: the same decisions, and how much sooner."""
    from programmable_kv.bench.agent import run
    from programmable_kv.scenarios.vocabulary import held_out_domains

    sizes = _sizes(lengths)
    total = instances * len(held_out_domains()) + len(sizes)
    _measure(run, model, out_path, "agent", "Policies", total, instances=instances, lengths=sizes, timed_turns=turns)


@lab_app.command("edit-modes")
def lab_edit_modes(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 260,
    out_path: OutOption = None,
) -> None:
    """Agreement with full prefill and recovery of every edit mode, direct and with a line of thought."""
    from programmable_kv.lab.edit_modes import run

    _measure(run, model, out_path, "edit-modes", "Scenarios", scenarios, count=scenarios)


@lab_app.command("compose")
def lab_compose(
    model: ModelOption = "embedded",
    policies: Annotated[int, typer.Option(min=1, help="policies, in every place")] = 24,
    others: Annotated[int, typer.Option(min=1, help="tasks of each other kind")] = 24,
    tools: Annotated[int, typer.Option(min=0, help="requests for one of sixteen tools")] = 40,
    horizons: Annotated[int, typer.Option(min=0, help="conversations of forty turns on one edited cache")] = 4,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Agreement of compiled pieces, spliced together, with full prefill: by seam and place, with controls."""
    from programmable_kv.lab.composing.suites import Composing

    _compare(Composing(policies, others, tools, horizons), model, dtype, out_path)


@lab_app.command("preface")
def lab_preface(
    model: ModelOption = "embedded",
    policies: Annotated[int, typer.Option(min=1, help="policies, one skill each")] = 24,
    others: Annotated[int, typer.Option(min=1, help="pairs of rule sets, two skills each")] = 24,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """What should a skill read while it is compiled? Agreement with full prefill behind several prefaces."""
    from programmable_kv.lab.composing.suites import Prefaces

    _compare(Prefaces(policies, others), model, dtype, out_path)


@lab_app.command("catalogue")
def lab_catalogue(
    model: ModelOption = "embedded",
    tools: Annotated[int, typer.Option(min=1, help="requests for one of sixteen tools")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Tools compiled alone, behind others, and together; all of them, in another order, and half of them."""
    from programmable_kv.lab.composing.suites import Catalogue

    _compare(Catalogue(tools), model, dtype, out_path)


@lab_app.command("adapter")
def lab_adapter(
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 800,
    attach: Annotated[
        Path | None, typer.Option(help="also put the figures into the training.json of this folder of weights")
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Does the embedded model follow policies it never saw, and obey updates of them?"""
    from programmable_kv.lab.adapter import attach_figures, evaluate

    record = _measure(evaluate, "embedded", out_path, "adapter-held-out", "Scenarios", scenarios, count=scenarios)
    if attach is not None:
        attach_figures(attach, record)


@lab_app.command("abilities")
def lab_abilities(out_path: OutOption = None) -> None:
    """Perplexity on plain text, before and after the adapter."""
    from programmable_kv.lab.adapter import base_model, write_abilities
    from programmable_kv.models.load import load_model

    with err.status("Reading plain text with both models ..."):
        record = write_abilities(
            record_path(out_path, "adapter-abilities"), base=base_model(), adapted=load_model(), command=command()
        )
    _print_summary(record)


def zoo(
    types: Annotated[
        list[str] | None, typer.Option("--type", help="only this type of transformers; repeatable, writes no page")
    ] = None,
    out_path: OutOption = None,
    page: Annotated[Path, typer.Option(help="the support matrix, written when every type was examined")] = Path(
        "docs/architectures.md"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """On which architectures relocation is exact: the check on a tiny random model of every decoder type."""
    from programmable_kv.lab.zoo import examine_apart, run, species_named
    from programmable_kv.lab.zoo_page import page as written

    wanted = species_named(types or [])
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
    from rich.table import Table

    table = Table()
    for column in ("type", "verdict", "what turns", "worst", "reason"):
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


def _compare(suite: Suite, model: str, dtype: str, out_path: Path | None) -> None:
    from programmable_kv.lab.composing.experiment import record_name, run

    work = len(suite.groups()) + suite.horizons
    _measure(run, model, out_path, partial(record_name, suite), "Comparisons", work, dtype=dtype, suite=suite)


def _measure(
    run: Callable[..., Record],
    model: str,
    out_path: Path | None,
    name: str | Callable[[Model], str],
    title: str,
    total: int,
    *,
    dtype: str = "float32",
    **settings: Any,
) -> Record:
    """Load the model, run with a progress bar, write the record `name` (or what it is called for that model), and print its
    summary."""
    from programmable_kv.extras import require_extra
    from programmable_kv.models.load import load_model

    require_extra("lab", "scipy", "statsmodels")  # the summary's intervals: told before hours of measuring, not after
    loaded = load_model(model, dtype=dtype)
    path = record_path(out_path, name if isinstance(name, str) else name(loaded))
    with progress(title, total) as report:
        record = run(loaded, path=path, report=report, command=command(), **settings)
    _print_summary(record)
    return record


def _measure_lengths(
    run: Callable[..., Record], model: str, out_path: Path | None, name: str, lengths: str, repeats: int
) -> None:
    sizes = _sizes(lengths)
    _measure(run, model, out_path, name, "Lengths", len(sizes), lengths=sizes, repeats=repeats)


def _print_summary(record: Record) -> None:
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


def _sizes(lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{lengths!r} is not a list of numbers separated by commas", param_hint="--lengths"
        ) from None
