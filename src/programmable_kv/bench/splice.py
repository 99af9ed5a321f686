"""TTFT after splicing a skill, by its length: against a full prefill, concatenation, and a plain copy of the bytes.

A prefix is cached, a compiled skill is spliced after it, and a short question follows. The common way to splice a
cached chunk (`concatenate`) rotates its keys back to position 0 and then to the new position, and concatenates every
layer's tensors with the prefix's into a new cache. `put` and `join` are our way and this one without the question's
forward. `copy` is the floor: the same bytes, copied once. The rival uses our own `rotate`, so that the two differ only
in their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from programmable_kv.bench.timing import median_ms
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.rotation import rotate
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.edits.seam import DEFAULT_SEAM
from programmable_kv.engine import Rows
from programmable_kv.models.load import Model
from programmable_kv.records import Record, Recorder, digest_of

LENGTHS = (512, 1024, 2048, 4096, 7936)
"""Tokens of the skill. With prefix and question, the last stays below the embedded model's 8192 positions."""
PREFIX = "You are the support agent of an online shop. What follows is the policy that is in force today.\n\n"
SENTENCE = "Rule {number}: notes of the weekly meeting are kept in folder {number} of the shared drive.\n"
QUESTION = "\nWhich folder holds the notes of week seven? Answer:"


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
    """Measure every length and write the record. Times are medians over `repeats`; above 2048, full prefills run once.

    `settings`: further settings for the record (`shapes.settings_of` for a model with random weights).
    """
    recorder = Recorder(
        path,
        name=path.stem,
        version=2,
        title="Time to first token after splicing a compiled skill, by its length",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of([PREFIX, SENTENCE, QUESTION]),
        seeds=[],
        settings={"lengths": list(lengths), "repeats": repeats, "seam": DEFAULT_SEAM, **(settings or {})},
    )
    for number, length in enumerate(lengths):
        if not recorder.done(length=length):
            recorder.add({"length": length, **measure(model, length, repeats)})
        if report is not None:
            report(number + 1, len(lengths))
    return recorder.finish(summarise(recorder.rows))


def measure(model: Model, length: int, repeats: int) -> dict[str, Any]:
    """The row of one length: milliseconds of each way until the question's logits, and of the splice and copy alone."""
    engine = model.engine
    layout = engine.require_relocation()
    prefix, question = (model.tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, QUESTION))
    text = "".join(SENTENCE.format(number=n) for n in range(length // 10))
    ids = model.tokenizer.encode(text, add_special_tokens=False)[:length]
    alone = engine.new_buffer(length)
    engine.append(alone, ids, logits=0)
    skill = alone.segment(Span(0, length), ids)
    buffer = engine.new_buffer(len(prefix) + length + len(question) + 8)
    engine.append(buffer, prefix, logits=0)
    start = buffer.length

    def put() -> None:
        buffer.insert(start, skill, layout)

    def spliced() -> torch.Tensor:
        put()
        seam = Rows.appended(ids[:DEFAULT_SEAM], start, start)
        return engine.compute(buffer, seam.followed_by(Rows.appended(question, buffer.length, buffer.length)))

    def full() -> torch.Tensor:
        return engine.append(engine.new_buffer(len(prefix) + length + len(question)), prefix + ids + question)

    def back() -> None:
        buffer.truncate(start)

    plain = [torch.empty_like(tensor) for tensor in (*skill.keys, *skill.values)]

    def copied() -> None:
        for target, source in zip(plain, (*skill.keys, *skill.values), strict=True):
            target.copy_(source)

    whole = repeats if length <= 2048 else 1
    ways = {
        "full": median_ms(whole, full),
        "splice": median_ms(repeats, spliced, back),
        "concatenate": median_ms(repeats, lambda: _answered(model, _joined(buffer, skill, layout), question)),
        "put": median_ms(repeats, put, back),
        "join": median_ms(repeats, lambda: _joined(buffer, skill, layout)),
        "copy": median_ms(repeats, copied),
    }
    return {"ms": {way: round(ms, 3) for way, ms in ways.items()}, "bytes": skill.nbytes, "prefix": start}


def _joined(prefix: KVBuffer, skill: Segment, layout: KVLayout) -> DynamicCache:
    """The rival: rotates keys from their position to 0 and then to the new one, and concatenates every layer."""
    cache = DynamicCache()
    offset = torch.full((len(skill),), prefix.length)
    none = torch.zeros(len(skill), dtype=torch.long)
    for index, rule in enumerate(layout.layers):
        turned = {"keys": skill.keys[index], "values": skill.values[index]}
        if rule.rotation is not None:
            turned[rule.rotated] = rotate(rotate(turned[rule.rotated], none, rule.rotation), offset, rule.rotation)
        cache.update(
            torch.cat((prefix.keys(index), turned["keys"]), dim=2),
            torch.cat((prefix.values(index), turned["values"]), dim=2),
            index,
        )
    return cache


@torch.no_grad()
def _answered(model: Model, cache: DynamicCache, question: list[int]) -> torch.Tensor:
    output = model.engine.model(
        input_ids=torch.tensor([question], device=model.engine.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits  # type: ignore[no-any-return]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios within this run, and a linear fit of `put`'s milliseconds over the skill's length with its R squared."""
    from scipy.stats import linregress

    summary: dict[str, Any] = {}
    for row in rows:
        ms = row["ms"]
        summary[f"at_{row['length']}"] = {
            "full_over_splice": round(ms["full"] / ms["splice"], 2),
            "concatenate_over_splice": round(ms["concatenate"] / ms["splice"], 2),
            "put_over_copy": round(ms["put"] / ms["copy"], 2),
            "join_over_put": round(ms["join"] / ms["put"], 2),
            "splice_ms": round(ms["splice"], 1),
            "full_ms": round(ms["full"], 1),
        }
    if len(rows) > 2:
        fit = linregress([row["length"] for row in rows], [row["ms"]["put"] for row in rows])
        summary["put_ms_per_1k_tokens"] = round(1000 * float(fit.slope), 3)
        summary["put_r_squared"] = round(float(fit.rvalue) ** 2, 4)
    return summary
