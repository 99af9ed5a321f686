"""The package's structure: no import cycles, tests that mirror its folders, and layers as the contract has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "programmable_kv"

ALLOWED = {
    ("cache.copies", "cache.slot_storage"): "types only: it reads and fills a buffer",
    ("cache.buffer_layer", "cache.slot_storage"): "types only: a layer refers to the buffer that it belongs to",
    ("notebook.asking", "notebook.notebook"): "types only: a question is put to a notebook",
    ("notebook.html", "notebook.notebook"): "types only: it shows a notebook",
    ("notebook.keeping", "notebook.notebook"): "types only: turns are kept in a notebook",
    ("notebook.prefilling", "notebook.notebook"): "types only: it computes a notebook",
    ("notebook.saving", "notebook.notebook"): "types only: it saves a notebook",
    ("notebook.streaming", "notebook.notebook"): "types only: a stream is drawn from a notebook",
    ("notebook.suggesting", "notebook.notebook"): "types only: it tries a notebook's lines",
    ("notebook.movement", "notebook.notebook"): "types only: it compares two states of a notebook",
    ("notebook.plans", "notebook.notebook"): "types only: they are plans of a notebook",
    ("storage.files", "storage.local"): "inside a function: an address names the kind of storage, which is opened then",
    ("storage.files", "storage.remote"): "inside a function: as for local files",
}
"""imports that may be part of a cycle, and why; imports inside functions and for type checkers count like any other"""


def imports() -> dict[str, set[str]]:
    """module -> the package's modules that it imports anywhere in the file, without the package's prefix.

    The package's `__init__` is left out: it imports every public name, on first use and for type checkers.
    """
    graph = grimp.build_graph("programmable_kv", cache_dir=None)
    short = {module: module.removeprefix("programmable_kv.") for module in graph.modules if "." in module}
    return {
        name: {short[each] for each in graph.find_modules_directly_imported_by(module) if each in short}
        for module, name in short.items()
    }


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The modules of one import cycle, each importing the next one; empty if there is no cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: {each for each in found if (name, each) not in ALLOWED} for name, found in imports().items()}
    assert not circle(graph), f"a circle of imports: {' -> '.join(circle(graph))}"


@pytest.mark.parametrize("edge", sorted(ALLOWED), ids=" -> ".join)
def test_an_import_is_allowed_only_while_it_closes_a_circle(edge: tuple[str, str]) -> None:
    graph = {
        name: {each for each in found if (name, each) not in ALLOWED or (name, each) == edge}
        for name, found in imports().items()
    }
    assert circle(graph), f"{edge} closes no circle any more: remove it from ALLOWED"


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["d"], "d": []}) == []
    found = circle({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": []})
    assert set(found) == {"a", "b", "c"}


def test_imports_inside_functions_are_seen() -> None:
    assert "records" in imports()["commands.records"], "the graph must hold the lazy imports of the commands"


def test_every_room_has_a_folder_of_tests() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    missing = rooms - tested
    assert not missing, f"no tests in {', '.join(f'tests/{room}/' for room in sorted(missing))}"
    strangers = tested - rooms - {"training", "examples"}  # these are folders of the repository, not of the package
    assert not strangers, f"tests/{', '.join(sorted(strangers))} mirrors nothing in the package"


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports test files by name alone, so it would not run the second one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))
