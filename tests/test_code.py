"""Rules for the code: lint, format, types, the direction of imports, and no device named anywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["importlinter.cli"],
    ],
    ids=" ".join,
)
def test_tools_are_content(command: list[str]) -> None:
    line = [sys.executable, "-m", *command]
    if command[0] == "importlinter.cli":
        line = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_device_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\.cuda\(|[\"'](cuda|mps)", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_double_precision_is_the_cpus(path: Path) -> None:
    """MPS has no float64, so tensors are moved to the CPU before they are converted."""
    assert not re.search(r"(?<!\.cpu\(\))\.double\(\)", path.read_text(encoding="utf-8"))


def test_only_the_engine_calls_a_model() -> None:
    """Everything is measured in the engine. Only the ways that the benches compare with call the model themselves."""
    for path in SOURCES:
        relative = path.relative_to(ROOT / "src" / "programmable_kv").as_posix()
        if relative not in ("engine.py", "bench/edit.py", "bench/splice.py"):
            code = re.sub(r"`[^`\n]*`", "", path.read_text(encoding="utf-8"))  # without examples in docstrings
            assert "past_key_values=" not in code, relative


def test_nothing_is_imported_before_it_is_needed() -> None:
    """`import programmable_kv` must not pay for training, plotting or statistics."""
    code = "import sys, programmable_kv; print([m for m in ('peft', 'matplotlib', 'scipy.stats', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
