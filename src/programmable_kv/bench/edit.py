"""TTFT of an edit, by context length: every mode against full prefill and against cloning a cache.

The common way to try a continuation on a cached prompt is to clone a DynamicCache, append, and decode. `clone` does
this with the same erratum and question that `erratum` appends. `bare` is the floor: one forward of as many tokens as
`field_erratum` computes, on a ready cache. `by design` edits a context of `visibility="design"`, where nothing is
appended and the edit is exact. Full prefills under both visibilities are timed alternately.
"""

from __future__ import annotations

import bisect
import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from programmable_kv.bench.timing import elapsed_ms, median_ms, synchronise
from programmable_kv.demo.demo import CASES, VALUES, policy
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import Mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.asking import asked
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of

LENGTHS = (512, 1024, 2048, 4096, 7936)
"""Tokens of context. The last leaves room for the answer within the embedded model's 8192 positions."""
DECODED = 48
DESIGN = "by design"
FILLER = "- Notes of the weekly meeting are kept in folder {number} of the shared drive.\n"


def context(model: Model, length: int, visibility: Visibility = Visibility.CAUSAL) -> Notebook:
    """A prefilled notebook with the demo's policy and a request, `length` tokens long."""
    notebook = _built(model, padded_policy(model, length), visibility)
    notebook.prefill()
    return notebook


def _built(model: Model, policy: str, visibility: Visibility = Visibility.CAUSAL) -> Notebook:
    notebook = Notebook(model, visibility=visibility)
    return notebook.message("system", policy, **VALUES).message("user", CASES[0].request)


def padded_policy(model: Model, length: int) -> str:
    """The demo's policy, cut or padded with unrelated rules; policy and request have at most `length` tokens."""
    head, _, closing = policy().rpartition("\n\n")
    lines = head.split("\n")

    def text(lines: list[str], filler: int) -> str:
        rules = "\n".join(lines) + "\n" + "".join(FILLER.format(number=n) for n in range(filler))
        return f"{rules}\n{closing}"

    def size(lines: list[str], filler: int) -> int:
        rendered = _built(model, text(lines, filler)).rendered().text
        return len(model.tokenizer.encode(rendered, add_special_tokens=False))

    while size(lines, 0) > length:
        lines.pop()
    # The largest number of rules that fits; a division does not give it, since later rules have longer numbers.
    filler = bisect.bisect_right(range(length), length, key=lambda count: size(lines, count)) - 1
    return text(lines, filler)


def run(
    model: Model,
    path: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 7,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Record:
    """Measure every length and write the record. Times are medians over `repeats` (at most three for full prefills).

    `settings`: further settings for the record (`shapes.settings_of` for a model with random weights).
    """
    recorder = Recorder(
        path,
        name=path.stem,
        version=3,
        title="Time to first token of an edit, by mode and context length",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of([policy(), *VALUES.values()]),
        seeds=[],
        settings={"lengths": list(lengths), "repeats": repeats, "decoded": DECODED, **(settings or {})},
    )
    for number, length in enumerate(lengths):
        if not recorder.done(length=length):
            recorder.add({"length": length, **measure(model, length, repeats)})
        if report is not None:
            report(number + 1, len(lengths))
    return recorder.finish(summarise(recorder.rows))


def measure(model: Model, length: int, repeats: int) -> dict[str, Any]:
    """The row of one length: milliseconds until the first answer token's logits for each way, and decoding speed."""
    case = CASES[0]
    options = [case.before, case.after]
    notebook = context(model, length)
    ways: dict[str, float] = {}
    tokens: dict[str, int] = {}
    whole = max(1, min(3, repeats))
    arms: dict[str, tuple[Notebook, Mode | None]] = {str(mode): (notebook, mode) for mode in Mode}
    arms[DESIGN] = context(model, length, Visibility.DESIGN), None
    for arm, (edited, mode) in arms.items():
        times = []
        for _ in range(whole if mode in (Mode.FULL, Mode.SUFFIX) else repeats):
            mark = edited.mark()
            synchronise()
            decision = edited.decide(None, options, edits={case.field: case.value}, mode=mode)
            edited.rollback(mark)
            times.append(decision.ttft_ms)
        ways[arm] = statistics.median(times)
        tokens[arm] = decision.account.tokens_computed

    prefill = _prefills(model, length, whole)
    appended = _erratum_and_question(notebook, case.field, case.value)
    few = appended + appended[: tokens["field_erratum"] - len(appended)]
    reference = model.engine.model
    mark = notebook.mark()
    decoded_in_place = _decode(reference, notebook.cache, notebook.ids[-1])
    notebook.rollback(mark)
    ready = _dynamic(notebook)
    ways["clone"] = median_ms(repeats, lambda: _forward(reference, appended, copy.deepcopy(ready)))
    # Each repeat uses a copy made outside the measurement: a layer with a sliding window cannot be cropped.
    copies = (copy.deepcopy(ready) for _ in range(repeats))
    ways["bare"] = statistics.median(elapsed_ms(partial(_forward, reference, few, cache)) for cache in copies)
    tokens["clone"] = len(appended)
    tokens["bare"] = len(few)
    decode = {
        "buffer_ms_per_token": decoded_in_place,
        "dynamic_ms_per_token": _decode(reference, ready, notebook.ids[-1]),
    }
    return {
        "tokens": len(notebook),
        "ttft_ms": {way: round(ms, 3) for way, ms in ways.items()},
        "tokens_computed": tokens,
        "prefill_ms": {visibility: round(ms, 3) for visibility, ms in prefill.items()},
        "decode": {name: round(ms, 3) for name, ms in decode.items()},
    }


def _prefills(model: Model, length: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a full prefill under each visibility."""
    policy = padded_policy(model, length)
    times: dict[str, list[float]] = {str(visibility): [] for visibility in Visibility}
    for _ in range(repeats):
        for visibility, taken in times.items():
            notebook = _built(model, policy, Visibility(visibility))
            taken.append(elapsed_ms(notebook.prefill))
    return {visibility: statistics.median(taken) for visibility, taken in times.items()}


def _erratum_and_question(notebook: Notebook, field: str, value: str) -> list[int]:
    trial = notebook.mark()
    before = len(notebook)
    notebook.edit({field: value}, mode=Mode.ERRATUM)
    header: list[int] = notebook.model.tokenizer.encode(
        asked(notebook, None, think=False).text, add_special_tokens=False
    )
    appended = notebook.ids[before:] + header
    notebook.rollback(trial)
    return appended


def _dynamic(notebook: Notebook) -> DynamicCache:
    """The notebook's context copied to transformers' own cache, without a second prefill."""
    cache = DynamicCache(config=notebook.model.engine.model.config)
    buffer = notebook.cache
    for index in range(len(buffer)):
        cache.update(buffer.keys(index).clone(), buffer.values(index).clone(), index)
    return cache


@torch.no_grad()
def _forward(model: Any, ids: list[int], cache: Any) -> torch.Tensor:
    output = model(
        input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits  # type: ignore[no-any-return]


def _decode(model: Any, cache: Any, token: int) -> float:
    """Median milliseconds for one token, decoding token by token."""

    def step() -> None:
        nonlocal token
        token = int(_forward(model, [token], cache)[0, -1].argmax())

    return median_ms(DECODED, step)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios within this run, which depend less on the machine than milliseconds do."""
    summary: dict[str, Any] = {}
    for row in rows:
        ms = row["ttft_ms"]
        edit = ms["field_erratum"]
        summary[f"at_{row['length']}"] = {
            "full_over_field_erratum": round(ms["full"] / edit, 2),
            "clone_over_field_erratum": round(ms["clone"] / edit, 2),
            "field_erratum_over_bare": round(edit / ms["bare"], 3),
            "buffer_over_dynamic_decode": round(
                row["decode"]["buffer_ms_per_token"] / row["decode"]["dynamic_ms_per_token"], 3
            ),
            "suffix_over_full": round(ms["suffix"] / ms["full"], 3),
            "design_over_causal_prefill": round(
                row["prefill_ms"][Visibility.DESIGN] / row["prefill_ms"][Visibility.CAUSAL], 3
            ),
            "full_over_readers": round(ms["full"] / ms["readers"], 2),
            "full_over_design": round(ms["full"] / ms[DESIGN], 2),
            "design_over_erratum_tokens": round(row["tokens_computed"][DESIGN] / row["tokens_computed"]["erratum"], 2),
            "field_erratum_ms": round(edit, 1),
            "full_ms": round(ms["full"], 1),
        }
    by_length = {row["length"]: row["ttft_ms"]["field_erratum"] for row in rows}
    if 1024 in by_length and max(by_length) > 4096:
        summary["growth_1k_to_8k"] = round(by_length[max(by_length)] / by_length[1024], 3)
    return summary
