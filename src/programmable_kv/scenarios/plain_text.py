"""Plain English that comes with every Python: the docstrings of the standard library.

One part is replayed during adapter training to preserve the base model's abilities. The other part is
never trained on and measures whether they are preserved (perplexity against the base model).
"""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

HELD_OUT_FROM = "p"
"""modules whose name starts with this letter or a later one are never replayed"""
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests"}


@cache
def documents(
    part: Literal["replay", "held_out"], minimum_characters: int = 600, *, packages: bool = False
) -> tuple[str, ...]:
    """Return docstrings of the standard library's top-level modules by module name; with `packages`, of all modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for path in sorted(folder.rglob("*.py") if packages else folder.glob("*.py")):
        module = path.relative_to(folder).with_suffix("").parts
        if (module[0].lower() >= HELD_OUT_FROM) != (part == "held_out") or _NOT_PROSE.intersection(module):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= minimum_characters:
                    found.append(text)
    return tuple(found)
