"""Imports and help are fast, and the public names are complete and resolved by one table."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import programmable_kv
from programmable_kv import errors
from programmable_kv.errors import MissingExtraError
from programmable_kv.extras import EXTRA_OF, extra_missing_in, missing_message, require_extra

HEAVY = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "fsspec", "jinja2", "rich.table", "rich.progress", "scipy",
    "statsmodels", "matplotlib", "peft", "gguf",
)  # fmt: skip
"""modules that help must not import; pydantic is not among them, because typer itself uses it"""
_ROOT_FILE = Path(str(programmable_kv.__file__))


def heavy_after(code: str, *heavy: str) -> list[str]:
    """The modules in `heavy` that a fresh interpreter has imported after running `code`."""
    report = f"{code}\nimport sys, json; print(json.dumps([m for m in {heavy!r} if m in sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return list(json.loads(done.stderr.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_after("import programmable_kv, programmable_kv.errors; dir(programmable_kv)", *HEAVY, "pydantic") == []
    assert "torch" in heavy_after("import programmable_kv; programmable_kv.Notebook", *HEAVY), (
        "the check sees what is imported"
    )


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    """One process prints the help of all commands, so the import of any of them is noticed."""
    code = """
import typer.main
from programmable_kv.cli import app
found = []
def walk(command, words):
    found.append(" ".join(words))
    try:
        app([*words, "--help"])
    except SystemExit as stop:
        assert not stop.code, words
    for name, sub in getattr(command, "commands", {}).items():
        walk(sub, [*words, name])
walk(typer.main.get_command(app), [])
assert {"", "edit", "demo", "skills compile", "bench edit", "lab edit-modes", "zoo", "results"} <= set(found), found
"""
    assert heavy_after(code, *HEAVY) == []


def test_every_error_is_public() -> None:
    defined = {name for name, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, Exception)}
    assert defined <= set(programmable_kv.__all__)


def test_the_three_lists_of_public_names_agree() -> None:
    """The lists are `__all__`, the table that resolves names, and the imports for type checkers."""
    table = programmable_kv._MODULE_OF
    assert programmable_kv.__all__ == sorted(["__version__", *table])
    [block] = [
        node for node in ast.parse(_ROOT_FILE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]  # fmt: skip
    typed = {
        alias.name: str(node.module).removeprefix("programmable_kv.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == table


@pytest.mark.parametrize("name", programmable_kv.__all__)
def test_a_public_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(programmable_kv, name)
    assert name in dir(programmable_kv)
    if name != "__version__":
        assert value.__module__ == f"programmable_kv.{programmable_kv._MODULE_OF[name]}", (
            "the table names where it is defined"
        )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Notebok'"):
        _ = programmable_kv.Notebok


def test_a_missing_extra_is_one_line_that_installs_it() -> None:
    require_extra("cli", "json")
    with pytest.raises(
        MissingExtraError, match=r"no_such_module is not installed. Run: pip install 'programmable-kv\[lab\]'"
    ):
        require_extra("lab", "json", "no_such_module")


def test_every_extra_is_declared_with_the_modules_it_installs() -> None:
    """The table for error messages agrees with the project's own declaration."""
    project = tomllib.loads((_ROOT_FILE.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    for module, extra in EXTRA_OF.items():
        if module != "click":  # typer's own
            package = {"sklearn": "scikit-learn", "prometheus_client": "prometheus-client"}.get(module, module)
            assert any(requirement.startswith(package) for requirement in declared[extra]), (module, extra)
    core = [requirement.partition(">")[0] for requirement in project["dependencies"]]
    assert not set(core) & set(EXTRA_OF)


def test_a_failed_import_is_told_only_where_an_extra_would_help() -> None:
    assert extra_missing_in(ModuleNotFoundError(name="scipy.stats")) == missing_message("lab", ["scipy"])
    assert extra_missing_in(ModuleNotFoundError(name="somebody_elses")) is None
    assert extra_missing_in(ModuleNotFoundError()) is None


def test_pkv_without_its_extra_says_how_to_get_it() -> None:
    """In a real interpreter without typer, the script's entry point prints one line and no traceback."""
    source = str(_ROOT_FILE.parent.parent)
    code = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{source!r}]\n"
    code += "from programmable_kv.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: typer is not installed. Run: pip install 'programmable-kv[cli]'\n"
