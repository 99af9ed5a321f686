"""`pkv`: the demo, edits of your own prompt, benches, experiments, records and figures."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from programmable_kv.errors import InvalidOptionsError, InvalidValueError, ProgrammableKVError

app = typer.Typer(
    name="pkv",
    help="Edit the content of a cached prompt at the price of the tokens touched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench_app = typer.Typer(help="How fast: benches against what a user would do instead.", no_args_is_help=True)
lab_app = typer.Typer(help="Why it works: experiments on the loaded model.", no_args_is_help=True)
train_app = typer.Typer(help="Train what the package ships.", no_args_is_help=True)
skills_app = typer.Typer(help="Skills: texts compiled once, kept, and spliced anywhere.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(skills_app, name="skills")
app.add_typer(lab_app, name="lab")
app.add_typer(train_app, name="train")
out = Console()
err = Console(stderr=True)

_INTERRUPTED = 130
"""typer's exit status after Ctrl-C"""

ModelOption = Annotated[str, typer.Option("--model", help="'embedded', a Hub id, a folder, or a .gguf file")]
SkillArgument = Annotated[str, typer.Argument(help="a name, a key, or the start of one")]
OutOption = Annotated[Path | None, typer.Option("--out", help="the record's file; by default in results/")]


def main() -> None:
    """Run the command line; an error we know is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except ProgrammableKVError as error:
        err.print(f"[bold red]error[/] ({type(error).__name__.removesuffix('Error')}):", end=" ")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            err.print("interrupted. A record keeps the rows that were measured: the same command goes on from there")
        raise


@app.command()
def demo(
    model: ModelOption = "embedded",
    page: Annotated[Path, typer.Option(help="where to write the HTML page")] = Path("pkv-demo.html"),
) -> None:
    """Flip four fields of one cached policy; every edit mode against a full prefill."""
    from programmable_kv.demo.demo import CASES, VALUES, html_page, run
    from programmable_kv.model import load_model

    page.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_model(model)
    results = []
    with _progress("Editing a cached policy", len(CASES)) as report:
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


@app.command()
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
    from programmable_kv.model import load_model
    from programmable_kv.notebook.editing import parse_mode
    from programmable_kv.notebook.edits import Mode
    from programmable_kv.notebook.notebook import Notebook

    text = _read_text(prompt)
    fields, changes = _pairs(field, "--field"), _pairs(set_, "--set")
    choices = [option.strip() for option in options.split(",") if option.strip()]
    if len(choices) < 2:
        raise InvalidOptionsError(f"--options needs at least two answers separated by commas, got {options!r}")
    loaded = load_model(model)
    notebook = Notebook(loaded)
    raw = raw or not loaded.has_chat_template
    if raw:
        notebook.text(text, **fields).text(f"\n{ask}\nAnswer:")
    else:
        notebook.message("system", text.strip(), **fields).message("user", ask)
    notebook.prefill()
    before = notebook.decide(None, choices)
    wanted = [parse_mode(name) for name in mode] if mode else list(Mode)
    modes = [Mode.FULL, *(m for m in Mode if m in wanted and m is not Mode.FULL)]
    rows: list[dict[str, Any]] = []
    with _progress("Editing", len(modes)) as report:
        for number, each in enumerate(modes, start=1):
            mark = notebook.mark()
            decision = notebook.decide(None, choices, edits=changes, mode=each)
            notebook.rollback(mark)
            full = rows[0]["decision"] if rows else decision.choice
            rows.append(
                {
                    "mode": str(each),
                    "decision": decision.choice,
                    "probabilities": {k: round(v, 6) for k, v in decision.probabilities.items()},
                    "agrees_with_full": decision.choice == full,
                    "tokens_computed": decision.account.tokens_computed,
                    "ttft_ms": round(decision.ttft_ms, 3),
                    "note": decision.account.note,
                }
            )
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
    for column in ("mode", "decision", "probability", "as full prefill?"):
        table.add_column(column)
    for column in ("tokens computed", "ms"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row["mode"], row["decision"], f"{row['probabilities'][row['decision']]:.3f}",
            "[green]yes[/]" if row["agrees_with_full"] else "[red]no[/]",
            str(row["tokens_computed"]), f"{row['ttft_ms']:.0f}", row["note"],
        )  # fmt: skip
    out.print(table)


@bench_app.command("edit")
def bench_edit(
    model: ModelOption = "embedded",
    lengths: Annotated[
        str, typer.Option(help="context lengths in tokens, separated by commas")
    ] = "512,1024,2048,4096,7936",
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each way")] = 7,
    out_path: OutOption = None,
) -> None:
    """TTFT of every edit mode against full prefill, cloning a cache, and a bare forward."""
    from programmable_kv.bench.edit import run
    from programmable_kv.model import load_model

    sizes = _sizes(lengths)
    with _progress("Measuring lengths", len(sizes)) as report:
        record = run(
            load_model(model), _record_path(out_path, "edit-ttft"), lengths=sizes, repeats=repeats, report=report,
            command=_command(),
        )  # fmt: skip
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@bench_app.command("splice")
def bench_splice(
    model: ModelOption = "embedded",
    lengths: Annotated[
        str, typer.Option(help="skill lengths in tokens, separated by commas")
    ] = "512,1024,2048,4096,7936",
    repeats: Annotated[int, typer.Option(min=1, help="measurements of each way")] = 7,
    out_path: OutOption = None,
) -> None:
    """TTFT of a spliced skill against full prefill, the concatenating way, and a plain copy."""
    from programmable_kv.bench.splice import run
    from programmable_kv.model import load_model

    sizes = _sizes(lengths)
    with _progress("Measuring lengths", len(sizes)) as report:
        record = run(
            load_model(model), _record_path(out_path, "splice-ttft"), lengths=sizes, repeats=repeats, report=report,
            command=_command(),
        )  # fmt: skip
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@bench_app.command("agent")
def bench_agent(
    model: ModelOption = "embedded",
    instances: Annotated[int, typer.Option(min=0, help="policies of each held-out domain")] = 10,
    lengths: Annotated[str, typer.Option(help="tokens of the timed policies, separated by commas")] = "1024,2048,4096",
    turns: Annotated[int, typer.Option(min=1, help="turns of each timed policy")] = 12,
    out_path: OutOption = None,
) -> None:
    """An agent on a live cache against re-prefilling every turn: the same decisions, and how much sooner."""
    from programmable_kv.bench.agent import DOMAINS, run
    from programmable_kv.model import load_model

    sizes = _sizes(lengths)
    with _progress("Policies", instances * len(DOMAINS) + len(sizes)) as report:
        record = run(
            load_model(model), _record_path(out_path, "agent"), instances=instances, lengths=sizes, timed_turns=turns,
            report=report, command=_command(),
        )  # fmt: skip
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@lab_app.command("edit-modes")
def lab_edit_modes(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 260,
    out_path: OutOption = None,
) -> None:
    """Agreement with full prefill and recovery of every edit mode, direct and with a line of thought."""
    from programmable_kv.lab.edit_modes import run
    from programmable_kv.model import load_model

    with _progress("Scenarios", scenarios) as report:
        record = run(
            load_model(model), scenarios, _record_path(out_path, "edit-modes"), report=report, command=_command()
        )
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@lab_app.command("splicing")
def lab_splicing(
    model: ModelOption = "embedded",
    scenarios: Annotated[int, typer.Option(min=1, help="held-out policies")] = 100,
    out_path: OutOption = None,
) -> None:
    """Agreement of a spliced policy with full prefill, by seam and displacement, with two controls that must fail."""
    from programmable_kv.lab.splicing import run
    from programmable_kv.model import load_model

    with _progress("Policies", scenarios) as report:
        record = run(
            load_model(model), scenarios, _record_path(out_path, "splice-agreement"), report=report, command=_command()
        )
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@lab_app.command("adapter")
def lab_adapter(
    scenarios: Annotated[int, typer.Option(min=1, help="held-out scenarios")] = 500,
    attach: Annotated[
        Path | None, typer.Option(help="also put the figures into the training.json of this folder of weights")
    ] = None,
    out_path: OutOption = None,
) -> None:
    """Does the embedded model follow policies it never saw, and obey updates of them?"""
    from programmable_kv.adapter.evaluate import attach_figures, evaluate
    from programmable_kv.model import load_model

    with _progress("Scenarios", scenarios) as report:
        record = evaluate(
            load_model(), scenarios, _record_path(out_path, "adapter-held-out"), report=report, command=_command()
        )
    if attach is not None:
        attach_figures(attach, record)
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@lab_app.command("abilities")
def lab_abilities(out_path: OutOption = None) -> None:
    """Perplexity on plain text, before and after the adapter."""
    from programmable_kv.adapter.evaluate import base_model, write_abilities
    from programmable_kv.model import load_model

    with err.status("Reading plain text with both models ..."):
        record = write_abilities(
            _record_path(out_path, "adapter-abilities"), base=base_model(), adapted=load_model(), command=_command()
        )
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


@train_app.command("adapter")
def train_adapter(
    folder: Annotated[Path, typer.Option("--out", help="where checkpoints and the result go; resumes what is there")],
    stop_after: Annotated[int | None, typer.Option(min=1, help="end at this step of the recipe's schedule")] = None,
    seed: Annotated[int | None, typer.Option(help="another seed than the recipe's")] = None,
    change_recipe: Annotated[
        bool, typer.Option("--change-recipe", help="go on from a checkpoint of another recipe, which is recorded")
    ] = False,
) -> None:
    """Train the embedded model's LoRA adapter (about three hours on two cores)."""
    from dataclasses import replace

    from programmable_kv.adapter.train import TrainingRecipe, train
    from programmable_kv.weights import base_folder

    recipe = TrainingRecipe()
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    with _progress("Training steps", recipe.steps) as report:
        train(
            base_folder(), folder, recipe, stop_after=stop_after, change_recipe=change_recipe,
            report=lambda step, *_: report(step + 1, recipe.steps),
        )  # fmt: skip
    out.print(f"The adapter is in {folder}: adapter_model.safetensors, adapter_config.json, training.json")


StoreOption = Annotated[
    str | None, typer.Option("--store", help="a folder or any fsspec URL; a per-user cache folder by default")
]


@skills_app.command("compile")
def skills_compile(
    text: Annotated[Path, typer.Argument(help="a text file")],
    name: Annotated[str | None, typer.Option(help="what it is called; a digest of its text by default")] = None,
    field: Annotated[list[str] | None, typer.Option(help="name=value for a {name} in the text; repeatable")] = None,
    role: Annotated[str | None, typer.Option(help="render it as a chat message of this role")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="keep it in 8 bits")] = False,
    model: ModelOption = "embedded",
    store: StoreOption = None,
) -> None:
    """Compile a text and keep it; says nothing new if it is kept already."""
    from programmable_kv.model import load_model
    from programmable_kv.notebook.store import SkillStore

    loaded = load_model(model)
    keep = SkillStore(store, int8=int8)
    skill = keep.compile(loaded, _read_text(text), name=name, role=role, **_pairs(field or [], "--field"))
    out.print(
        f"{skill.name}: {len(skill)} tokens, {skill.account.tokens_computed} of them computed in "
        f"{1e3 * skill.account.seconds:.0f} ms"
    )


@skills_app.command("list")
def skills_list(store: StoreOption = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the kept skills, most recently used first."""
    from programmable_kv.notebook.store import SkillStore

    entries = SkillStore(store).entries()
    if as_json:
        print(json.dumps([entry.model_dump(mode="json", exclude={"unit"}) for entry in entries], indent=1))
        return
    table = Table()
    for column in ("name", "key", "model", "tokens", "precision", "bytes"):
        table.add_column(column)
    for entry in entries:
        model = f"{entry.model_name} {entry.fingerprint[:8]}"
        table.add_row(entry.name, entry.key, model, str(len(entry.unit.ids)), entry.precision, f"{entry.nbytes:,}")
    out.print(table)


@skills_app.command("show")
def skills_show(which: SkillArgument, store: StoreOption = None) -> None:
    """Print a skill's manifest and text."""
    from programmable_kv.notebook.store import SkillStore

    entry = SkillStore(store).entry(which)
    print(json.dumps(entry.model_dump(mode="json", exclude={"unit": {"ids", "offsets", "base", "read"}}), indent=1))


@skills_app.command("verify")
def skills_verify(which: SkillArgument, store: StoreOption = None) -> None:
    """Read a skill's tensors and compare them with the manifest's digest."""
    from programmable_kv.notebook.store import SkillStore

    entry = SkillStore(store).verify(which)
    out.print(f"{entry.name} ({entry.key}): {entry.nbytes:,} bytes, intact")


@skills_app.command("rm")
def skills_rm(which: SkillArgument, store: StoreOption = None) -> None:
    """Forget a skill."""
    from programmable_kv.notebook.store import SkillStore

    entry = SkillStore(store).remove(which)
    out.print(f"{entry.name} ({entry.key}) is gone")


@skills_app.command("export")
def skills_export(which: SkillArgument, file: Annotated[Path, typer.Argument()], store: StoreOption = None) -> None:
    """Write a skill to one file."""
    from programmable_kv.notebook.store import SkillStore

    entry = SkillStore(store).export(which, file)
    out.print(f"{entry.name} is in {file}; it fits models with fingerprint {entry.fingerprint}")


@skills_app.command("import")
def skills_import(file: Annotated[Path, typer.Argument()], store: StoreOption = None) -> None:
    """Take in an exported skill."""
    from programmable_kv.notebook.store import SkillStore

    entry = SkillStore(store).import_file(file)
    out.print(f"{entry.name} ({entry.key}) is kept")


@app.command()
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
    with _progress("Architectures", len(wanted)) as report:
        if types and out_path is None:
            rows = []
            for number, each in enumerate(wanted, start=1):
                rows.append(examine_apart(each))
                report(number, len(wanted))
        else:
            record = run(_record_path(out_path, "zoo"), wanted, command=_command(), report=report)
            rows = record.rows
            if not types:
                page.write_text(written(record), encoding="utf-8")
    if as_json:
        print(json.dumps(rows, indent=1))
        return
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


@app.command()
def results(as_json: Annotated[bool, typer.Option("--json", help="print the summaries as JSON")] = False) -> None:
    """List the records in results/."""
    from programmable_kv.records import all_records

    records = all_records()
    if as_json:
        print(json.dumps({r.name: r.model_dump(mode="json")["summary"] for r in records}, indent=1))
        return
    table = Table()
    for column in ("record", "version", "rows", "model", "started", "minutes", "title"):
        table.add_column(column)
    for r in records:
        table.add_row(
            r.name, str(r.version), str(len(r.rows)), f"{r.model} {r.model_fingerprint[:8]}", f"{r.started:%Y-%m-%d}",
            f"{r.wall_seconds / 60:.1f}", r.title,
        )  # fmt: skip
    out.print(table)


@app.command()
def figures(folder: Annotated[Path, typer.Option(help="the documents' folder")] = Path("docs")) -> None:
    """Draw every figure, and write every number that the documents quote, from the records in results/."""
    from programmable_kv.figures import draw_all
    from programmable_kv.quotes import documents, refreshed

    for path in draw_all(folder / "figures"):
        out.print(str(path))
    for path in documents(folder):
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


def _sizes(lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{lengths!r} is not a list of numbers separated by commas", param_hint="--lengths"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"cannot read {path}: {error}") from error


def _pairs(given: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidValueError(f"{option} takes name=value, got {item!r}")
        pairs[name] = value
    return pairs


def _record_path(given: Path | None, name: str) -> Path:
    from programmable_kv.records import results_folder

    return given or results_folder() / f"{name}.json"


def _command() -> str:
    return "pkv " + " ".join(sys.argv[1:])


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the block gets `report(done, total)`."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
