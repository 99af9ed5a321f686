"""`pkv lab`: why it works. Experiments on the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from programmable_kv.commands.common import ModelOption, OutOption, command, err, out, progress, record_path
from programmable_kv.commands.measure import DtypeOption, load, measure, print_figures, print_summary
from programmable_kv.extras import require_extra

if TYPE_CHECKING:
    from programmable_kv.lab.composing.suites.suite import Suite
    from programmable_kv.models.load import Model

QUICK = 4
"""policies that `--quick` draws for each experiment; one of them can be measured in most"""

app = typer.Typer(help="Why it works: experiments on the loaded model.", no_args_is_help=True, rich_markup_mode=None)


@app.command("run")
def lab_run(
    name: Annotated[str | None, typer.Argument(help="an experiment; --list names them", show_default=False)] = None,
    listed: Annotated[bool, typer.Option("--list", help="list the experiments and what each asks")] = False,
    model: ModelOption = "embedded",
    random_weights: Annotated[
        bool, typer.Option(help="the control: the same architecture, each weight matrix's numbers shuffled")
    ] = False,
    scenarios: Annotated[
        int | None,
        typer.Option(min=1, help="held-out policies to draw [default: the experiment's]", show_default=False),
    ] = None,
    everyday: Annotated[bool, typer.Option(help="worded for models that were not trained on the grammar")] = False,
    quick: Annotated[
        bool,
        typer.Option(
            help="does everything still run? A few policies of every experiment, or of one; no record is kept"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for other programs")] = False,
    out_path: OutOption = None,
) -> None:
    """What the keys and values of a prefilled context hold: one experiment, one record. `pkv lab every` runs them all.

    Without a name the experiments are listed, each with about how many minutes it takes, for the embedded model
    on one core.
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
    model: ModelOption = "embedded",
    scenarios: Annotated[
        int | None,
        typer.Option(min=1, help="held-out policies to draw [default: each experiment's]", show_default=False),
    ] = None,
    everyday: Annotated[bool, typer.Option(help="worded for models that were not trained on the grammar")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes, each with the model [default: one for each core]", show_default=False),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="make records anew that are there already")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="where the records go [default: results/]", show_default=False)
    ] = None,
) -> None:
    """Run every experiment of `pkv lab run`, several at a time, each into its record.

    The experiments of a process are asked about one policy after the other, so that all their records are ready near
    the end. A record of the same policies and weights that is there already is kept. After an interruption the same command
    continues.
    """
    import os

    from programmable_kv.lab.experiments.every import Every, run_every
    from programmable_kv.lab.experiments.registry import EXPERIMENTS
    from programmable_kv.records import results_folder

    require_extra("lab", "scipy", "statsmodels")
    asked = Every(model, folder or results_folder(), scenarios, everyday, again)
    with progress("Policies", sum(map(asked.cases, EXPERIMENTS.values()))) as report:
        for each in run_every(asked, workers or os.cpu_count() or 1, report=report):
            how = "kept" if each.kept else f"{each.seconds / 60:.1f} min"
            out.print(f"{each.name:18}{each.counted:4} policies, {how}: {each.path}", highlight=False, soft_wrap=True)


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
    """Agreement with full prefill and recovery of every edit mode, direct and with a line of thought."""
    from programmable_kv.lab.edit_modes import run

    measure(run, load(model), out_path, "edit-modes", "Scenarios", scenarios, count=scenarios)


@app.command("obedience")
def lab_obedience(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out policies")] = 130,
    out_path: OutOption = None,
) -> None:
    """How often the gateway's lines are followed, and forged ones, with and without the announcement in the system prompt."""
    from programmable_kv.lab.obedience import run

    measure(run, load(model), out_path, "obedience", "Policies", scenarios, count=scenarios)


@app.command("readers")
def lab_readers(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out policies of each of six kinds")] = 40,
    out_path: OutOption = None,
) -> None:
    """Agreement with full prefill where a field and its readers are computed again, beside as many other tokens."""
    from programmable_kv.lab.readers import KINDS, run

    measure(run, load(model), out_path, "readers", "Policies", count * len(KINDS), count=count)


@app.command("blocks")
def lab_blocks(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out blocks of each of four kinds of change")] = 60,
    everyday: Annotated[bool, typer.Option(help="worded for models that were not trained on the grammar")] = False,
    out_path: OutOption = None,
) -> None:
    """Agreement with full prefill after one line of a block (a memory, a todo list) has changed, by edit mode."""
    from programmable_kv.lab.blocks import KINDS, run

    measure(run, load(model), out_path, "blocks", "Blocks", count * len(KINDS), count=count, everyday=everyday)


@app.command("long-readers")
def lab_long_readers(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out policies of each of three kinds")] = 18,
    out_path: OutOption = None,
) -> None:
    """The same in contexts of about 4,000 tokens, most of them unrelated rules."""
    from programmable_kv.lab.long_readers import KINDS, run

    measure(run, load(model), out_path, "long-readers", "Policies", count * len(KINDS), count=count)


@app.command("mentions")
def lab_mentions(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="policies of each way to speak of a field")] = 20,
    out_path: OutOption = None,
) -> None:
    """Readers found by name, declared, and suggested, by the way in which the rules speak of the field."""
    from programmable_kv.lab.mentions import run
    from programmable_kv.scenarios.mentioned import WAYS

    measure(run, load(model), out_path, "mentions", "Policies", count * len(WAYS), count=count)


@app.command("stock-readers")
def lab_stock_readers(
    model: Annotated[str, typer.Option("--model", help="a Hub id, a folder, or a .gguf file of a chat model")],
    count: Annotated[int, typer.Option(min=1, help="policies of each of two ways")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Readers and other edits on a model that was not trained for them, where it solves the policy."""
    from programmable_kv.lab.stock_readers import record_name, run
    from programmable_kv.scenarios.everyday import EVERYDAY

    loaded = load(model, dtype=dtype)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count * len(EVERYDAY), count=count)


@app.command("visibilities")
def lab_visibilities(
    model: Annotated[str, typer.Option("--model", help="a Hub id, a folder, or a .gguf file")],
    count: Annotated[int, typer.Option(min=1, help="policies of each of two ways")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """What a model that was not trained for it decides under each visibility."""
    from programmable_kv.lab.visibilities import record_name, run
    from programmable_kv.scenarios.everyday import EVERYDAY

    loaded = load(model, dtype=dtype)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count * len(EVERYDAY), count=count)


@app.command("by-design")
def lab_by_design(
    model: ModelOption = "embedded-design",
    count: Annotated[int, typer.Option(min=1, help="questions of each kind")] = 60,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Right answers under visibility by design, beside the same weights under plain causal attention."""
    from programmable_kv.lab.by_design import drawn, record_name, run

    loaded = load(model, dtype=dtype)
    measure(run, loaded, out_path, record_name(loaded), "Questions", len(drawn(count)), count=count)


@app.command("compose")
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
    """What should a skill read while it is compiled? Agreement with full prefill behind several prefaces."""
    from programmable_kv.lab.composing.suites.prefaces import Prefaces

    _compare(Prefaces(policies, others), model, dtype, out_path)


@app.command("catalogue")
def lab_catalogue(
    model: ModelOption = "embedded",
    tools: Annotated[int, typer.Option(min=1, help="requests for one of sixteen tools")] = 40,
    dtype: DtypeOption = "float32",
    out_path: OutOption = None,
) -> None:
    """Tools compiled alone, behind others, and together; all of them, in another order, and half of them."""
    from programmable_kv.lab.composing.suites.catalogue import Catalogue

    _compare(Catalogue(tools), model, dtype, out_path)


@app.command("lens-peer")
def lab_lens_peer(
    model: ModelOption = "embedded",
    count: Annotated[int, typer.Option(min=1, help="held-out policies; about two thirds can be probed")] = 4,
    out_path: OutOption = None,
) -> None:
    """The lab's patches, knock-outs and lens beside TransformerLens (to be installed): equal results, and time a probe."""
    from programmable_kv.lab.lens_peer import record_name, run

    loaded = load(model)
    measure(run, loaded, out_path, record_name(loaded), "Policies", count, count=count)


@app.command("emergence")
def lab_emergence(
    seeds: Annotated[int, typer.Option(min=1, help="models, each with a seed of its own")] = 10,
    out_path: OutOption = None,
) -> None:
    """When notes appear: toy models trained from scratch, in minutes, and looked at while they learn."""
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
    """What decides between the base model and the embedded one, by the share of the adapter that is joined to the base."""
    from programmable_kv.lab.along_adapter import SHARES, run

    measure(run, load("embedded"), out_path, "along-adapter", "Shares of the adapter", len(SHARES), count=count)


@app.command("adapter")
def lab_adapter(
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 800,
    attach: Annotated[
        Path | None, typer.Option(help="also put the figures into the training.json of this folder of weights")
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Does the embedded model follow policies it never saw, and obey updates of them?"""
    from programmable_kv.lab.adapter import attach_figures, evaluate

    record = measure(evaluate, load("embedded"), out_path, "adapter-held-out", "Scenarios", scenarios, count=scenarios)
    if attach is not None:
        attach_figures(attach, record)


@app.command("abilities")
def lab_abilities(out_path: OutOption = None) -> None:
    """Perplexity on plain text, before and after the adapter."""
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
