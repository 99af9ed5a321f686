"""The time of every public operation without its forward, by context length.

The model is tiny, so its forward takes little time; hooks on the model measure that time, and the bench subtracts it.
The rest is the package's own time: bookkeeping, rendering, tokenising, masks, and moving cached keys.

The context is a conversation of many turns whose system message has 20 fields; some of them have been edited. The bench
undoes every operation before the next, so all start from the same state.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.edits.modes import Mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.scenarios.plain_text import documents
from programmable_kv.skills.skill import Skill

LENGTHS = (4096, 16384, 65536)
"""Approximate tokens of context."""
UNITS = (100, 400, 1000)
"""Messages in the context of each length."""
FIELDS = 20
EDITS_BEFORE = 5
"""Fields of the context that are edited, in the default mode, before the measurements."""
SKILL_TOKENS = 256
_FORWARDS_ALL = frozenset({str(Mode.FULL), str(Mode.SUFFIX), "recompute"})
"""Operations that compute most of the context. Their forward is long even here, so they are repeated less often."""
_ROOM = 8192
"""Positions beyond the context for tokens that operations append."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One public operation. `prepare` runs before it and is not timed."""

    name: str
    run: Callable[[Notebook], Any]
    prepare: Callable[[Notebook], Any] | None = None


class ForwardTime:
    """Seconds spent inside a model's forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Time the forwards of a torch module while the block runs."""
        handles = (model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def run(
    model: Model,
    path: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    units: Sequence[int] = UNITS,
    repeats: int = 7,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure every operation at every length, and write the record. Times are medians over `repeats`.

    Operations that compute most of the context are repeated at most three times.

    Args:
        model: `model_for(lengths)`, or any model with as many positions.
        lengths, units: the tokens and the number of messages of each context.

    Raises:
        RecordError: see `Recorder`.
        ValueError: `units` and `lengths` differ in length.
    """
    sizes = list(zip(lengths, units, strict=True))
    recorder = Recorder(
        path,
        name="overhead",
        version=1,
        title="The time of every public operation beside its forward, by context length",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(documents("held_out")),
        seeds=[],
        settings={
            "lengths": list(lengths),
            "units": list(units),
            "fields": FIELDS,
            "edits_before": EDITS_BEFORE,
            "skill_tokens": SKILL_TOKENS,
            "repeats": repeats,
        },
    )
    model.engine.verify()
    for number, (length, count) in enumerate(sizes):
        if not recorder.done(length=length):
            recorder.add({"length": length, **measure(model, length, count, repeats)})
        if report is not None:
            report(number + 1, len(sizes))
    return recorder.finish(summarise(recorder.rows))


def model_for(lengths: Sequence[int]) -> Model:
    """The tiny model, with enough positions for contexts of these lengths."""
    return tiny_chat_model(max(lengths) + _ROOM)


def measure(model: Model, length: int, units: int, repeats: int) -> dict[str, Any]:
    """The row of one context: for every operation, the median milliseconds outside and inside its forward."""
    notebook = conversation(model, length, units)
    measured: dict[str, dict[str, float]] = {}
    for operation in operations(model):
        times = few_times(notebook, operation, min(repeats, 3) if operation.name in _FORWARDS_ALL else repeats)
        beside, inside = (statistics.median(part) for part in zip(*times, strict=True))
        measured[operation.name] = {"beside_ms": round(beside, 3), "forward_ms": round(inside, 3)}
    return {"tokens": len(notebook), "units": units, "operations": measured}


def few_times(notebook: Notebook, operation: Operation, repeats: int) -> list[tuple[float, float]]:
    """(milliseconds outside the forward, milliseconds inside it) of each run. The notebook is unchanged afterwards."""
    found = []
    for _ in range(repeats):
        mark = notebook.mark()
        if operation.prepare is not None:
            operation.prepare(notebook)
        forward = ForwardTime()
        with forward.watching(notebook.model.engine.model):
            began = time.perf_counter()
            operation.run(notebook)
            whole = time.perf_counter() - began
        notebook.rollback(mark)
        found.append((1e3 * (whole - forward.seconds), 1e3 * forward.seconds))
    return found


def conversation(model: Model, length: int, units: int) -> Notebook:
    """A context of about `length` tokens: a system message with `FIELDS` fields, `units - 1` turns, and a few edits."""
    lines = "\n".join(f"field_{n:02}: {{field_{n:02}}}" for n in range(FIELDS))
    values = {f"field_{n:02}": f"value {n}" for n in range(FIELDS)}
    notebook = Notebook(model).message("system", f"The state of the session:\n{lines}\nAnswer briefly.", **values)
    notebook.prefill()
    frame = notebook.add("user", "x").tokens_computed - 1
    turns = units - 2
    texts = _texts(model, max(1, (length - len(notebook)) // max(1, turns) - frame))
    for turn in range(turns):
        notebook.add("assistant" if turn % 2 == 0 else "user", next(texts))
    for number in range(EDITS_BEFORE):
        notebook.edit({f"field_{FIELDS - 1 - number:02}": "edited before"})
    return notebook


def operations(model: Model) -> list[Operation]:
    """Every public operation on a live notebook. Edits give the first field a longer value."""
    change = {"field_00": "another value, which is longer"}
    skill = Skill.compile(model, next(_texts(model, SKILL_TOKENS)), name="skill")
    options = ["value", "nothing"]

    def edit(mode: Mode) -> Operation:
        return Operation(str(mode), lambda notebook: notebook.edit(change, mode=mode))

    def middle(notebook: Notebook) -> int:
        """The slot at which a part in the middle of the conversation begins."""
        return notebook.parts[len(notebook.parts) // 2].span.start

    def splice_in_the_middle(notebook: Notebook) -> None:
        notebook.splice(skill, at=middle(notebook))

    def edit_in_place(notebook: Notebook) -> None:
        notebook.edit(change, mode=Mode.IN_PLACE)

    def mark_and_roll_back(notebook: Notebook) -> None:
        notebook.rollback(notebook.mark())

    def several_edits(notebook: Notebook) -> None:
        notebook.edit({f"field_{n:02}": f"another value {n}" for n in range(5)})

    def undone_edit(notebook: Notebook) -> None:
        mark = notebook.mark()
        notebook.edit(change)
        notebook.rollback(mark)

    return [
        *(edit(mode) for mode in Mode),
        Operation("edit_of_five_fields", several_edits),
        Operation("decide", lambda notebook: notebook.decide("Which value?", options)),
        Operation("decide_with_an_edit", lambda notebook: notebook.decide("Which value?", options, edits=change)),
        Operation("decide_and_keep", lambda notebook: notebook.decide("Which value?", options, keep=True)),
        Operation("generate_8_tokens", lambda notebook: list(notebook.generate("Which value?", max_new_tokens=8))),
        Operation("add", lambda notebook: notebook.add("user", "Which value is it?")),
        Operation("splice", lambda notebook: notebook.splice(skill)),
        Operation("splice_in_the_middle", splice_in_the_middle),
        Operation("cut", lambda notebook: notebook.cut("skill"), splice_in_the_middle),
        Operation("move", lambda notebook: notebook.move("skill"), splice_in_the_middle),
        Operation("replace", lambda notebook: notebook.replace("skill", skill), splice_in_the_middle),
        Operation("recompute", lambda notebook: notebook.recompute(), edit_in_place),
        Operation("rebase", lambda notebook: notebook.rebase(), several_edits),
        Operation("plan", lambda notebook: notebook.plan.edit(change)),
        Operation("states", lambda notebook: notebook.states, edit_in_place),
        Operation("parts", lambda notebook: notebook.parts),
        Operation("spans", lambda notebook: notebook.spans("field_00")),
        Operation("readers", lambda notebook: notebook.readers("field_00")),
        Operation("mark_and_rollback", mark_and_roll_back),
        Operation("edit_and_rollback", undone_edit),
    ]


def _texts(model: Model, tokens: int) -> Iterator[str]:
    """Endless pieces of plain text of about `tokens` tokens; the text starts again when it ends."""
    text = "\n".join(document for document in documents("held_out") if document.isascii())
    offsets = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    while True:
        for start in range(0, len(offsets) - tokens, tokens):
            yield text[offsets[start][0] : offsets[start + tokens - 1][1]].strip() or "."


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds outside the forward for every operation at every length, and their maximum at each length."""
    summary: dict[str, Any] = {}
    for row in rows:
        beside = {f"{name}_ms": ms["beside_ms"] for name, ms in row["operations"].items()}
        summary[f"at_{row['length']}"] = {**beside, "most_ms": max(beside.values()), "tokens": row["tokens"]}
    return summary
