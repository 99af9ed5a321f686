"""Skills compiled alone under a mask, on a tiny random model in float64: what must be equal is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments import seam, skills
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.tools.hooks import taken_back


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair) and skills.beside(pair, 1) is not None)


@pytest.fixture(scope="module")
def two(pair: Pair) -> skills.Skills:
    found = skills.beside(pair, 1)
    assert found is not None
    return skills.layout(pair, found[0])


def test_the_skills_lie_one_after_the_other_between_prefix_and_question(pair: Pair, two: skills.Skills) -> None:
    first, second = two.chunks
    assert first.stop == second.start
    own = skills.chunk_of(pair.text)
    assert two.ids[two.own.stop - len(own) : two.own.stop] == pair.text.ids[own.start : own.stop]
    policy = skills.policy_of(pair.model, pair.case, pair.text)
    assert two.ids[two.own.start : two.own.stop] == policy.ids
    assert [two.ids[slot] for slot in two.actions[two.asked]] == [policy.ids[slot] for slot in policy.actions]
    assert two.ids[two.tail :] == pair.text.ids[own.stop :]
    assert "".join(pair.text.tokens[: own.start]).endswith("\n\n")
    other = skills.layout(pair, [], shift=seam.SHIFT)
    one = skills.layout(pair, [])
    assert (other.prefix, other.chunks) == (one.prefix, one.chunks)
    assert other.ids[: one.prefix] != one.ids[: one.prefix]
    assert other.ids[one.prefix :] == one.ids[one.prefix :]


def test_alone_is_what_is_compiled_alone_where_it_stands(pair: Pair, two: skills.Skills) -> None:
    engine, contexts = pair.engine, skills.Contexts(pair)
    alone = contexts.alone(contexts.full(two), two)
    # The angles of rotary keys are float32 in any dtype, so that rotated keys are equal up to that.
    near = 1e-4
    for chunk in two.chunks:
        lone = engine.new_buffer(len(chunk))
        ids = two.ids[chunk.start : chunk.stop]
        engine.compute(lone, Rows(ids, tuple(range(len(chunk))), tuple(chunk.range)), logits=0)
        for layer in range(len(lone)):
            assert torch.allclose(alone.keys(layer)[:, :, chunk.start : chunk.stop], lone.keys(layer), atol=near)
            assert torch.allclose(alone.values(layer)[:, :, chunk.start : chunk.stop], lone.values(layer), atol=near)


def test_everything_repaired_is_a_full_prefill_and_nothing_repaired_is_not(pair: Pair, two: skills.Skills) -> None:
    contexts = skills.Contexts(pair)
    full = contexts.full(two)
    alone = contexts.alone(full, two)
    expected, _ = seam._read(pair, full, two, two.last)
    some = [list(chunk.range)[:4] for chunk in two.chunks]
    middle = [list(chunk.range)[2:6] for chunk in two.chunks]
    sets = [[list(chunk.range) for chunk in two.chunks], some, middle]
    everything, *partly = seam._repaired(pair, full, alone, two, sets)
    assert torch.allclose(everything, expected, atol=1e-9)
    for chosen, found in zip(sets[1:], partly, strict=True):
        with taken_back(alone):
            one_by_one = pair.engine.compute(alone, skills.repaired_rows(two, chosen))[-1]
        assert torch.allclose(found, one_by_one, atol=1e-9)
        assert not torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(seam._read(pair, alone, two, two.tail)[0], expected, atol=1e-6)
    apart = distances(alone, contexts.together(alone, two))["values"].amax(dim=0)
    assert float(apart[: two.chunks[0].stop].max()) < 1e-9
    assert float(apart[two.chunks[1].start : two.tail].max()) > 1e-6


def test_behind_the_prefix_itself_a_skill_is_as_in_the_context(pair: Pair) -> None:
    one, contexts = skills.layout(pair, []), skills.Contexts(pair)
    full = contexts.full(one)
    alone = contexts.alone(full, one)
    assert any(float(apart[:, : one.tail].max()) > 1e-6 for apart in distances(full, alone).values())
    # Of a longer preface the last tokens are taken.
    contexts.put(alone, one, one.own, (*one.preface, *one.ids[: one.prefix]))
    assert all(float(apart[:, : one.tail].max()) < 1e-9 for apart in distances(full, alone).values())


def test_a_row_says_what_it_must(pair: Pair) -> None:
    row: Any = seam.measure(pair, [])
    for name, count in (("one", 1), ("two", 2)):
        for attention in row[name]["attention"].values():
            assert sum(attention.values()) == pytest.approx(1, abs=1e-3)
        assert ("together" in row[name]["arms"]) == (count == 2)
    deviation = row["one"]["deviation"]
    for kind in ("keys", "values"):
        for arm in ("alone", "null", "preface"):
            # The first layer's rows know their own token alone, whatever stands before them.
            assert deviation[arm][kind]["first_by_layer"][0] == 0
            assert deviation[arm][kind]["first_by_layer"][-1] > 0
