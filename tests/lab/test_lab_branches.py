"""Branches computed side by side in one forward equal branches computed one after the other (float64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_engine
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.branches import Branch, branching
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.knockout import Knockout, knocked_out
from programmable_kv.lab.tools.kv import injected, rows_from

IDS = [(7 + 31 * i) % 300 for i in range(20)]
TAIL = (18, 19, 20)
ENDS = tuple((5 + 17 * i) % 300 for i in range(3))
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
"""norms and eager attention round to float32 inside"""


def alone(engine: Engine, buffer: Any, slots: tuple[int, ...], layers: tuple[int, ...] | None) -> torch.Tensor:
    rows = Rows(ENDS, TAIL, TAIL)
    with taken_back(buffer):
        if not slots:
            return engine.compute(buffer, rows, logits=3)
        with knocked_out(engine, buffer, Knockout(TAIL, slots, layers)):
            return engine.compute(buffer, rows, logits=3)


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("qwen2", "sdpa"), ("gemma3_text", "sdpa"), ("mistral", "sdpa")],
)
def test_branches_are_knock_outs_one_after_the_other(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(architecture, attention)
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:18], logits=0)
    before = [each.clone() for each in buffer.tensors().values()]
    arms: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
        ((), None),
        ((16, 17), None),
        ((15, 17), (1,)),
        ((14,), (0,)),
    ]
    expected = [alone(engine, buffer, *arm) for arm in arms]
    assert float((expected[0] - expected[1]).abs().max()) > 100 * CLOSE["atol"], "what is blocked matters"
    with branching(engine, buffer) as branches:
        grown = branches.grown([Branch(ENDS, TAIL, *arm) for arm in arms])
    for each, right in zip(grown, expected, strict=True):
        torch.testing.assert_close(each.logits, right, **CLOSE)
    monkeypatch.setattr("programmable_kv.lab.tools.branches._ROWS", 6)  # several forwards
    with branching(engine, buffer) as branches:
        last = branches.last([Branch(ENDS, TAIL, *arm) for arm in arms])
    torch.testing.assert_close(last, torch.stack([right[-1] for right in expected]), **CLOSE)
    assert buffer.length == 18
    assert all(torch.equal(a, b) for a, b in zip(before, buffer.tensors().values(), strict=True))


def test_a_branch_goes_on_and_reads_what_stands_beside() -> None:
    engine = tiny_engine("llama")
    buffer, other = engine.new_buffer(), engine.new_buffer()
    engine.append(buffer, IDS[:18], logits=0)
    engine.append(other, [*IDS[:3], 9, *IDS[4:18]], logits=0)
    chosen = (5, 11, 12)
    with injected(buffer, chosen, rows_from(other, chosen)):
        expected = engine.append(buffer, ENDS, logits=3)
    with branching(engine, buffer) as branches:
        beside = branches.beside(rows_from(other, chosen), chosen)
        (first, _) = branches.grown(
            [Branch(ENDS[:2], TAIL[:2], absent=chosen), Branch(ENDS[:1], TAIL[:1], absent=beside)]
        )
        unseen = tuple(slot for slot in range(18 + 3, buffer.length) if slot not in first.slots)
        (then,) = branches.grown([Branch(ENDS[2:], TAIL[2:], absent=(*chosen, *unseen))])
    torch.testing.assert_close(torch.cat((first.logits, then.logits)), expected, **CLOSE)
    assert buffer.length == 18


def test_what_is_no_branch_is_refused() -> None:
    engine = tiny_engine("llama")
    buffer = engine.new_buffer()
    engine.append(buffer, IDS[:18], logits=0)
    for wrong in (Branch((), ()), Branch((1,), (18, 19)), Branch((1,), (18,), unread=(18,))):
        with pytest.raises(InvalidArgumentError, match="branch"), branching(engine, buffer) as branches:
            branches.last([wrong])
