"""The bench of overhead: it has every public operation, separates forwards from the rest, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from programmable_kv import Mode, Notebook
from programmable_kv.bench.overhead import ForwardTime, conversation, few_times, model_for, operations, run

NOT_ON_A_LIVE_CONTEXT = {
    "from_messages",
    "message",
    "text",
    "field",
    "skill",
    "prefill",
    "rendered",
    "mentions",
    "readable",
}
COPIES_OR_FILES = {"suggest_readers", "fork", "save", "load", "release"}
"""operations whose cost is that of the cache's bytes"""


@pytest.fixture(scope="module")
def model() -> Any:
    return model_for([1024])


class Spy:
    """A notebook that remembers which of its attributes were used."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook, self.used = notebook, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self.notebook, name)


def test_every_public_operation_is_measured(model: Any) -> None:
    notebook = conversation(model, 512, 8)
    spy: Any = Spy(notebook)
    found = operations(model)
    for operation in found:
        mark = notebook.mark()
        if operation.prepare is not None:
            operation.prepare(notebook)
        operation.run(spy)
        notebook.rollback(mark)
    public = {name for name in dir(Notebook) if not name.startswith("_") and callable(getattr(Notebook, name))}
    missing = public - NOT_ON_A_LIVE_CONTEXT - COPIES_OR_FILES - spy.used - {"part"}  # `cut` and `move` look parts up
    assert not missing, f"add an Operation for {', '.join(sorted(missing))}"
    assert {str(mode) for mode in Mode} <= {operation.name for operation in found}


def test_an_operation_leaves_the_notebook_unchanged(model: Any) -> None:
    notebook = conversation(model, 512, 8)
    before = (notebook.ids, notebook.states, notebook.fields, notebook.cache.keys(0).clone())
    for operation in operations(model):
        few_times(notebook, operation, 1)
        assert (notebook.ids, notebook.states, notebook.fields) == before[:3], operation.name
        assert torch.equal(notebook.cache.keys(0), before[3]), operation.name


def test_a_conversation_has_about_the_length_and_the_fields_it_was_asked_for(model: Any) -> None:
    notebook = conversation(model, 1024, 16)
    assert 0.7 * 1024 < len(notebook) < 1.3 * 1024
    assert len(notebook.fields) == 20
    assert list(notebook.fields.values()).count("edited before") == 5


def test_forwards_are_counted_only_while_they_are_watched() -> None:
    module, given = torch.nn.Linear(4, 4), torch.zeros(1, 4)
    forward = ForwardTime()
    module(given)
    assert forward.seconds == 0
    with forward.watching(module):
        module(given)
        counted = forward.seconds
        assert counted > 0
        torch.zeros(1000, 1000).sum()
        assert forward.seconds == counted
    module(given)
    assert forward.seconds == counted


def test_a_slice_of_the_bench_writes_a_record(tmp_path: Path, model: Any) -> None:
    record = run(model, tmp_path / "overhead.json", lengths=[512], units=[8], repeats=1)
    assert record.complete
    measured = record.rows[0]["operations"]
    assert set(measured) == {operation.name for operation in operations(model)}
    assert measured["states"]["forward_ms"] == measured["cut"]["forward_ms"] == 0
    assert measured["suffix"]["forward_ms"] > 0
    assert record.figure("at_512.most_ms") == max(each["beside_ms"] for each in measured.values())
    with pytest.raises(ValueError, match="zip"):
        run(model, tmp_path / "another.json", lengths=[512, 1024], units=[8])
