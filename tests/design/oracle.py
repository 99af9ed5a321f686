"""The slow, obvious counterpart of `visibility="design"`: who reads whom token by token, and one dense forward by transformers.

Nothing of the package's design room is used. Lines are found in the text again, and each pair of tokens is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from programmable_kv import Notebook
from reference import Layers


@dataclass(frozen=True)
class Token:
    """What a token is: its kind, which skill or value it is of, and the fields that it reads."""

    kind: str
    of: object = None
    fields: frozenset[str] = frozenset()


def tokens_of(notebook: Notebook, words: Mapping[str, Sequence[str]]) -> list[Token]:
    """What each cached token is. `words`: field -> all that a line may say of it."""
    found: list[Token] = []
    texts: list[tuple[str, list[int]]] = []  # stretches of own text: the text, and the slot of each character
    text, slots = "", []
    values: dict[int, str] = {}
    for name in words:
        for span in notebook.spans(name):
            values |= dict.fromkeys(span.range, name)
    ends = {name: notebook.spans(name)[0].stop for name in words if notebook.spans(name)}
    for number, (part, unit) in enumerate(zip(notebook.parts, notebook._state.context.units, strict=True)):
        if part.kind == "prefill":
            if not part.span.stop > part.span.start:  # an empty value, which stands there all the same
                text += "\0"
                slots.append(-1 - number)
                values[-1 - number] = unit.places[0].name
            for token, slot in enumerate(part.span.range):
                first, last = unit.offsets[token]
                text += "\0" * (last - first) if slot in values else unit.text[first:last]
                slots += [slot] * (last - first)
            found += [Token("text")] * len(part.span)
            continue
        texts.append((text, slots))
        text, slots = "", []
        found += [Token("skill", number) if part.kind == "skill" else Token("turn")] * len(part.span)
    texts.append((text, slots))
    for text, slots in texts:
        for line in re.finditer(r"[^\n]*\n|[^\n]+", text):
            held = {values[slot] for slot in slots[line.start() : line.end()] if slot in values}
            said = {
                name
                for name, known in words.items()
                if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line.group(), re.IGNORECASE) for word in known)
            }
            for slot in dict.fromkeys(slots[line.start() : line.end()]):
                if slot < 0 or slot in slots[: line.start()]:
                    continue  # a token belongs to the line in which it begins
                if slot in values:
                    name = values[slot]
                    begins = next(span.start for span in notebook.spans(name) if slot in span.range)
                    found[slot] = Token("value", begins, frozenset({name}))
                    continue
                read = frozenset(name for name in held | said if ends.get(name, len(found)) <= slot)
                found[slot] = Token("reader", None, read) if read else Token("text")
    return found


def reads(tokens: Sequence[Token], query: int, key: int) -> bool:
    """Whether the token `query` may read the token `key`."""
    if key > query:
        return False
    asking, asked = tokens[query], tokens[key]
    if key == query or asking.kind == "turn":
        return True
    if asking.kind == "skill":
        return asked.kind == "skill" and asked.of == asking.of
    if asked.kind == "text":
        return True
    if asking.kind == "value":
        return asked.kind == "value" and asked.of == asking.of and asked.fields == asking.fields
    return asking.kind == "reader" and asked.kind in ("value", "reader") and bool(asking.fields & asked.fields)


def dense_mask(tokens: Sequence[Token]) -> torch.Tensor:
    """[S, S] booleans."""
    return torch.tensor([[reads(tokens, query, key) for key in range(len(tokens))] for query in range(len(tokens))])


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
