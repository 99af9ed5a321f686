"""`pkv template`: the row of a model's chat template, or of a template file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import tokenizer
from programmable_kv.cli import app
from programmable_kv.errors import InvalidValueError, ModelUnavailableError, TemplateError

TEMPLATES = Path(__file__).parent.parent / "templates"


def row_of(what: str) -> dict[str, str]:
    done = CliRunner().invoke(app, ["template", what, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, str] = json.loads(done.output)
    return found


def test_a_template_file_and_a_model_s_folder_give_the_same_row(tmp_path: Path) -> None:
    """Only the tokenizer is loaded: the folder has no weights."""
    saved = tokenizer("byte-level")
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "own.jinja"
    file.write_text(saved.chat_template)
    assert row_of(str(tmp_path)) == row_of(str(file))
    assert row_of(str(file))["erratum"] == "system message"


def test_the_row_is_printed_as_a_table() -> None:
    done = CliRunner().invoke(app, ["template", str(TEMPLATES / "mistral_v1.jinja")], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "first user turn, when asked" in done.output
    assert "multi turn" in done.output


def test_what_has_no_chat_template_is_told(tmp_path: Path) -> None:
    saved = tokenizer("byte-level").__class__(tokenizer_object=tokenizer("byte-level").backend_tokenizer)
    saved.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for what, error, match in (
        (str(tmp_path), TemplateError, "has no chat template"),
        (str(tmp_path / "none.jinja"), InvalidValueError, "cannot read"),
        (str(tmp_path / "nowhere"), ModelUnavailableError, "folder does not exist"),
    ):
        with pytest.raises(error, match=match):
            CliRunner().invoke(app, ["template", what], catch_exceptions=False)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailableError, match="could not load the tokenizer"):
        CliRunner().invoke(app, ["template", str(tmp_path)], catch_exceptions=False)
