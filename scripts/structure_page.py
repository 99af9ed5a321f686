"""`docs/structure.md`: the layers, from the contract in pyproject.toml, and a line per module, from its docstring."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

_PACKAGE = "programmable_kv"


def structure_page(page: str, root: Path) -> str:
    """Return the page with both generated parts replaced. The text around them is kept.

    Raises:
        ValueError: a marker is missing from the page, or a module has no docstring.
    """
    page = _replaced(page, "layers", f"```text\n{layers_picture(root)}\n```")
    return _replaced(page, "modules", modules_table(root))


def layers(root: Path) -> list[list[str]]:
    """Return the layers of the contract, the highest first. Modules of one layer do not import each other."""
    contract = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    return [
        [module.strip().removeprefix(f"{_PACKAGE}.") for module in layer.split("|")] for layer in contract["layers"]
    ]


def layers_picture(root: Path) -> str:
    """Return a picture with one layer on each line. A module imports only from lines below its own."""
    return "\n".join("  |  ".join(layer) for layer in layers(root))


def modules_table(root: Path) -> str:
    """Return a table with one row for each module, in the order of the layers."""
    package = root / "src" / _PACKAGE
    order = {name: rank for rank, layer in enumerate(layers(root), start=1) for name in layer}

    def rank(path: Path) -> tuple[int, str, bool, str]:
        relative = path.relative_to(package)
        room = relative.parts[0].removesuffix(".py")
        return order.get(room, 0), room, relative.name != "__init__.py", relative.as_posix()

    rows = [
        f"| `{path.relative_to(package).as_posix()}` | {_first_sentences(path)} |"
        for path in sorted(package.rglob("*.py"), key=rank)
        if path.read_text(encoding="utf-8").strip()
    ]
    return "\n".join(["| module | what |", "| --- | --- |", *rows])


def _first_sentences(path: Path) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path} has no docstring; the structure page needs its first paragraph")
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|").replace("<", "\\<").removesuffix(".")


def _replaced(page: str, name: str, text: str) -> str:
    pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda match: match[1] + text + match[2], page)
    if count != 1:
        raise ValueError(f"docs/structure.md must contain '<!-- generated: {name} -->' once, with an '<!-- end -->'")
    return replaced
