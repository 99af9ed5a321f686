"""Each example runs on a tiny random model, and on the embedded model, where it decides right."""

from __future__ import annotations

import ast
import importlib.util
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch

import programmable_kv
from conftest import tiny, tiny_model, tokenizer
from programmable_kv import SkillStore

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
ROOM = {"max_position_embeddings": 8192}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["tiny", pytest.param("embedded", marks=[pytest.mark.weights])])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(**ROOM) if request.param == "tiny" else request.getfixturevalue("embedded")


def code_of(path: Path) -> str:
    """A script's text, or the code cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", [*SCRIPTS, EXAMPLES / "notebook.ipynb"], ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names_only(path: Path) -> None:
    code = code_of(path)
    assert len(code.splitlines()) < 60
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "programmable_kv":
            assert node.module == "programmable_kv", f"{path.name} imports from {node.module}"
            assert {alias.name for alias in node.names} <= set(programmable_kv.__all__)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.startswith("__"), f"{path.name} uses .{node.attr}"


def test_own_prompt(model: Any) -> None:
    decided = example("own_prompt").main(model)
    if model.name == "embedded":
        assert decided == ["cancel", "deny", "cancel"]
    assert set(decided) <= {"cancel", "deny"}


def test_agent_loop(model: Any) -> None:
    decided = example("agent_loop").main(model)
    if model.name == "embedded":
        assert decided == ["cancel", "deny", "accept_return", "deny"]
    assert len(decided) == 4


def test_skills_from_folder(model: Any, tmp_path: Path) -> None:
    module = example("skills_from_folder")
    decided = module.main(model, EXAMPLES / "skills", SkillStore(tmp_path), module.VALUES)
    assert set(decided) == {file.stem for file in (EXAMPLES / "skills").glob("*.md")}
    if model.name == "embedded":
        assert decided == {"cancellation": "deny", "refund": "issue_refund"}
        others = {"order_status": "pending", "account_role": "suspended"}
        decided = module.main(model, EXAMPLES / "skills", SkillStore(tmp_path), others)
        assert decided == {"cancellation": "cancel", "refund": "escalate"}
    with model.engine.meter.measure() as reading:
        skills = module.compiled(model, EXAMPLES / "skills", SkillStore(tmp_path), module.VALUES)
    assert set(skills) == set(decided)
    shortest = min(len(skill) for skill in skills.values())
    assert reading.account.tokens_computed < shortest, "a second run takes every skill from the store"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve the application on a real local server in a thread. Yields its address."""
    import uvicorn

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server stopped before it had started"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_fastapi_service(model: Any) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    httpx = pytest.importorskip("httpx2")
    question = {
        "request": "Somebody asks for a cancellation. What do you do?",
        "options": ["cancel", "deny"],
    }
    with served(example("fastapi_service").create_app(model)) as address, httpx.Client(base_url=address) as client:
        before = client.post("/decide", json=question).json()
        edited = client.put("/fields", json={"order_status": "shipped"}).json()
        after = client.post("/decide", json=question).json()
        refused = client.put("/fields", json={"colour": "red"})
        assert client.get("/fields").json() == {"order_status": "shipped"}
    assert 0 < edited["tokens_computed"] < 100
    assert sum(after["probabilities"].values()) == pytest.approx(1)
    assert after["probabilities"] != before["probabilities"]
    assert refused.status_code == 422
    assert refused.json()["error"] == "UnknownFieldError"
    if model.name == "embedded":
        assert (before["choice"], after["choice"]) == ("cancel", "deny")


def executed(path: Path, model: str) -> list[Any]:
    """The cells of a notebook after a run with this model in a real kernel."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"MODEL = {model!r}"
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    return list(book.cells)


def check_notebook(cells: list[Any]) -> None:
    shown = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    tables = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(tables) >= 2
    assert "shipped" in tables[0]


@pytest.mark.slow
def test_the_notebook_on_a_tiny_model(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32, **ROOM).save_pretrained(tmp_path)
    tokenizer("byte-level").save_pretrained(tmp_path)
    check_notebook(executed(EXAMPLES / "notebook.ipynb", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.weights
def test_the_notebook_on_the_embedded_model() -> None:
    cells = executed(EXAMPLES / "notebook.ipynb", "embedded")
    check_notebook(cells)
    decided = [
        output.data["text/plain"]
        for cell in cells
        if cell.cell_type == "code" and "decide" in cell.source
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert "choice='cancel'" in decided[0]
    assert "choice='deny'" in decided[1]
