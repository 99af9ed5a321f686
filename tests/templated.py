"""Tiny models with the chat templates of `tests/templates/`."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from conftest import tiny

TEMPLATES = Path(__file__).parent / "templates"


def with_template(text: str) -> Any:
    """A tiny model with a chat template."""
    model = tiny(max_position_embeddings=4096)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = text
    return replace(model, tokenizer=tokenizer)


@cache
def of(family: str) -> Any:
    """A tiny model with a family's chat template."""
    return with_template((TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"))
