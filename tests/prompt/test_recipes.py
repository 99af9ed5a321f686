"""Every code block of `docs/prompts.md` runs, and leaves the context that the page describes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from reference import assert_rows_equal, full_forward

PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"
RECIPES = {
    "A clock": ["It is 2026-11-24 18:00."],
    "A todo list": [
        "- [x] step 3: call",
        "todo is now: as above, but for these lines",
        "-- [ ] step 3:",
        "+- [x] step 3:",
    ],
    "A memory block": ["می\u200cخواهم", "- prefers tea"],
    "JSON state": ['"note": "the customer said \\"today\\""', '"status": "pending"', '"total": 24.9'],
    "A tool catalogue": ["cp <filename> <dir>; a text ends in <|endoftext|>", "limit for each call: 3"],
    "An order": ["Order A-1042, shipped, to arrive on 2026-11-28. Gift: false.", "12 St James's Square"],
}


def blocks() -> dict[str, str]:
    """heading -> the code below it."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
        if code:
            found[heading] = "\n".join(code)
    return found


def test_every_recipe_is_checked() -> None:
    assert set(blocks()) == set(RECIPES)


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_runs_and_does_what_it_says(heading: str) -> None:
    names: dict[str, Any] = {"model": tiny(max_position_embeddings=8192)}
    exec(compile(blocks()[heading], f"{PAGE.name}: {heading}", "exec"), names)
    notebook = names["notebook"]
    for expected in RECIPES[heading]:
        assert expected in notebook.rendered_text
    assert "admin" not in notebook.rendered_text
    if heading == "JSON state":
        state = re.search(r"State: (.*)\n", notebook.rendered_text)
        assert state is not None
        assert json.loads(state.group(1))["note"] == 'the customer said "today"'
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    exact = [slot for slot, state in enumerate(notebook.states) if state.exact]
    assert_rows_equal(notebook.cache, expected, exact, atol=1e-9)
