"""`pkv explain-miss` as a user runs it: a table, a page, JSON, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from explain.corpus import ANSWERED, ASKED, ASKED_NEXT, RULES, SHAPES, chat, claude
from programmable_kv import InvalidRequestError
from programmable_kv.cli import app
from programmable_kv.errors import InvalidArgumentError

SECRET, SIGNATURE = "the customer's name is Theodora", "c2lnbmF0dXJlLW5vdC1mb3ItcHJpbnQ="


def run(*arguments: str, given: str | None = None) -> str:
    done = CliRunner().invoke(
        app, ["explain-miss", *arguments], env={"COLUMNS": "80"}, catch_exceptions=False, input=given
    )
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of four requests of one conversation, with a clock at the top."""
    path = tmp_path / "log.jsonl"
    bodies = [
        chat(f"Today: 2026-06-09 15:0{n} {SECRET}\n{RULES}", *[ASKED, ANSWERED] * n, ASKED_NEXT) for n in range(4)
    ]
    path.write_text("\n".join(json.dumps(body) for body in bodies))
    return path


def test_a_log_is_explained_in_a_table_that_fits(log: Path) -> None:
    shown = run(str(log))
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "One cause costs you" in shown
    assert "│ 1 │ clock" in shown
    assert "Today: …" in shown
    assert "log.jsonl:4, after request 3" in shown
    assert "Counted in bytes" in shown
    assert "leave it there" in shown


def test_every_shape_of_the_corpus_is_printed_within_80_columns(tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps(body) for body in shape.log))
        shown = run(str(path))
        assert shape.cause in " ".join(shown.split())
        assert all(len(line) <= 80 for line in shown.splitlines()), shape.name


def test_json_is_the_report_and_nothing_else(log: Path) -> None:
    found = json.loads(run(str(log), "--json"))
    assert found["unit"] == "bytes"
    assert [finding["cause"] for finding in found["findings"]] == ["first request", "clock", "clock", "clock"]
    assert found["causes"][0]["lost"] == found["lost"]
    assert found["headline"].startswith("One cause")


def test_text_is_hidden_on_request_everywhere(log: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert "Theodora" in run(str(log), "--json")
    for arguments in (["--json"], [], ["--html", str(page)]):
        shown = run(str(log), "--no-text", *arguments)
        assert "Theodora" not in shown
        assert "Today" not in shown
    assert "Theodora" not in page.read_text()
    assert "clock" in page.read_text()


def test_what_is_opaque_is_never_printed(tmp_path: Path) -> None:
    """Signatures and encrypted reasoning are compared but not shown, neither as text nor in JSON or HTML."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE}
    redacted = {"type": "redacted_thinking", "data": SIGNATURE}
    paths = []
    for number, first in enumerate(([thought], [{**thought, "signature": "b3RoZXI="}], [redacted])):
        path = tmp_path / f"{number}.json"
        answer = [*first, {"type": "text", "text": ANSWERED}]
        path.write_text(json.dumps(claude([RULES], ASKED, answer, ASKED_NEXT, *[ANSWERED, ASKED_NEXT] * number)))
        paths.append(str(path))
    page = tmp_path / "page.html"
    for arguments in (["--json"], [], ["--html", str(page)]):
        shown = run(*paths, *arguments)
        assert "c2lnbm" not in shown
        assert "stripped thinking" in shown
    assert "c2lnbm" not in page.read_text()


def test_a_log_comes_from_standard_input(log: Path) -> None:
    assert "One cause costs you" in run("-", given=log.read_text())


def test_control_characters_of_a_log_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    usage = {"prompt_tokens": 9000, "prompt_tokens_details": {"cached_tokens": 0}}
    system = "\x1b[2J\x1b]0;title\x07 \ud800 [red]x[/red] 15:0{}\n" + RULES
    bodies = [{**chat(system.format(n), ASKED), "model": "\x1b[2Jm", "usage": usage} for n in range(2)]
    path.write_text("\n".join(json.dumps(body) for body in bodies))
    shown = run(str(path))
    assert "No price is known for �[2Jm" in shown
    assert "\x1b" not in shown
    page = tmp_path / "page.html"
    assert json.loads(run(str(path), "--json", "--html", str(page)))["findings"][1]["cause"] == "clock"
    assert "[red]x[/red]" in page.read_text(encoding="utf-8")
    assert "[red]x[/red]" in shown, "what looks like markup is text"


def test_errors_are_typed(log: Path, tmp_path: Path) -> None:
    log.write_text(log.read_text() + "\nnot json\n")
    with pytest.raises(InvalidRequestError, match=r"log.jsonl:5 is not JSON"):
        run(str(log))
    assert "1 line was left out" in run(str(log), "--skip-bad-lines")
    with pytest.raises(InvalidRequestError, match="cannot read"):
        run(str(tmp_path / "none.jsonl"))
    with pytest.raises(InvalidArgumentError, match="--top"):
        run(str(log), "--top", "0")
    with pytest.raises(InvalidRequestError, match="cannot read"):
        run(str(log), "--skip-bad-lines", "--prices", str(tmp_path / "none.json"))


def test_more_causes_than_are_shown_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(body) for shape in SHAPES[:8] for body in shape.log))
    shown = run(str(path), "--top", "2")
    assert "more causes: --top" in shown
    assert "\n2. " in shown
    assert "\n3. " not in shown
