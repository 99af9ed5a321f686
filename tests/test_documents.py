"""Documents stay true: their numbers come from records, and their modules, options and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from programmable_kv.figures import draw_all
from programmable_kv.models.names import EMBEDDED, EMBEDDED_PLAIN
from programmable_kv.quotes import documents, refreshed, wrong_quotes
from programmable_kv.records import Record, all_records, read_record
from scripts.cli_page import commands, options_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = list(documents(ROOT / "docs"))
RESULTS = ROOT / "results"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_number_is_its_records(path: Path) -> None:
    assert wrong_quotes(path.read_text(encoding="utf-8"), RESULTS) == []


def test_a_wrong_or_unquoted_number_is_found() -> None:
    record = next(r for r in all_records(RESULTS) if r.name == "adapter-abilities")
    right = refreshed("a <!--adapter-abilities:ratio:.3f-->?<!--/--> b", RESULTS)
    assert f"{record.figure('ratio'):.3f}" in right
    assert wrong_quotes(right, RESULTS) == []
    assert len(wrong_quotes(right.replace(f"{record.figure('ratio'):.3f}", "0.123"), RESULTS)) == 1
    assert len(wrong_quotes("it is 12 times faster", RESULTS)) == 1
    unreadable = right.replace(":ratio:", ":ra tio:").replace(f"{record.figure('ratio'):.3f}", "0")
    assert len(wrong_quotes(unreadable, RESULTS)) == 1, "a quote that the pattern does not find would never be checked"
    assert len(wrong_quotes("it takes 80 ms", RESULTS)) == 1
    assert wrong_quotes("others report 80 ms (Source, 2026) <!--cited-->", RESULTS) == []


def test_records_are_complete_and_of_the_shipped_model() -> None:
    records = all_records(RESULTS)
    assert {"adapter-held-out", "adapter-abilities", "edit-modes", "edit-ttft"} <= {r.name for r in records}
    assert all(r.complete for r in records)
    for name in (EMBEDDED, EMBEDDED_PLAIN):
        fingerprints = {r.model_fingerprint for r in records if r.model == name}
        assert len(fingerprints) == 1, "records of different adapters are mixed"


def test_a_record_has_the_name_of_its_file() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == {record.name for record in all_records(RESULTS)}


def test_a_document_names_the_model_of_its_figures() -> None:
    """A reader who is told nothing takes a figure to be about the model that `load_model()` returns."""
    plain = {path.stem for path in RESULTS.glob("*.json") if read_record(path).model == EMBEDDED_PLAIN}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        quoted = plain & set(re.findall(r"<!--([a-z0-9-]+):", text))
        said = EMBEDDED_PLAIN in re.sub(r"<!--.*?-->", "", text)
        assert said or not quoted, f"{path.name} quotes {sorted(quoted)} but does not name the model"


def test_figures_are_drawn_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKV_RESULTS", str(RESULTS))
    figures = draw_all(tmp_path)
    assert len(figures) == len(list((ROOT / "docs" / "figures").iterdir()))
    for drawn in figures:
        committed = ROOT / "docs" / "figures" / drawn.name
        assert committed.read_bytes() == drawn.read_bytes(), f"run `pkv figures`: {drawn.name} is out of date"


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_option_and_command_named_is_real() -> None:
    real = dict(commands())
    for path in DOCUMENTS:
        for command in re.findall(r"(?:^|[`/])pkv ([^\n\\`]*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            words = tuple(
                word for word in command.split() if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")
            )
            name = next((words[:depth] for depth in (2, 1) if words[:depth] in real), None)
            if command.split()[:1] == ["COMMAND"] or (name is None and not words and command.startswith("-")):
                name = ()
            assert name is not None, f"{path.name}: there is no command 'pkv {command}'"
            for option in re.findall(r"--[a-z-]+", command):
                assert option in options_of(real[name]), f"{path.name}: 'pkv {' '.join(name)}' has no {option}"


def test_the_readme_opens_with_two_commands_that_do_all_the_setup() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("pkv demo")
    assert commands[1].endswith("pytest")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script, "CI runs the README's own lines"


def test_a_records_schema_is_what_the_docs_say() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in ("name", "version", "rows", "summary"):
        assert name in Record.model_fields
        assert f"`{name}`" in page
