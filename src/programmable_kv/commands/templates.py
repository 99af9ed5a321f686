"""`pkv template`: shows what a model's chat template can do with a notebook."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from programmable_kv.commands.common import out, read_text
from programmable_kv.errors import TemplateError

_JINJA = ".jinja"


def template(
    model: Annotated[
        str, typer.Argument(help="'embedded', a Hub id, a folder, a .gguf file, or a chat template's own .jinja file")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print the row as JSON")] = False,
) -> None:
    """Show what a model's chat template can do.

    The command renders small conversations to find how the template treats system and tool messages, further turns, and
    the erratum of an edit. It loads only the tokenizer.
    """
    from programmable_kv.notebook.survey import COLUMNS, survey, survey_of_text

    if model.endswith(_JINJA):
        row = survey_of_text(read_text(Path(model)))
    else:
        from programmable_kv.models.load import load_tokenizer

        tokenizer = load_tokenizer(model)
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(f"the tokenizer of '{model}' has no chat template. Build notebooks from raw text.")
        row = survey(tokenizer)
    if as_json:
        print(json.dumps(asdict(row), indent=1))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for name in COLUMNS:
        table.add_row(name.replace("_", " "), getattr(row, name))
    out.print(table)
