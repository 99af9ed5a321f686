"""`pkv lab`: experiments on a loaded model that show why editing a cache works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from programmable_kv.commands.common import ModelOption, OutOption, command, err, out, progress, record_path
from programmable_kv.commands.measure import DtypeOption, load, measure, named, print_figures, print_summary
from programmable_kv.extras import require_extra
from programmable_kv.models.names import EMBEDDED_PLAIN

if TYPE_CHECKING:
    from programmable_kv.lab.composing.suites.suite import Suite
    from programmable_kv.models.load import Model

QUICK = 4
"""policies that `--quick` draws for each experiment; most experiments can measure one of them"""

app = typer.Typer(help="Why it works: experiments on the loaded model.", no_args_is_help=True, rich_markup_mode=None)


@app.command("run")
def lab_run(
    name: Annotated[str | None, typer.Argument(help="an experiment; --list names them", show_default=False)] = None,
    listed: Annotated[bool, typer.Option("--list", help="list the experiments and the question of each")] = False,
    model: ModelOption = EMBEDDED_PLAIN,
    random_weights: Annotated[
        bool, typer.Option(help="the control: the same architecture, each weight matrix's numbers shuffled")
    ] = False,
    scenarios: Annotated[
        int | None,
        typer.Option(min=1, help="held-out policies to draw [default: the experiment's]", show_default=False),
    ] = None,
    everyday: Annotated[bool, typer.Option(help="use wording for models that were not trained on the grammar")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            help="check that everything still runs: a few policies of every experiment, or of one; no record is kept"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for other programs")] = False,
    out_path: OutOption = None,
) -> None:
    """Run one experiment on the keys and values of a prefilled context, and write its record.

    Without a name, the command lists the experiments and about how many minutes each takes for `embedded-plain` on
    one core. `pkv lab every` runs them all.
    """
    from programmable_kv.lab.experiments.experiment import record_name
    from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
    from programmable_kv.lab.experiments.runs import run

    if quick:
        _quick(load(model), list(EXPERIMENTS) if name is None else [experiment(name).name], everyday=everyday)
        return
    if listed or name is None:
        if as_json:
            out.print_json(json.dumps({each.name: each.title for each in EXPERIMENTS.values()}))
        else:
            for each in EXPERIMENTS.values():
                out.print(f"{each.name:18}{each.minutes:4.0f} min  {each.title}", highlight=False)
            total = sum(each.minutes for each in EXPERIMENTS.values())
            out.print(f"{'all of them':18}{total:4.0f} min", highlight=False)
        return
    chosen = experiment(name)
    loaded = load(model)
    if random_weights:
        from programmable_kv.lab.experiments.control import randomised

        loaded = randomised(loaded)
    count = chosen.scenarios if scenarios is None else scenarios
    total = len(chosen.cases(count, everyday=everyday))
    path = record_path(out_path, record_name(chosen, loaded.name))
    with progress("Policies", total) as report:
        record = run(chosen, loaded, count, path, everyday=everyday, report=report, command=command())
    if as_json:
        print_summary(record)
    else:
        print_figures(record)
        out.print(f"Record: {path}")


@app.command("every")
def lab_every(
    model: ModelOption = EMBEDDED_PLAIN,
    scenarios: Annotated[
        int | None,
        typer.Option(min=1, help="held-out policies to draw [default: each experiment's]", show_default=False),
    ] = None,
    everyday: Annotated[bool, typer.Option(help="use wording for models that were not trained on the grammar")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes, each with the model [default: one for each core]", show_default=False),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="make existing records again")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="where the records go [default: results/]", show_default=False)
    ] = None,
) -> None:
    """Run every experiment of `pkv lab run`, several at a time, and write a record for each.

    Each process runs its experiments on one policy after the other, so all its records are complete only near the end.
    Existing records of the same policies and weights are kept. Run the same command again to continue an interrupted
    run. A run that made all records from the start also writes how long it took, in the record `lab-time`.
    """
    import os
    import time

    from programmable_kv.lab.experiments.every import Every, run_every
    from programmable_kv.lab.experiments.registry import EXPERIMENTS
    from programmable_kv.lab.experiments.whole_time import record_time, untouched
    from programmable_kv.records import results_folder

    require_extra("lab", "scipy", "statsmodels")
    asked = Every(model, folder or results_folder(), scenarios, everyday, again)
    processes, outcomes = workers or os.cpu_count() or 1, []
    from_the_start, began = untouched(asked), time.perf_counter()
    with progress("Policies", sum(map(asked.cases, EXPERIMENTS.values()))) as report:
        for each in run_every(asked, processes, report=report):
            how = "kept" if each.kept else f"{each.seconds / 60:.1f} min"
            out.print(f"{each.name:18}{each.counted:4} policies, {how}: {each.path}", highlight=False, soft_wrap=True)
            outcomes.append(each)
    if from_the_start:
        took = record_time(asked, outcomes, processes, time.perf_counter() - began, command=command())
        out.print(f"{'all of them':18}{took.figure('minutes'):.1f} min")


def _quick(model: Model, names: list[str], *, everyday: bool) -> None:
    from tempfile import TemporaryDirectory

    from programmable_kv.lab.experiments.registry import experiment
    from programmable_kv.lab.experiments.runs import run

    for name in names:
        with TemporaryDirectory() as folder:
            record = run(experiment(name).briefly(), model, QUICK, Path(folder) / "it.json", everyday=everyday)
        out.print(f"{name:18}{record.figure('counted'):.0f} policies, {record.wall_seconds:.0f} s", highlight=False)


@app.command("edit-modes")
def lab_edit_modes(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 260,
    out_path: OutOption = None,
) -> None:
    """Measure how often each edit mode agrees with full prefill, directly and with a line of thought.

    The record also has each mode's recovery of the decision.
    """
    from programmable_kv.lab.edit_modes import run

    loaded = load(model)
    measure(run, loaded, out_path, named("edit-modes", loaded), "Scenarios", scenarios, count=scenarios)


@app.command("obedience")
def lab_obedience(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out policies")] = 130,
    out_path: OutOption = None,
) -> None:
    """Measure how often a model follows the gateway's lines, and how often forged ones.

    Both are measured with and without the announcement in the system prompt.
    """
    from programmable_kv.lab.obedience import run

    loaded = load(model)
    measure(run, loaded, out_path, named("obedience", loaded), "Policies", scenarios, count=scenarios)


@app.command("readers")
def lab_readers(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out policies of each of six kinds")] = 40,
    out_path: OutOption = None,
) -> None:
    """Measure agreement with full prefill when a field and its readers are recomputed.

    It is compared with errata, and with recomputing as many other tokens.
    """
    from programmable_kv.lab.readers import KINDS, run

    loaded = load(model)
    measure(run, loaded, out_path, named("readers", loaded), "Policies", count * len(KINDS), count=count)


@app.command("blocks")
def lab_blocks(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out blocks of each of four kinds of change")] = 60,
    everyday: Annotated[bool, typer.Option(help="use wording for models that were not trained on the grammar")] = False,
    out_path: OutOption = None,
) -> None:
    """Measure agreement with full prefill after one line of a block changed, by edit mode.

    A block is a field of several lines, such as a memory or a todo list.
    """
    from programmable_kv.lab.blocks import KINDS, run

    loaded = load(model)
    measure(
        run, loaded, out_path, named("blocks", loaded), "Blocks", count * len(KINDS), count=count, everyday=everyday
    )


@app.command("long-readers")
def lab_long_readers(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out policies of each of three kinds")] = 18,
    out_path: OutOption = None,
) -> None:
    """Measure what `pkv lab readers` does, in contexts of about 4,000 tokens, most of them unrelated rules."""
    from programmable_kv.lab.long_readers import KINDS, run

    loaded = load(model)
    measure(run, loaded, out_path, named("long-readers", loaded), "Policies", count * len(KINDS), count=count)


@app.command("mentions")
def lab_mentions(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="policies for each way to refer to a field")] = 20,
    out_path: OutOption = None,
) -> None:
    """Compare readers that are found by name, declared, and suggested, by how the rules refer to the field."""
    from programmable_kv.lab.mentions import run
    from programmable_kv.scenarios.mentioned import WAYS

    loaded = load(model)
    measure(run, loaded, out_path, named("mentions", loaded), "Policies", count * len(WAYS), count=count)


@app.command("stock-readers")
def lab_stock_readers(
    model: Annotated[str, typer.Option("--model", help="a Hub id, a folder, or a .gguf file of a chat model")],
    count: Annotated[int, typer.Option(min=1, help="policies for each of two ways")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Measure `readers` and other edit modes on a model that was not trained for them, on policies that it solves."""
    from programmable_kv.lab.stock_readers import record_name, run
    from programmable_kv.scenarios.everyday import EVERYDAY

    loaded = load(model, dtype=dtype)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count * len(EVERYDAY), count=count)


@app.command("visibilities")
def lab_visibilities(
    model: Annotated[str, typer.Option("--model", help="a Hub id, a folder, or a .gguf file")],
    count: Annotated[int, typer.Option(min=1, help="policies for each of two ways")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Measure what a model that was not trained for visibilities decides under each of them."""
    from programmable_kv.lab.visibilities import record_name, run
    from programmable_kv.scenarios.everyday import EVERYDAY

    loaded = load(model, dtype=dtype)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count * len(EVERYDAY), count=count)


@app.command("by-design")
def lab_by_design(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="questions about each kind of pieces")] = 60,
    policies: Annotated[
        int | None, typer.Option(min=1, help="policies of each kind; by default the same number")
    ] = None,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Count right answers under visibility="design", and of the same weights under plain causal attention."""
    from programmable_kv.lab.by_design import drawn, record_name, run

    loaded = load(model, dtype=dtype)
    measure(
        run,
        loaded,
        out_path,
        record_name(loaded),
        "Questions",
        len(drawn(count, policies)),
        count=count,
        policies=policies,
    )


@app.command("compose")
def lab_compose(
    model: ModelOption = "embedded",
    policies: Annotated[int, typer.Option(min=1, help="policies, each in every place")] = 24,
    others: Annotated[int, typer.Option(min=1, help="tasks of each other kind")] = 24,
    tools: Annotated[int, typer.Option(min=0, help="requests for one of sixteen tools")] = 40,
    horizons: Annotated[int, typer.Option(min=0, help="conversations of forty turns on one edited cache")] = 4,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Measure how often compiled pieces that are spliced together agree with full prefill.

    The result is given by seam repair and by place in the context, with controls.
    """
    from programmable_kv.lab.composing.suites.composing import Composing

    _compare(Composing(policies, others, tools, horizons), model, dtype, out_path)


@app.command("preface")
def lab_preface(
    model: ModelOption = "embedded",
    policies: Annotated[int, typer.Option(min=1, help="policies, one skill each")] = 24,
    others: Annotated[int, typer.Option(min=1, help="pairs of rule sets, two skills each")] = 24,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Compare prefaces: what should a skill read while it is compiled to agree with full prefill?"""
    from programmable_kv.lab.composing.suites.prefaces import Prefaces

    _compare(Prefaces(policies, others), model, dtype, out_path)


@app.command("catalogue")
def lab_catalogue(
    model: ModelOption = "embedded",
    tools: Annotated[int, typer.Option(min=1, help="requests for one of sixteen tools")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Compare tools that are compiled alone, after others, and together.

    They are spliced all in order, in another order, and only half of them.
    """
    from programmable_kv.lab.composing.suites.catalogue import Catalogue

    _compare(Catalogue(tools), model, dtype, out_path)


@app.command("lens-peer")
def lab_lens_peer(
    model: ModelOption = EMBEDDED_PLAIN,
    count: Annotated[int, typer.Option(min=1, help="held-out policies; about two thirds can be probed")] = 4,
    out_path: OutOption = None,
) -> None:
    """Compare the lab's patches, knock-outs and lens with TransformerLens: results, and time for a probe.

    TransformerLens has to be installed.
    """
    from programmable_kv.lab.lens_peer import record_name, run

    loaded = load(model)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count, count=count)


@app.command("emergence")
def lab_emergence(
    seeds: Annotated[int, typer.Option(min=1, help="models, each with its own seed")] = 10,
    out_path: OutOption = None,
) -> None:
    """Train toy models from scratch, in minutes, and measure when they begin to write notes."""
    from programmable_kv.lab.toy.emergence import run
    from programmable_kv.lab.toy.training import ToyRecipe

    path = record_path(out_path, "emergence")
    with progress("Models", seeds) as report:
        record = run(ToyRecipe(), seeds, path, report=report, command=command())
    print_figures(record)
    out.print(f"Record: {path}")


@app.command("along-adapter")
def lab_along_adapter(
    count: Annotated[int, typer.Option(min=1, help="held-out policies; about two thirds can be measured")] = 56,
    out_path: OutOption = None,
) -> None:
    """Measure which tokens carry the decision in models between the base model and `embedded-plain`.

    These models are the base with a share of the adapter added.
    """
    from programmable_kv.lab.along_adapter import SHARES, run

    measure(run, load(EMBEDDED_PLAIN), out_path, "along-adapter", "Shares of the adapter", len(SHARES), count=count)


@app.command("adapter")
def lab_adapter(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 800,
    attach: Annotated[
        Path | None, typer.Option(help="also put the figures into the training.json of this folder of weights")
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Measure how often an embedded model follows policies that it never saw, and updates of them."""
    from programmable_kv.lab.adapter import attach_figures, evaluate, record_name

    if attach is not None and model != EMBEDDED_PLAIN:  # the other adapter's file has scores of its own
        raise typer.BadParameter("only the figures of --model embedded-plain can be attached", param_hint="--attach")
    loaded = load(model)
    record = measure(evaluate, loaded, out_path, record_name(loaded), "Scenarios", scenarios, count=scenarios)
    if attach is not None:
        attach_figures(attach, record)


@app.command("abilities")
def lab_abilities(out_path: OutOption = None) -> None:
    """Measure perplexity on plain text, with and without the adapter."""
    from programmable_kv.lab.adapter import base_model, write_abilities

    with err.status("Reading plain text with both models ..."):
        record = write_abilities(
            record_path(out_path, "adapter-abilities"), base=base_model(), adapted=load("embedded"), command=command()
        )
    print_summary(record)


def _compare(suite: Suite, model: str, dtype: str, out_path: Path | None) -> None:
    from programmable_kv.lab.composing.experiment import record_name, run

    loaded = load(model, dtype=dtype)
    total = len(suite.groups()) + suite.horizons
    measure(run, loaded, out_path, record_name(suite, loaded), "Comparisons", total, suite=suite)
