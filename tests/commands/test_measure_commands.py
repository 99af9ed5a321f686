"""`pkv bench`, `pkv lab` and `pkv zoo`: cheap to import, with clear errors for options that do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from programmable_kv.commands import bench, lab
from programmable_kv.commands.measure import parse_lengths

PACKAGE = Path(__file__).parent.parent.parent / "src" / "programmable_kv"
HEAVY = ("torch", "transformers", "pydantic", "numpy", "scipy", "matplotlib")


@pytest.mark.parametrize("name", ["bench", "lab", "zoo", "measure", "templates"])
def test_a_command_module_imports_nothing_heavy(name: str) -> None:
    """The package's `__init__` is replaced by an empty module, so that only the command's own imports count."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('programmable_kv')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['programmable_kv'] = package\n"
        f"import programmable_kv.commands.{name}\n"
        f"print([module for module in {HEAVY!r} if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lengths_are_whole_numbers_above_zero() -> None:
    assert parse_lengths("512, 1024") == [512, 1024]
    for wrong in ("", "512,", "many", "0", "-4,8"):
        with pytest.raises(typer.BadParameter, match="whole numbers above 0"):
            parse_lengths(wrong)


def test_layers_belong_to_a_shape() -> None:
    done = CliRunner().invoke(bench.app, ["edit", "--layers", "2"])
    assert done.exit_code == 2
    assert "only a --shape" in done.output


def test_figures_of_another_model_are_not_attached(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    done = CliRunner().invoke(lab.app, ["adapter", "--model", "embedded", "--attach", str(tmp_path)])
    assert done.exit_code == 2
    assert "only the figures of --model embedded-plain can" in done.output
    assert (tmp_path / "training.json").read_text() == "{}"
