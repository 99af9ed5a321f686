"""The slow, obvious oracle of `visibility="design"`: which token reads which, and one dense forward by transformers.

It uses nothing of the package's `design` folder. It finds lines in the text itself, and decides each pair of tokens
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache

from programmable_kv import Notebook
from reference import Layers

OWN = -1
"""The scope of the context's own text. The scope of a skill is its number."""


@dataclass(frozen=True)
class Token:
    """A token's kind, the text that it is part of, the value that it is part of, and the fields that it reads."""

    kind: str
    scope: int = OWN
    of: object = None
    fields: frozenset[str] = frozenset()
    open: bool = False
    """whether it is in a skill that the text after it reads"""


@dataclass
class _Stretch:
    """Text that is searched for lines as a whole."""

    scope: int
    open: bool = False
    text: str = ""
    slots: list[int] = field(default_factory=list)
    """the slot of each character; an empty value has a negative number instead"""
    values: dict[int, str] = field(default_factory=dict)
    """slot -> the field whose value is there"""
    of: dict[int, int] = field(default_factory=dict)
    """slot -> the number of the value that is there"""
    empty: dict[int, int] = field(default_factory=dict)
    """an empty value's number -> the slot before which it stands"""


def tokens_of(
    notebook: Notebook, words: Mapping[str, Sequence[str]], read_by: Mapping[str, str] | None = None
) -> list[Token]:
    """Describe each cached token.

    Args:
        words: field -> all words by which a line may mention it.
        read_by: field or skill -> who may read it, if that is not the default.
    """
    read_by = read_by or {}
    found: list[Token] = []
    stretches: list[_Stretch] = [_Stretch(OWN)]
    units = notebook._state.context.units
    number = 0
    slot = 0
    for at, unit in enumerate(units):
        goes_on = _goes_on(units, at)
        follows = units[at + 1] if at + 1 < len(units) else None
        begins = follows is not None and unit.piece > 0 and (follows.name, follows.piece) == (unit.name, unit.piece + 1)
        by_design = unit.kind == "skill" and (goes_on or begins)
        if unit.kind == "skill" and not goes_on:
            number += 1
            stretches.append(_Stretch(number, read_by.get(unit.name) == "all"))
        if unit.kind == "prefill" and stretches[-1].scope != OWN:
            stretches.append(_Stretch(OWN))
        here = stretches[-1]
        if unit.kind == "prefill" or by_design:
            _add(here, unit, slot, -1 - at)
        if unit.kind == "turn" or unit.kind == "erratum":
            stretches.append(_Stretch(OWN))
            found += [Token("turn")] * len(unit)
        else:
            found += [Token("text", here.scope, open=here.open)] * len(unit)
        slot += len(unit)
    for stretch in stretches:
        ends: dict[str, int] = {}
        for other in stretches:
            if other.scope == stretch.scope:
                for each, name in other.values.items():
                    if name not in ends:
                        ends[name] = _end_of(other, each)
        _mark_lines(found, stretch, words, read_by, ends)
    return found


def _goes_on(units: Sequence[Any], at: int) -> bool:
    """Whether a unit is a later piece of the skill directly before it."""
    unit = units[at]
    return unit.piece > 1 and at > 0 and (units[at - 1].name, units[at - 1].piece) == (unit.name, unit.piece - 1)


def _add(stretch: _Stretch, unit: Any, slot: int, empty: int) -> None:
    if unit.places:
        name = unit.places[0].name
        slots = list(range(slot, slot + len(unit))) or [empty]
        stretch.values |= dict.fromkeys(slots, name)
        stretch.of |= dict.fromkeys(slots, empty)
        stretch.text += "\0" * len(slots)
        stretch.slots += slots
        stretch.empty[empty] = slot
        return
    for token in range(len(unit)):
        first, last = unit.offsets[token]
        stretch.text += unit.text[first:last]
        stretch.slots += [slot + token] * (last - first)


def _end_of(stretch: _Stretch, slot: int) -> int:
    """The slot after the value that begins at a slot."""
    if slot < 0:
        return stretch.empty[slot]
    return max(each for each, value in stretch.of.items() if value == stretch.of[slot]) + 1


def _mark_lines(
    found: list[Token],
    stretch: _Stretch,
    words: Mapping[str, Sequence[str]],
    read_by: Mapping[str, str],
    ends: Mapping[str, int],
) -> None:
    """Mark the values and the readers in a stretch."""
    text, slots, values = stretch.text, stretch.slots, stretch.values
    for line in re.finditer(r"[^\n]*\n|[^\n]+", text):
        held = {values[slot] for slot in slots[line.start() : line.end()] if slot in values}
        said = {
            name
            for name, known in words.items()
            if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line.group(), re.IGNORECASE) for word in known)
        }
        reading = {name for name in held | said if read_by.get(name, "mentions") == "mentions"}
        reading |= {name for name in ends if read_by.get(name) == "all"}
        for slot in dict.fromkeys(slots[line.start() : line.end()]):
            if slot < 0 or slot in slots[: line.start()]:
                continue  # a token belongs to the line in which it begins
            here = found[slot]
            if slot in values:
                found[slot] = replace(here, kind="value", of=stretch.of[slot], fields=frozenset({values[slot]}))
                continue
            read = frozenset(name for name in reading if name in ends and ends[name] <= slot)
            found[slot] = replace(here, kind="reader", fields=read) if read else here


def reads(tokens: Sequence[Token], query: int, key: int) -> bool:
    """Whether the token `query` may read the token `key`."""
    if key > query:
        return False
    asking, asked = tokens[query], tokens[key]
    if "unseen" in (
        asking.kind,
        asked.kind,
    ):  # the tokens that a skill was compiled after: all of that skill reads them, and nothing else does
        return asking.scope == asked.scope and asked.kind == "unseen"
    if key == query or asking.kind == "turn":
        return True
    if asking.scope != asked.scope:
        return asking.scope == OWN and asked.open
    if asked.kind == "turn":
        return False
    if asked.kind == "text":
        return True
    if asking.kind == "value":
        return asked.kind == "value" and asked.of == asking.of and asked.fields == asking.fields
    return asking.kind == "reader" and asked.kind in ("value", "reader") and bool(asking.fields & asked.fields)


def dense_mask(tokens: Sequence[Token]) -> torch.Tensor:
    """[S, S] booleans: whether the token of a row may read the token of a column."""
    return torch.tensor([[reads(tokens, query, key) for key in range(len(tokens))] for query in range(len(tokens))])


def layers_of(
    notebook: Notebook, words: Mapping[str, Sequence[str]], read_by: Mapping[str, str] | None = None
) -> Layers:
    """Keys and values of every layer by one forward over all tokens, and over those that each skill was compiled after.

    The latter stand at the positions directly before the skill's (which may be those of other tokens, or negative), and
    are left out of the result. Arguments as in `tokens_of`.
    """
    said = tokens_of(notebook, words, read_by)
    at = notebook.cache.positions.tolist()
    ids: list[int] = []
    tokens: list[Token] = []
    positions: list[int] = []
    seen: list[int] = []
    slot, begins = 0, notebook._state.context.begins
    units = notebook._state.context.units
    first, started = 0, False
    for number, unit in enumerate(units):
        if not _goes_on(units, number):
            first, started = begins[number], False
        if unit.read and len(unit) and not started:
            ids += unit.read
            tokens += [Token("unseen", said[slot].scope)] * len(unit.read)
            positions += range(first - len(unit.read), first)
        started = started or len(unit) > 0
        seen += range(len(ids), len(ids) + len(unit))
        ids += unit.ids
        tokens += said[slot : slot + len(unit)]
        positions += at[slot : slot + len(unit)]
        slot += len(unit)
    layers, _ = masked_forward(notebook.model.engine.model, ids, positions, dense_mask(tokens))
    return [(keys[:, :, seen], values[:, :, seen]) for keys, values in layers]


@torch.no_grad()
def masked_forward(
    model: Any, ids: Sequence[int], positions: Sequence[int], mask: torch.Tensor
) -> tuple[Layers, torch.Tensor]:
    """(keys and values of every layer, logits of every token) of one forward by transformers under a mask [S, S]."""
    dtype = model.get_input_embeddings().weight.dtype

    def additive(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    at, window = torch.tensor(list(positions)), getattr(model.config, "sliding_window", None)
    near = mask if window is None else mask & (at[:, None] - at[None, :] < window)
    kinds = set(getattr(model.config, "layer_types", None) or [])
    made: Any = additive(near)
    if kinds:
        made = {kind: additive(near if kind == "sliding_attention" else mask) for kind in kinds}
        made = next(iter(made.values())) if len(made) == 1 else made
    cache = DynamicCache()
    output = model(
        input_ids=torch.tensor([list(ids)]), position_ids=torch.tensor([list(positions)]), attention_mask=made,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return [(layer.keys, layer.values) for layer in cache.layers], output.logits[0]
