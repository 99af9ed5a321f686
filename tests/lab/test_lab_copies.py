"""Rows recomputed as copies in one forward equal rows recomputed in place, one exchange after the other (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_engine
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError, UnsupportedModelError
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.copies import Exchanged, computed_in_copies
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.sites import Place, Site, changed

IDS = [(7 + 31 * i) % 300 for i in range(24)]
SLOTS = (19, 20, 22, 23)
"""rows of the context, two of them neighbours, and the one after it; near enough for models with a window"""
ROWS = Rows(tuple(IDS[slot] for slot in SLOTS), SLOTS, SLOTS)
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
"""norms and eager attention round to float32 inside"""


def exchanges(engine: Engine, layers: int) -> list[Exchanged]:
    generator = torch.Generator().manual_seed(0)
    width = int(engine.model.config.hidden_size)
    return [
        Exchanged(layer, torch.randn(3, width, generator=generator, dtype=torch.float64))
        for layer in (*range(layers + 1), 0, 1)
    ]


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("gemma2", "eager"), ("gemma3_text", "sdpa"),
     ("mistral", "sdpa")],
)  # fmt: skip
def test_copies_are_the_rows_in_their_places(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(architecture, attention)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:-1], logits=0)
    before = [each.clone() for each in buffer.tensors().values()]
    every = exchanges(engine, len(buffer))
    alone = []
    for each in every:
        with changed(engine, buffer, Site(Place.RESIDUAL, each.layer), replaced(each.streams), SLOTS[:-1]):
            alone.append(engine.compute(buffer, ROWS)[-1])
    expected = torch.stack(alone)
    assert float((expected[0] - expected[-2]).abs().max()) > 100 * CLOSE["atol"], "exchanges differ"
    torch.testing.assert_close(computed_in_copies(engine, buffer, ROWS, every), expected, **CLOSE)
    monkeypatch.setattr("programmable_kv.lab.tools.copies._ROWS", 8)  # several forwards
    torch.testing.assert_close(computed_in_copies(engine, buffer, ROWS, every), expected, **CLOSE)
    assert buffer.length == len(IDS) - 1
    assert all(torch.equal(a, b) for a, b in zip(before, buffer.tensors().values(), strict=True))


def test_an_exchange_with_itself_is_nothing() -> None:
    engine = tiny_engine("llama")
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:-1], logits=0)
    own: list[torch.Tensor] = []

    def keep(rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        own.append(rows.clone())
        return rows

    with changed(engine, buffer, Site(Place.RESIDUAL, 1), keep, SLOTS[:-1]):
        engine.compute(buffer, ROWS)
    with taken_back(buffer):
        logits = engine.append(buffer, IDS[-1:])[-1]
    found = computed_in_copies(engine, buffer, ROWS, [Exchanged(1, own[0])] * 3)
    for each in found:
        torch.testing.assert_close(each, logits, **CLOSE)


def test_what_cannot_be_exchanged_is_refused() -> None:
    engine = tiny_engine("llama")
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:-1], logits=0)
    width = int(engine.model.config.hidden_size)
    alone = Rows((1,), (23,), (23,))
    for rows, count, why in ((ROWS, 2, "3 streams, got 2"), (ROWS, 4, "got 4"), (alone, 0, "at least two rows; got 1")):
        with pytest.raises(InvalidArgumentError, match=why):
            computed_in_copies(engine, buffer, rows, [Exchanged(0, torch.zeros(count, width))])
    with pytest.raises(InvalidArgumentError, match="layers"):
        computed_in_copies(engine, buffer, ROWS, [Exchanged(99, torch.zeros(3, width, dtype=torch.float64))])
    other = tiny_engine("bloom", "eager")
    context = other.new_buffer()
    other.append(context, IDS[:-1], logits=0)
    with pytest.raises(UnsupportedModelError, match="rotary"):
        computed_in_copies(other, context, ROWS, [])
