"""An argument that is not text, or not a model, is refused with this package's own error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Notebook, Skill
from programmable_kv.errors import InvalidArgumentError

CALLS: dict[str, Callable[[Any, Path], object]] = {
    "a message's role": lambda model, _: Notebook(model).message(3, "x"),  # type: ignore[arg-type]
    "a message's content": lambda model, _: Notebook(model).message("system", 5),  # type: ignore[arg-type]
    "a text": lambda model, _: Notebook(model).text(5),  # type: ignore[arg-type]
    "a skill's text": lambda model, _: Skill.compile(model, 5),  # type: ignore[arg-type]
    "loading a notebook needs a Model": lambda _, folder: Notebook.load(folder, "embedded"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", CALLS)
def test_another_type_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=what):
        CALLS[what](tiny(), tmp_path)


def test_a_notebook_shows_its_model_tokens_and_fields() -> None:
    notebook = Notebook(tiny()).text("status: {status}", status="pending")
    notebook.prefill()
    assert repr(notebook) == f"<Notebook on {notebook.model.name}: {len(notebook)} cached tokens, status='pending'>"
    notebook.edit(status="delayed" * 50)
    assert len(repr(notebook)) < 150  # a long value is shortened
