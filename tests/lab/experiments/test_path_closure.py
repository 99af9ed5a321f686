"""Heads that write and read, on a tiny random model in float64: all of them are the whole, none of them nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.experiments import heads as paths
from programmable_kv.lab.experiments import path_closure
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.nulls import matched_heads
from programmable_kv.lab.experiments.pair import Pair, appended_last, pair_of
from programmable_kv.lab.experiments.shares import added, shares_by_layer
from programmable_kv.lab.tools.copies import Rewritten
from programmable_kv.lab.tools.head_outputs import head_outputs, head_slopes, heads_from
from programmable_kv.lab.tools.together import Probe

CLOSE: Any = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


@pytest.fixture(scope="module")
def notes(pair: Pair) -> dict[str, tuple[int, ...]]:
    return paths.note_sets(pair)


def test_all_heads_read_what_a_patch_gives_and_none_reads_nothing(
    pair: Pair, notes: dict[str, tuple[int, ...]]
) -> None:
    every = paths.all_heads(pair)
    for slots in notes.values():
        patched, by_heads, by_none = pair.gaps(
            [Probe(slots), paths.read_by(pair, slots, every), paths.read_by(pair, slots, [])]
        )
        assert by_heads == pytest.approx(patched, **CLOSE)
        assert by_none == pytest.approx(pair.scale.old, **CLOSE)


def test_a_path_and_the_rest_share_nothing_and_miss_nothing(pair: Pair, notes: dict[str, tuple[int, ...]]) -> None:
    every, slots = paths.all_heads(pair), notes["both_rules"]
    without_heads, without_notes, whole = pair.gaps(
        [
            paths.read_elsewhere(pair, slots, every),
            Probe(paths.all_but(pair, slots)),
            paths.read_elsewhere(pair, slots, []),
        ]
    )
    assert without_heads == pytest.approx(without_notes, **CLOSE)
    assert whole == pytest.approx(pair.scale.new, **CLOSE)
    some = every[1::2]
    rest = paths.read_elsewhere(pair, slots, some)
    # The same as the new context in which these heads read the old notes.
    noised = pair.gaps([Probe(slots, places=tuple(some))], noising=True)
    assert pair.gaps([rest]) == pytest.approx(noised, **CLOSE)


def test_query_heads_of_one_kv_head_read_together_what_it_does(pair: Pair, notes: dict[str, tuple[int, ...]]) -> None:
    """Places are query heads; the patch of a KV head is that of all its query heads."""
    slots, kept = notes["both_rules"], pair.old.keys(0).shape[1]
    groups = max(head for _, head in paths.all_heads(pair)) // kept + 1
    by_kept, by_query, one = pair.gaps(
        [
            Probe(slots, layers=(1,), heads=(0,)),
            Probe(slots, places=tuple((1, head) for head in range(groups))),
            Probe(slots, places=((1, 0),)),
        ]
    )
    assert by_query == pytest.approx(by_kept, **CLOSE)
    assert groups == 1 or one != pytest.approx(by_kept, **CLOSE)


def test_two_parts_of_a_probe_are_both_read(pair: Pair, notes: dict[str, tuple[int, ...]]) -> None:
    first, second = notes["both_rules"][:3], notes["both_rules"][3:]
    split, whole, half = pair.gaps([Probe(first, also=(Probe(second),)), Probe(notes["both_rules"]), Probe(first)])
    assert split == pytest.approx(whole, **CLOSE)
    assert half != pytest.approx(whole, **CLOSE)


def test_places_that_do_not_exist_are_refused(pair: Pair) -> None:
    for probe in (Probe((1,), places=((99, 0),)), Probe((1,), places=((0, -1),)), Probe((1,), also=(Probe((10**6,)),))):
        with pytest.raises(InvalidArgumentError, match="does not have"):
            pair.gaps([probe])
    with pytest.raises(InvalidArgumentError, match="must not also name"):
        pair.gaps([Probe((1,), layers=(0,), places=((0, 0),))])


@pytest.mark.parametrize("noising", [False, True])
def test_all_heads_write_the_notes_and_none_writes_nothing(
    pair: Pair, notes: dict[str, tuple[int, ...]], noising: bool
) -> None:
    slots, every = notes["actions"], paths.all_heads(pair)
    before = [each.clone() for buffer in (pair.old, pair.fresh) for each in buffer.tensors().values()]
    writing = paths.Writing(pair, slots, noising=noising)
    (patched,) = pair.gaps([Probe(slots)], noising=noising)
    assert writing.gap(every) == pytest.approx(patched, **CLOSE)
    assert writing.gap([]) == pytest.approx(pair.scale.new if noising else pair.scale.old, **CLOSE)
    some = every[::3]
    assert writing.read(some, every) == pytest.approx(writing.gap(some), **CLOSE)
    assert writing.read(some, []) == pytest.approx(writing.gap([]), **CLOSE)
    assert writing.read(every, some) == pytest.approx(
        pair.gaps([paths.read_by(pair, slots, some)], noising=noising)[0], **CLOSE
    )
    after = [each for buffer in (pair.old, pair.fresh) for each in buffer.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("noising", [False, True])
def test_many_writings_in_one_forward_are_each_of_them_alone(
    pair: Pair, notes: dict[str, tuple[int, ...]], noising: bool
) -> None:
    writing, every = paths.Writing(pair, notes["actions"], noising=noising), tuple(paths.all_heads(pair))
    some, others = every[::3], every[1::2]
    asked = [
        Rewritten(()), Rewritten(every), Rewritten(some), Rewritten(some, readers=others), Rewritten(every, readers=()),
        Rewritten(every, readers=some), Rewritten(others, readers=every),
    ]  # fmt: skip
    alone = [
        writing.gap(each.heads) if each.readers is None else writing.read(each.heads, each.readers) for each in asked
    ]
    before = [each.clone() for each in writing.here.tensors().values()]
    assert writing.gaps(asked) == pytest.approx(alone, **CLOSE)
    assert len({round(each, 9) for each in alone}) == len(asked) - 1, "only two of them write nothing that is read"
    assert all(torch.equal(a, b) for a, b in zip(before, writing.here.tensors().values(), strict=True))
    with pytest.raises(InvalidArgumentError, match="layers of"):
        writing.gaps([Rewritten(some, readers=((0, 99),))])


def test_slopes_are_those_of_small_writings(pair: Pair, notes: dict[str, tuple[int, ...]]) -> None:
    """A thousandth of a head's change moves the gap by a thousandth of its slope times the change."""
    slots = notes["actions"]
    appended, appended_rows = appended_last(pair, pair.old, slots)
    slopes = head_slopes(pair.engine, appended, appended_rows, appended_rows.slots[:-1], pair.gap_in)
    writing = paths.Writing(pair, slots)
    own = paths.Writing(pair, slots, noising=True).outputs
    change = writing.outputs - own
    for layer, head in ((1, 0), (1, 3)):
        part = torch.zeros_like(change)
        part[layer, :, head] = change[layer, :, head]
        writing.outputs = own + part / 1000
        moved = (writing.gap([(layer, head)]) - pair.scale.old) * 1000
        assert moved == pytest.approx(float((slopes * part).sum()), rel=1e-2, abs=1e-6)
    assert len(paths.writing_effects(pair, slots)) == len(paths.all_heads(pair))


def test_heads_that_do_not_exist_write_nothing(pair: Pair) -> None:
    rows = Rows((pair.token,), (pair.text.last,), (pair.text.last,))
    outputs = head_outputs(pair.engine, pair.fresh, rows, [pair.text.last])
    with (
        pytest.raises(InvalidArgumentError, match="layers of"),
        heads_from(pair.engine, pair.old, outputs, [(0, 99)], [pair.text.last]),
    ):
        pass
    with (
        pytest.raises(InvalidArgumentError, match="never reached"),
        heads_from(pair.engine, pair.old, outputs, [(0, 0)], [pair.text.last]),
    ):
        pass


def test_shares_are_those_of_what_was_added(pair: Pair, notes: dict[str, tuple[int, ...]]) -> None:
    slots = notes["actions"][:1]
    found = shares_by_layer(pair, slots)
    stream, attention = added(pair, pair.old, slots)
    other, other_attention = added(pair, pair.fresh, slots)
    mlps = (stream[1:] - stream[:-1] - attention, other[1:] - other[:-1] - other_attention)
    change = other[-1] - stream[-1]
    by_mlps = float(((mlps[1] - mlps[0]).sum(dim=0) * change).sum() / (change**2).sum())
    share = found["at_100"]["attention"]
    assert share is not None
    assert share == pytest.approx(1 - by_mlps, abs=1e-4)
    nothing = shares_by_layer(pair, range(pair.text.field.start - 1, pair.text.field.start))
    assert nothing["at_100"] == {"attention": None, "size": 0.0}, "before the field nothing changes"


def test_random_heads_are_others_of_the_same_layers_or_the_nearest() -> None:
    rng = random.Random(0)
    chosen = [(2, 0), (2, 1), (2, 2), (5, 3)]
    drawn = matched_heads(chosen, 6, 4, rng)
    assert len(set(drawn)) == 4
    assert not set(drawn) & set(chosen)
    assert (2, 3) in drawn
    assert sum(layer in (1, 3) for layer, _ in drawn) == 2
    assert sum(layer == 5 for layer, _ in drawn) == 1
    with pytest.raises(InvalidArgumentError, match="too few others"):
        matched_heads([(0, 0), (0, 1)], 1, 3, rng)


def test_heads_are_ranked_by_the_size_of_their_mean_effect() -> None:
    every = [(0, 0), (0, 1), (1, 0), (1, 1)]
    effects = [[0.1, -0.5, 0.0, 0.2], [0.1, -0.3, 0.0, 0.4]]
    assert paths.strongest(effects, every, 3) == ((0, 1), (1, 1), (0, 0))
    assert paths.strongest([], every, 2) == ((1, 1), (1, 0))
    assert paths.depth(effects, every, [(0, 1), (1, 1)]) == pytest.approx(0.3 / 0.7)
    assert paths.depth([], every, every) is None
    rows = [{"domain": domain, "read": effect} for domain in "ab" for effect in effects]
    assert paths.stability(rows, "read", every, 2) == {"shared": 1.0, "ranks": pytest.approx(0.8)}
    assert paths.stability(rows[:1], "read", every, 2) == {"shared": None, "ranks": None}


def test_a_row_has_every_arm(pair: Pair) -> None:
    ranking = [path_closure.rank(pair) | {"domain": domain} for domain in "aabb"]
    row: Any = path_closure.measure(pair, ranking)
    for name, sizes in row["read"].items():
        for count, arms in sizes.items():
            assert set(arms) >= {"alone", "rest", "random"}, (name, count)
    assert set(row["write"]["1"]) == {"alone", "random"}
    assert row["stable"] == {part: {"shared": 1.0, "ranks": 1.0} for part in ("read", "write")}
