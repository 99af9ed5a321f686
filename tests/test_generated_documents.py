"""The generated documents agree with the code: claims, command line, API reference, and structure."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import programmable_kv
from programmable_kv.errors import InputError
from scripts.cli_page import commands
from scripts.reference_page import markdown, public_names, section
from scripts.structure_page import layers, layers_picture, structure_page
from scripts.write_docs import generated

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "programmable_kv"


@pytest.mark.parametrize(
    "name", ["claims.md", "cli.md", "explain-miss.md", "reference.md", "structure.md", "templates.md"]
)
def test_a_generated_document_is_up_to_date(name: str) -> None:
    written = generated()
    assert len(written) == 6, "a document without a test"
    path = ROOT / "docs" / name
    assert path.read_text(encoding="utf-8") == written[path], (
        f"docs/{name} differs from the code: run `python -m scripts.write_docs` in the repository's root"
    )


def test_every_command_and_option_is_on_the_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for words, command in commands():
        part = page.partition(f"# `{' '.join(('pkv', *words))}`\n")[2].partition("\n#")[0]
        assert part, words
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in part, (words, parameter.opts)
                assert parameter.help, f"{words}: {parameter.opts[0]} has no help"


def test_every_public_name_has_a_section() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert sorted(sections) == sorted(name for name, _ in public_names())
    assert {"Notebook", "load_model"} <= set(programmable_kv.__all__) & set(sections)
    for link in re.findall(r"\]\(#(\w+)\)", page):
        assert link in {name.lower() for name in sections}


class Mode(enum.StrEnum):
    """Ways."""

    FAST = "fast"
    """in a hurry"""


@dataclass(frozen=True)
class Sample:
    """What is shown.

    Args:
        wide: a value: its text
            goes on here.
    """

    wide: int = 1
    """metres"""
    _hidden: int = 2


class Holder:
    """Holds."""

    def method(
        self, first: int, /, second: str = "x", *rest: int, mode: Mode = Mode.FAST, other: object = object()
    ) -> int:
        """Do it."""
        return 0

    @classmethod
    def made(cls, *, name: str) -> Holder:
        """Make one."""
        return cls()

    @cached_property
    def size(self) -> int:
        """How big."""
        return 0

    def _private(self) -> None:
        """Not shown."""


def test_signatures_members_and_attributes_are_shown() -> None:
    shown = section("Holder", Holder, __name__)
    assert "    first: int,\n    /,\n    second: str = 'x',\n    *rest: int,\n    mode: Mode = Mode.FAST," in shown
    assert "other: object = ...," in shown, "an address must not be in a document"
    assert "@classmethod\nmade(*, name: str) -> Holder" in shown
    assert "### Holder.size\n\n```python\nsize: int\n```\n\nHow big." in shown
    assert "private" not in shown
    assert "- `wide`: metres" in section("Sample", Sample, __name__)
    assert "hidden`" not in section("Sample", Sample, __name__)
    assert "- `wide`: a value: its text goes on here." in section("Sample", Sample, __name__)
    assert "- `FAST` = `'fast'`: in a hurry" in section("Mode", Mode)
    assert "Base: `InputError`." in section("E", type("E", (InputError,), {}))


def test_a_sentence_in_a_raises_block_is_no_name() -> None:
    text = markdown("Do.\n\nRaises:\n    A, B: when so.\n    As `other`: all of them.\n\nReturns:\n    One\n    thing.")
    assert text == "Do.\n\nRaises:\n\n- `A`, `B`: when so.\n- As `other`: all of them.\n\nReturns:\n\nOne thing."


def test_the_structure_page_names_every_module_and_layer() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    modules = page.partition("<!-- generated: modules -->")[2]
    named = set(re.findall(r"^\| `([\w/]+\.py)` \| \S", modules, re.MULTILINE))
    assert named == {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stat().st_size}
    assert f"\n{layers_picture(ROOT)}\n" in page
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= {name for layer in layers(ROOT) for name in layer}, "a room that no layer of the contract holds"


def test_a_structure_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="generated: layers"):
        structure_page("# Structure\n", ROOT)
