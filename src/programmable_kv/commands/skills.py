"""`pkv skills`: texts compiled once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from programmable_kv.commands.common import ModelOption, err, out, pairs, read_text

app = typer.Typer(
    help="Skills: texts compiled once, kept, and spliced anywhere.", no_args_is_help=True, rich_markup_mode=None
)

SkillArgument = Annotated[str, typer.Argument(help="a name, a key, or the start of one")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="a folder or any fsspec URL; a per-user cache folder by default")
]


@app.command("compile")
def skills_compile(
    text: Annotated[Path, typer.Argument(help="a text file")],
    name: Annotated[str | None, typer.Option(help="what it is called; a digest of its text by default")] = None,
    field: Annotated[list[str] | None, typer.Option(help="name=value for a {name} in the text; repeatable")] = None,
    role: Annotated[str | None, typer.Option(help="render it as a chat message of this role")] = None,
    preface: Annotated[
        Path | None, typer.Option(help="a text file that it reads while it is compiled, and does not hold")
    ] = None,
    inside: Annotated[
        str | None, typer.Option(help="a role: compile it as inside a chat message of this role, after the preface")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="keep it in 8 bits")] = False,
    model: ModelOption = "embedded",
    store: StoreOption = None,
) -> None:
    """Compile a text and keep it, unless it is kept already."""
    if role is not None and inside is not None:
        raise typer.BadParameter(
            "a skill is a message of its own, or stands inside of one: not both", param_hint="--inside"
        )
    from programmable_kv.models.load import load_model
    from programmable_kv.skills.store import SkillStore

    loaded = load_model(model)
    before = read_text(preface) if preface else ""
    keep = SkillStore(store, int8=int8)
    skill = keep.compile(
        loaded, read_text(text), pairs(field or [], "--field"), name=name, role=role,
        preface=before if inside is None else [(inside, before)],
    )  # fmt: skip
    computed = skill.account.tokens_computed
    cost = f"{computed} computed in {1e3 * skill.account.seconds:.0f} ms" if computed else "kept already"
    out.print(f"{skill.name}: {len(skill)} tokens, {cost}")


@app.command("list")
def skills_list(store: StoreOption = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the kept skills, most recently used first."""
    from programmable_kv.skills.store import SkillStore

    entries, damaged = SkillStore(store).inventory()
    for key in damaged:
        err.print(f"[red]{key} is damaged.[/] `pkv skills rm {key}` removes it.")
    if as_json:
        print(
            json.dumps([entry.model_dump(mode="json", exclude={"unit", "preface_ids"}) for entry in entries], indent=1)
        )
        return
    from rich.table import Table

    table = Table()
    for column in ("name", "key", "model", "tokens", "of preface", "precision", "bytes"):
        table.add_column(column)
    for entry in entries:
        model = f"{entry.model_name} {entry.fingerprint[:8]}"
        counts = (str(len(ids)) for ids in (entry.unit.ids, entry.preface_ids))
        table.add_row(entry.name, entry.key, model, *counts, entry.precision, f"{entry.nbytes:,}")
    out.print(table)


@app.command("show")
def skills_show(which: SkillArgument, store: StoreOption = None) -> None:
    """Print a skill's manifest and text."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).entry(which)
    hidden: Any = {"preface_ids": True, "unit": {"ids", "offsets", "base", "read"}}
    print(json.dumps(entry.model_dump(mode="json", exclude=hidden), indent=1))


@app.command("verify")
def skills_verify(which: SkillArgument, store: StoreOption = None) -> None:
    """Read a skill's tensors and compare them with the manifest's digest."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).verify(which)
    out.print(f"{entry.name} ({entry.key}): {entry.nbytes:,} bytes, intact")


@app.command("rm")
def skills_rm(which: SkillArgument, store: StoreOption = None) -> None:
    """Forget a skill."""
    from programmable_kv.skills.store import SkillStore

    out.print(f"{SkillStore(store).remove(which)} is gone")


@app.command("export")
def skills_export(which: SkillArgument, file: Annotated[Path, typer.Argument()], store: StoreOption = None) -> None:
    """Write a skill to one file."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).export(which, file)
    out.print(f"{entry.name} is in {file}; it fits models with fingerprint {entry.fingerprint}")


@app.command("import")
def skills_import(file: Annotated[Path, typer.Argument()], store: StoreOption = None) -> None:
    """Take in an exported skill."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).import_file(file)
    out.print(f"{entry.name} ({entry.key}) is kept")
