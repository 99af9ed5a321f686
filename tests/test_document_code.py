"""The Python code of the documents runs, from top to bottom, on a tiny random model. Removed names fail here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import tiny
from programmable_kv import SkillStore
from programmable_kv.cli import app
from programmable_kv.vllm_plugin.prepare import compile_opening

ROOT = Path(__file__).parent.parent


def documented_log() -> str:
    """The log that `docs/explain-miss.md` explains."""
    page = (ROOT / "docs" / "explain-miss.md").read_text(encoding="utf-8")
    return page.partition("```json\n")[2].partition("```")[0]


FILES = {
    "policy.md": "order_status: {order_status}\n- If order_status is pending, cancel.\n- If order_status is shipped, deny.\n",
    "refunds.md": "tier: {tier}\nIf tier is gold, refund.\n",
    "returns.md": "Orders are returned within 30 days.\n",
    "log.jsonl": documented_log(),
}
"""the files that the documents' code opens"""


def python_of(page: str) -> list[str]:
    """A page's blocks of Python, with a given model in the place of every model that they load."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [re.sub(r"\bload_model\([^)]*\)", "given_model", block) for block in blocks]


def run(page: str) -> dict[str, Any]:
    """Run a page's blocks in one namespace, and return it."""
    namespace: dict[str, Any] = {"given_model": tiny(max_position_embeddings=8192)}
    for block in python_of(page):
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_the_readme_s_code_runs() -> None:
    assert run("README.md")["notebook"].fields == {"order_status": "shipped"}


def test_the_tutorial_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = run("docs/tutorial.md")["notebook"]
    assert notebook.last_account.operation == "load"
    assert notebook.last_account.exact, "the errata were folded back before it was saved"
    assert "tokens computed" in capsys.readouterr().out, "plans are printed"


def test_the_page_on_design_runs(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = run("docs/by-design.md")["notebook"]
    assert capsys.readouterr().out.endswith("exact\n")
    assert notebook.last_account.exact
    assert [part.name for part in notebook.parts if part.name] == []


def test_the_agent_page_s_code_runs() -> None:
    agent = run("docs/agent.md")["agent"]
    assert [dict(turn.changes) for turn in agent.turns] == [{}, {"order_status": "shipped"}]
    assert agent.notebook.parts[-1].text.count("14:02") == 1


def test_the_skills_page_s_code_runs() -> None:
    namespace = run("docs/skills.md")
    assert namespace["agent"].notebook.last_account.exact, "compiled together, in their order"
    assert namespace["agent"].composed.tokens_computed < 60


def test_the_vllm_page_s_code_runs(tmp_path: Path) -> None:
    """The test provides its store, tokenizer and `post`, and checks the requests that it would send."""
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = tiny()
    store = SkillStore(tmp_path / "skills")
    store.put(compile_opening(model, [("system", "You are the support agent.\n")]))
    for name in ("returns", "refunds"):
        store.compile(model, f"The policy on {name}.\n", name=name)
    sent: list[Any] = []

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent.append((path, body))
        return {}

    code = block.replace("/srv/skills", str(tmp_path / "skills"))
    exec(compile(code, "docs/vllm.md", "exec"), {"tokenizer": model.tokenizer, "post": post})
    ((path, body),) = sent
    assert path == "/v1/completions"
    assert body["cache_salt"] == "composed:tenant-7"
    starts = [mark["start"] for mark in body["kv_transfer_params"]["skills"]]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert model.tokenizer.decode(body["prompt"]).count("The policy on") == 2


def test_the_explain_miss_page_s_code_runs_and_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    report = run("docs/explain-miss.md")["report"]
    assert [cause.name for cause in report.causes] == ["clock"]
    assert "Time: …" in capsys.readouterr().out
    shown = (
        (ROOT / "docs" / "explain-miss.md").read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    )
    done = CliRunner().invoke(app, ["explain-miss", "log.jsonl"], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines()
