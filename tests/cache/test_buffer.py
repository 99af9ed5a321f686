"""Random programs of buffer operations, compared with a slow model of the buffer that keeps and recomputes everything.

The slow model of a cached row is independent of the buffer: a row's keys and values are those last written for its
token, and a relocated key is the canonical key rotated once, in float64, from the position it was computed at.
"""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conftest import tiny, tiny_engine
from programmable_kv import Notebook
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.rotation import rotate
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.errors import CacheBufferError, InvalidArgumentError

LAYERS, HEADS, DIM = 2, 2, 8
ENGINE = tiny_engine("llama")
LAYOUT = ENGINE.require_relocation()


@dataclass
class Row:
    """One token in the slow model: keys and values [layers, heads, dim] as computed, and two positions."""

    keys: torch.Tensor
    values: torch.Tensor
    computed_at: int
    position: int

    def moved_keys(self, layer: int) -> torch.Tensor:
        rotary = LAYOUT.layers[layer].rotary
        assert rotary is not None
        offset = torch.tensor([self.position - self.computed_at])
        return rotate(self.keys[layer][:, None], offset, rotary)[:, 0]


@dataclass
class SlowBuffer:
    rows: list[Row] = field(default_factory=list)


class Programs(RuleBasedStateMachine):
    """Programs that append, overwrite, edit, truncate, mark, roll back, release, fork, save and load."""

    @initialize()
    def start(self) -> None:
        self.buffer = KVBuffer(ENGINE.layout)
        self.slow = SlowBuffer()
        self.marks: list[tuple[Any, SlowBuffer]] = []
        self.counter = 0

    def fresh(self, position: int) -> Row:
        self.counter += 1
        generator = torch.Generator().manual_seed(self.counter)
        shape = (LAYERS, HEADS, DIM)
        return Row(
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randn(shape, generator=generator, dtype=torch.float64),
            position,
            position,
        )

    def write(self, slots: list[int], positions: list[int]) -> None:
        made = [self.fresh(position) for position in positions]
        with self.buffer.writing(slots, positions):
            for layer in range(LAYERS):
                keys = torch.stack([row.keys[layer] for row in made], dim=1)[None]
                values = torch.stack([row.values[layer] for row in made], dim=1)[None]
                seen_keys, _ = self.buffer.update(keys, values, layer)
                assert seen_keys.shape[2] == slots[-1] + 1, "queries must see up to the last row written, no further"
        for slot, row in zip(slots, made, strict=True):
            if slot < len(self.slow.rows):
                self.slow.rows[slot] = row
            else:
                self.slow.rows.append(row)

    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        first, position = len(self.slow.rows), self.slow.rows[-1].position + 1 if self.slow.rows else 0
        self.write(list(range(first, first + count)), list(range(position, position + count)))

    @rule(count=st.integers(1, 5))
    def append_as_transformers_does(self, count: int) -> None:
        position = self.slow.rows[-1].position + 1 if self.slow.rows else 0
        made = [self.fresh(position + i) for i in range(count)]
        if position != len(self.slow.rows):
            with pytest.raises(CacheBufferError, match="keeps some positions free"):
                self.buffer.update(torch.zeros(1, HEADS, 1, DIM), torch.zeros(1, HEADS, 1, DIM), 0)
            return
        for layer in range(LAYERS):
            keys = torch.stack([row.keys[layer] for row in made], dim=1)[None]
            values = torch.stack([row.values[layer] for row in made], dim=1)[None]
            self.buffer.update(keys, values, layer)
        self.slow.rows += made

    @precondition(lambda self: self.slow.rows)
    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        slots = sorted(data.draw(st.sets(st.integers(0, len(self.slow.rows) - 1), min_size=1, max_size=6)))
        self.write(slots, [self.slow.rows[slot].position for slot in slots])

    @precondition(lambda self: len(self.slow.rows) > 2)
    @rule(data=st.data())
    def edit_with_a_change_of_length(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(1, len(self.slow.rows) - 1))
        stop = data.draw(st.integers(start, min(len(self.slow.rows), start + 4)))
        length = data.draw(st.integers(1, 5))
        shift = length - (stop - start)
        tail = self.slow.rows[stop:]
        position = self.slow.rows[start - 1].position + 1
        self.buffer.relocate(stop, len(self.slow.rows), start + length, shift, LAYOUT)
        if not tail:
            self.buffer.truncate(start)
        slots = list(range(start, start + length))
        # The rows of the gap are written next; the slow model makes room for them.
        self.slow.rows = self.slow.rows[:start]
        self.write_gap(slots, position, bool(tail))
        for row in tail:
            row.position += shift
        self.slow.rows += tail

    def write_gap(self, slots: list[int], position: int, has_tail: bool) -> None:
        self.write(slots, list(range(position, position + len(slots))))
        assert has_tail or self.buffer.length == slots[-1] + 1

    @rule(data=st.data(), count=st.integers(1, 5), computed_at=st.integers(0, 50))
    def splice_a_new_segment(self, data: st.DataObject, count: int, computed_at: int) -> None:
        made = [self.fresh(computed_at + i) for i in range(count)]
        self.splice(data, made)

    @precondition(lambda self: self.slow.rows)
    @rule(data=st.data())
    def splice_a_copy_of_a_span(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.slow.rows) - 1))
        stop = data.draw(st.integers(start + 1, min(len(self.slow.rows), start + 5)))
        segment = self.buffer.segment(Span(start, stop), range(stop - start))
        made = copy.deepcopy(self.slow.rows[start:stop])
        assert segment.computed_at.tolist() == [row.computed_at for row in made]
        for layer in range(LAYERS):
            assert torch.equal(segment.keys[layer][0], torch.stack([row.keys[layer] for row in made], dim=1))
        self.splice(data, made)

    def splice(self, data: st.DataObject, made: list[Row]) -> None:
        at = data.draw(st.integers(0, len(self.slow.rows)))
        replacing = data.draw(st.integers(0, min(3, len(self.slow.rows) - at)))
        segment = Segment(
            tuple(range(len(made))),
            torch.tensor([row.computed_at for row in made]),
            tuple(torch.stack([row.keys[layer] for row in made], dim=1)[None] for layer in range(LAYERS)),
            tuple(torch.stack([row.values[layer] for row in made], dim=1)[None] for layer in range(LAYERS)),
        )
        position = self.slow.rows[at - 1].position + 1 if at else 0
        positions = list(range(position, position + len(made)))
        ends = positions[-1] + 1
        if data.draw(st.booleans()):  # leave positions free before, between and after its tokens
            gaps = [data.draw(st.integers(0, 2)) for _ in made]
            positions = [each + sum(gaps[: i + 1]) for i, each in enumerate(positions)]
            ends = positions[-1] + 1 + data.draw(st.integers(0, 3))
            self.buffer.insert(at, segment, LAYOUT, replacing=replacing, positions=positions, ends=ends)
        else:
            self.buffer.insert(at, segment, LAYOUT, replacing=replacing)
        for row, each in zip(made, positions, strict=True):
            row.position = each
        tail = self.slow.rows[at + replacing :]
        shift = ends - tail[0].position if tail else 0
        for row in tail:
            row.position += shift
        self.slow.rows[at : at + replacing] = made

    @precondition(lambda self: self.slow.rows)
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.slow.rows) - 1))
        stop = data.draw(st.integers(start, min(len(self.slow.rows), start + 4)))
        shift = start - stop if data.draw(st.booleans()) else 0  # with 0, what follows keeps its positions
        self.buffer.relocate(stop, len(self.slow.rows), start, shift, LAYOUT)
        for row in self.slow.rows[stop:]:
            row.position += shift
        del self.slow.rows[start:stop]

    @precondition(lambda self: len(self.slow.rows) > 1)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(self.slow.rows) - 2))
        stop = data.draw(st.integers(start + 1, min(len(self.slow.rows), start + 6)))
        middle = data.draw(st.integers(start, stop))
        self.buffer.exchange(start, middle, stop, LAYOUT)
        positions = [row.position for row in self.slow.rows]
        self.slow.rows[start:stop] = self.slow.rows[middle:stop] + self.slow.rows[start:middle]
        for row, position in zip(self.slow.rows, positions, strict=True):
            row.position = position

    @precondition(lambda self: self.slow.rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.slow.rows)))
        self.buffer.truncate(length)
        del self.slow.rows[length:]

    @rule()
    def mark(self) -> None:
        if len(self.marks) < 4:
            self.marks.append((self.buffer.mark(), copy.deepcopy(self.slow)))

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        chosen = data.draw(st.integers(0, len(self.marks) - 1))
        mark, slow = self.marks[chosen]
        del self.marks[chosen:]
        self.buffer.rollback(mark)
        self.slow = slow
        with pytest.raises(CacheBufferError):
            self.buffer.rollback(mark)

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.integers(0, len(self.marks) - 1))
        self.buffer.release(self.marks[chosen][0])
        del self.marks[chosen:]

    @rule()
    def fork(self) -> None:
        if self.slow.rows:
            spoiled = self.buffer.fork()
            spoiled.keys(0).zero_()  # shared storage would spoil the original, which the invariant compares
        self.buffer, self.marks = self.buffer.fork(), []

    @rule()
    def save_and_load(self) -> None:
        named = {name: tensor.clone() for name, tensor in self.buffer.tensors().items()}
        other = KVBuffer(ENGINE.layout)
        other.load_tensors(named)
        self.buffer, self.marks = other, []

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "buffer"):
            return
        assert self.buffer.length == len(self.slow.rows)
        assert self.buffer.positions.tolist() == [row.position for row in self.slow.rows]
        for layer in range(LAYERS if self.slow.rows else 0):
            keys = torch.stack([row.moved_keys(layer) for row in self.slow.rows], dim=1)
            values = torch.stack([row.values[layer] for row in self.slow.rows], dim=1)
            # Both rotate the computed key once in float64, so they are equal to the last bit.
            assert torch.equal(self.buffer.keys(layer)[0], keys), f"keys of layer {layer}"
            assert torch.equal(self.buffer.values(layer)[0], values), f"values of layer {layer}"
        moved = [i for i, row in enumerate(self.slow.rows) if row.position != row.computed_at]
        assert self.buffer.relocated.tolist() == moved


Programs.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPrograms = pytest.mark.slow(Programs.TestCase)
"""100 programs of up to 40 steps: more than 2,000 operations in each run."""


def filled(count: int) -> KVBuffer:
    buffer = ENGINE.new_buffer()
    ENGINE.append(buffer, list(range(3, 3 + count)), logits=0)
    return buffer


def test_truncate_moves_no_bytes() -> None:
    buffer = filled(500)
    before = ENGINE.meter.bytes_moved
    buffer.truncate(3)
    assert ENGINE.meter.bytes_moved == before
    assert buffer.length == 3


def test_appending_one_by_one_copies_each_token_a_bounded_number_of_times() -> None:
    buffer = ENGINE.new_buffer()
    before = ENGINE.meter.bytes_moved
    for token in range(600):
        ENGINE.append(buffer, [3 + token % 400], logits=0)
    assert ENGINE.meter.bytes_moved - before <= 2 * buffer.nbytes


def test_a_tried_edit_costs_what_it_touched() -> None:
    buffer = filled(400)
    before = ENGINE.meter.bytes_moved
    mark = buffer.mark()
    with buffer.writing([7, 8], [7, 8]):
        for layer in range(LAYERS):
            buffer.update(torch.zeros(1, HEADS, 2, DIM).double(), torch.zeros(1, HEADS, 2, DIM).double(), layer)
    buffer.rollback(mark)
    assert ENGINE.meter.bytes_moved - before == 2 * 2 * buffer.bytes_per_token, "two tokens saved and two restored"


def test_a_failed_write_puts_lengths_and_positions_back() -> None:
    buffer = filled(10)

    def dies_after_one_layer() -> None:
        with buffer.writing([10, 11], [10, 11]):
            buffer.update(torch.zeros(1, HEADS, 2, DIM).double(), torch.zeros(1, HEADS, 2, DIM).double(), 0)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        dies_after_one_layer()
    assert buffer.length == 10
    assert buffer.positions.tolist() == list(range(10))


def test_gaps_beams_and_foreign_marks_are_refused() -> None:
    buffer = filled(5)
    with pytest.raises(CacheBufferError, match="gap"), buffer.writing([7], [7]):
        pass
    with pytest.raises(CacheBufferError, match="one sequence"):
        buffer.reorder_cache(torch.tensor([0]))
    with pytest.raises(CacheBufferError, match="not active"):
        filled(2).rollback(buffer.mark())
    with pytest.raises(CacheBufferError, match="truncate"):
        buffer.truncate(6)
    with pytest.raises(CacheBufferError, match="tail"):
        buffer.relocate(1, 3, 0, -1, LAYOUT)
    for runs in ((-1, 2, 3), (0, 3, 2), (2, 1, 3), (0, 2, 6)):
        with pytest.raises(CacheBufferError, match="adjacent"):
            buffer.exchange(*runs, LAYOUT)


def test_positions_that_do_not_ascend_are_refused() -> None:
    buffer, segment = filled(6), filled(3).segment(Span(0, 3), range(3))
    for positions in ([2, 3, 4], [3, 3, 4], [3, 4]):
        with pytest.raises(CacheBufferError, match="ascending, after the previous"):
            buffer.insert(3, segment, LAYOUT, positions=positions)
    with pytest.raises(CacheBufferError, match="cannot move to position 5"):
        buffer.insert(3, segment, LAYOUT, ends=5)
    assert buffer.positions.tolist() == list(range(6))


def test_tokens_that_keep_their_positions_are_copied_and_not_rotated() -> None:
    """The keys are equal to the last bit, and no second copy of them is kept."""
    buffer = filled(10)
    keys = buffer.keys(0)[:, :, 4:].clone()
    with buffer.meter.measure() as reading:
        buffer.relocate(4, 10, 2, 0, LAYOUT)
    assert torch.equal(buffer.keys(0)[:, :, 2:], keys)
    assert buffer.positions.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert reading.account.bytes_moved == 6 * buffer.bytes_per_token
    assert buffer.relocated.tolist() == []
    assert buffer._origins._keys is None


def test_freed_slots_forget_where_their_keys_came_from() -> None:
    """A splice at the end is cut or rolled back. Then two values grow, so that freed slots lie between for a moment."""
    segment = filled(8).segment(Span(0, 8), range(8))
    for undo in ("cut", "roll back"):
        buffer = filled(10)
        mark = buffer.mark()
        buffer.insert(10, segment, LAYOUT)
        if undo == "roll back":
            buffer.rollback(mark)
        else:
            buffer.truncate(10)
            buffer.release(mark)
        buffer.release(buffer.mark())
        for stop, shift in ((9, 4), (8, 4)):
            buffer.relocate(stop, buffer.length, stop + shift, shift, LAYOUT)
        assert buffer.length == 18


def test_segments_that_nothing_uses_leave_no_trace() -> None:
    buffer = filled(10)
    for _ in range(20):
        mark = buffer.mark()
        buffer.insert(10, filled(3).segment(Span(0, 3), range(3)), LAYOUT)
        buffer.rollback(mark)
    assert buffer._origins._segments in ([], [None])


def test_a_batch_is_refused() -> None:
    buffer = filled(4)
    with pytest.raises(CacheBufferError, match="batch of 2"):
        buffer.update(torch.zeros(2, HEADS, 1, DIM).double(), torch.zeros(2, HEADS, 1, DIM).double(), 0)
    assert buffer.length == 4
    with pytest.raises(CacheBufferError, match="num_beams=1"):
        ENGINE.model.generate(
            torch.tensor([[3, 4, 5, 6, 7]]), past_key_values=buffer, num_beams=4, max_new_tokens=3, pad_token_id=0
        )
    assert buffer.length == 4


def test_wrong_types_are_refused() -> None:
    with pytest.raises(CacheBufferError, match="truncate"):
        filled(4).truncate("2")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="Segment"):
        filled(4).insert(0, [3, 4], LAYOUT)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["nothing", "a layer is missing", "too few rows", "a batch"])
def test_tensors_that_do_not_fit_are_refused(fault: str) -> None:
    named = dict(filled(5).tensors())
    if fault == "nothing":
        named.clear()
    elif fault == "a layer is missing":
        del named["values.1"]
    elif fault == "too few rows":
        named["keys.0"] = named["keys.0"][:, :, :4]
    else:
        named["values.0"] = named["values.0"].repeat(2, 1, 1, 1)
    buffer = KVBuffer(ENGINE.layout)
    with pytest.raises(CacheBufferError, match=r"positions|expected"):
        buffer.load_tensors(named)
    assert buffer.length == 0
    buffer.load_tensors(filled(5).tensors())
    assert buffer.length == 5


def test_a_long_buffer_grows_by_steps() -> None:
    """A buffer that is larger than a step does not double its memory for one more token."""
    buffer = KVBuffer(ENGINE.layout, capacity=20_000)
    buffer.ensure_capacity(20_001)
    assert 20_001 <= buffer.capacity <= 20_000 + 8192
    buffer.ensure_capacity(50_000)
    assert buffer.capacity == 50_000
    small = KVBuffer(ENGINE.layout, capacity=100)
    small.ensure_capacity(101)
    assert small.capacity == 200


def test_a_buffer_is_freed_without_the_garbage_collector() -> None:
    """A buffer has much memory in few objects, so a collector that counts objects would keep many buffers."""
    buffer = filled(4)
    copied = copy.deepcopy(buffer)
    assert torch.equal(copied.keys(0), buffer.keys(0))
    layer, gone = buffer.layers[0], weakref.ref(buffer)
    gc.disable()
    try:
        del buffer
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(CacheBufferError, match="no longer exists"):
        layer.get_seq_length()
    assert copied.layers[0].get_seq_length() == 4


def test_a_notebook_is_freed_without_the_garbage_collector() -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}.", status="new")
    notebook.prefill()
    notebook.decide("so?", ["yes", "no"], edits={"status": "old"}, keep=True)
    gone = weakref.ref(notebook.cache)
    gc.disable()
    try:
        del notebook
        assert gone() is None
    finally:
        gc.enable()
