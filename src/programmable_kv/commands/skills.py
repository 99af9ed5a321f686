"""`pkv skills`: compile texts once, and manage the store that keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.commands.common import ModelOption, err, out, pairs, read_text
from programmable_kv.errors import InvalidArgumentError

if TYPE_CHECKING:
    from programmable_kv.skills.draft import Preface
    from programmable_kv.skills.skill import Skill
    from programmable_kv.storage.manifests import Entry

app = typer.Typer(
    help="Skills: texts compiled once, kept, and spliced anywhere.", no_args_is_help=True, rich_markup_mode=None
)

SkillArgument = Annotated[str, typer.Argument(help="a name, a key, or the beginning of a key")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="a folder or any fsspec URL; a per-user cache folder by default")
]
FieldOption = Annotated[
    list[str] | None, typer.Option("--field", help="name=value for a {name} in the text; repeatable")
]
PrefaceOption = Annotated[
    Path | None,
    typer.Option("--preface", help="a text file to read while compiling; it is not kept in the skill"),
]
InsideOption = Annotated[
    str | None,
    typer.Option("--inside", help="a role: compile the text inside a chat message of this role, after the preface"),
]
Int8Option = Annotated[bool, typer.Option("--int8", help="keep it in 8 bits")]
DtypeOption = Annotated[str, typer.Option(help="the torch dtype that the model runs in")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
_BULKY: Any = {"unit": {"ids", "offsets", "base", "read"}, "pieces": True}
"""entries of a manifest that are long and of no use to a reader"""


@app.command("compile")
def skills_compile(
    text: Annotated[Path, typer.Argument(help="a text file")],
    name: Annotated[str | None, typer.Option(help="its name; a digest of its text by default")] = None,
    field: FieldOption = None,
    role: Annotated[str | None, typer.Option(help="render it as a chat message of this role")] = None,
    preface: PrefaceOption = None,
    inside: InsideOption = None,
    visibility: Annotated[
        str, typer.Option(help="causal, or design: its fields are read by the lines that mention them only")
    ] = "causal",
    mentions: Annotated[
        list[str] | None,
        typer.Option("--mentions", help="with design, field=words with which lines refer to the field; repeatable"),
    ] = None,
    int8: Int8Option = False,
    model: ModelOption = "embedded",
    dtype: DtypeOption = "float32",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile a text and keep it in the store, unless the store has it already."""
    if role is not None and inside is not None:
        raise typer.BadParameter(
            "--role makes the skill its own message, --inside a part of one: give only one", param_hint="--inside"
        )
    content, before, values = read_text(text), _preface(preface, inside), pairs(field or [], "--field")
    words = _words(mentions or [])
    from programmable_kv.models.load import load_model
    from programmable_kv.skills.store import SkillStore

    keep = SkillStore(store, int8=int8)
    loaded = load_model(model, dtype=dtype)
    skill = keep.compile(
        loaded, content, values, name=name, role=role, preface=before, visibility=visibility, mentions=words
    )
    _print_skills([skill], as_json)


@app.command("compile-together")
def skills_compile_together(
    texts: Annotated[list[str], typer.Argument(help="name=path of each text file, in order")],
    field: FieldOption = None,
    preface: PrefaceOption = None,
    inside: InsideOption = None,
    between: Annotated[str, typer.Option(help=r"the text between two of them; \n is a line break")] = "",
    int8: Int8Option = False,
    model: ModelOption = "embedded",
    dtype: DtypeOption = "float32",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile several texts, each after those before it, and keep them in the store.

    They are exact when they are spliced in this order.
    """
    paths = _named_paths(texts)
    contents = {name: read_text(path) for name, path in paths.items()}
    before, values = _preface(preface, inside), pairs(field or [], "--field")
    from programmable_kv.models.load import load_model
    from programmable_kv.skills.store import SkillStore

    keep = SkillStore(store, int8=int8)
    gap = between.replace("\\n", "\n")
    _print_skills(
        keep.compile_together(load_model(model, dtype=dtype), contents, values, preface=before, between=gap), as_json
    )


def _named_paths(given: list[str]) -> dict[str, Path]:
    """Parse name=path arguments.

    Raises:
        InvalidArgumentError: an argument is not name=path, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for item in given:
        name, _, path = item.partition("=")
        if not name or not path:
            raise InvalidArgumentError(f"expected name=path for each text, got {item!r}")
        if name in found:
            raise InvalidArgumentError(f"two texts have the name {name!r}: give each its own name")
        found[name] = Path(path)
    return found


def _words(given: list[str]) -> dict[str, tuple[str, ...]] | None:
    """Parse field=words arguments. A field may be given several times.

    Raises:
        InvalidArgumentError: an argument is not field=words.
    """
    found: dict[str, tuple[str, ...]] = {}
    for item in given:
        name, _, words = item.partition("=")
        if not name or not words:
            raise InvalidArgumentError(f"--mentions takes field=words, got {item!r}")
        found[name] = (*found.get(name, ()), words)
    return found or None


def _preface(path: Path | None, inside: str | None) -> Preface:
    before = read_text(path) if path else ""
    return before if inside is None else [(inside, before)]


def _print_skills(skills: list[Skill], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "name": skill.name,
                "tokens": len(skill),
                "tokens_computed": skill.account.tokens_computed,
                "seconds": skill.account.seconds,
            }
            for skill in skills
        ]
        print(json.dumps(rows, indent=1))
        return
    for skill in skills:
        computed = skill.account.tokens_computed
        cost = f"{computed} computed in {1e3 * skill.account.seconds:.0f} ms" if computed else "kept already"
        out.print(f"{skill.name}: {len(skill)} tokens, {cost}", markup=False, highlight=False)


@app.command("list")
def skills_list(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the skills in the store, most recently used first."""
    from programmable_kv.skills.store import SkillStore

    entries, damaged = SkillStore(store).inventory()
    for key in damaged:
        err.print(f"{key} cannot be used: damaged, or of another version. `pkv skills rm {key}` removes it.")
    if as_json:
        print(json.dumps([_shown(entry, unit=False) for entry in entries], indent=1))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("name", "key", "model", "tokens", "behind", "bits", "size"):
        table.add_column(column, overflow="fold", justify="right" if column in ("tokens", "behind", "size") else "left")
    for entry in entries:
        table.add_row(
            entry.name,
            entry.key[:10],
            Text(_printable(f"{entry.model_name} {entry.fingerprint[:8]}".strip())),
            f"{len(entry.unit.ids)}",
            f"{entry.preface_tokens}",
            "8" if entry.precision == "int8" else "all",
            _size(entry.nbytes),
        )
    out.print(table)


@app.command("show")
def skills_show(which: SkillArgument, store: StoreOption = None) -> None:
    """Print a skill's manifest and text as JSON."""
    from programmable_kv.skills.store import SkillStore

    print(json.dumps(_shown(SkillStore(store).entry(which)), indent=1))


@app.command("verify")
def skills_verify(which: SkillArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check a skill's tensors against its manifest."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).verify(which)
    _tell(entry, f"{entry.name} ({entry.key}): {entry.nbytes:,} bytes, intact", as_json)


@app.command("rm")
def skills_rm(which: SkillArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Remove a skill from the store. Name a damaged skill by its key."""
    from programmable_kv.skills.store import SkillStore

    key = SkillStore(store).remove(which)
    if as_json:
        print(json.dumps({"removed": key}))
    else:
        out.print(f"{key} was removed", highlight=False)


@app.command("export")
def skills_export(
    which: SkillArgument,
    file: Annotated[Path, typer.Argument(help="the file to write")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a skill to one file."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).export(which, file)
    _tell(entry, f"{entry.name} is in {file}; it fits models with fingerprint {entry.fingerprint}", as_json)


@app.command("import")
def skills_import(
    file: Annotated[Path, typer.Argument(help="a file that `pkv skills export` wrote")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an exported skill to the store."""
    from programmable_kv.skills.store import SkillStore

    entry = SkillStore(store).import_file(file)
    _tell(entry, f"{entry.name} ({entry.key}) is kept", as_json)


def _tell(entry: Entry, sentence: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_shown(entry, unit=False), indent=1))
    else:
        out.print(sentence, markup=False, highlight=False)


def _shown(entry: Entry, *, unit: bool = True) -> dict[str, Any]:
    """A manifest as JSON, without entries that are long and of no use to a reader."""
    return entry.model_dump(mode="json", exclude=_BULKY if unit else {"unit"})


def _printable(text: str) -> str:
    """A text without characters that would control a terminal: an imported manifest may have any text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _size(nbytes: int) -> str:
    """A size in bytes, in the largest unit that gives at least 1."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, _ = size / 1000, units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
