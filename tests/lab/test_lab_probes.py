"""Linear probes with held-out groups and control tasks, and learned subspaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import tiny_engine
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.alignment import Exchange, align, expected_loss
from programmable_kv.lab.tools.changes import interchanged
from programmable_kv.lab.tools.linear_probes import control_labels, mean_direction, probe
from programmable_kv.lab.tools.nulls import random_basis
from programmable_kv.lab.tools.readouts import kl
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded


def drawn(*, signal: float, by_group: bool = False) -> tuple[torch.Tensor, list[bool], list[str], list[str]]:
    """120 items of 6 domains: the label moves dimension 0, or in each domain another one."""
    rng = np.random.default_rng(0)
    groups = [f"domain {i // 20}" for i in range(120)]
    labels = [bool(i % 2) for i in range(120)]
    kinds = [f"kind {i % 10}" for i in range(120)]
    features = rng.normal(size=(120, 12))
    for i, label in enumerate(labels):
        features[i, i // 20 if by_group else 0] += signal * (1 if label else -1)
    return torch.tensor(features), labels, groups, kinds


def test_a_probe_reads_a_label_in_groups_it_never_saw() -> None:
    pytest.importorskip("sklearn")
    found = probe(*drawn(signal=3.0), controls=4)
    assert found.accuracy.value > 0.97
    assert found.accuracy.method == "cluster bootstrap"
    assert found.majority == 0.5
    assert 0.3 < found.control < 0.7
    assert found.selectivity > 0.3


def test_what_is_read_in_each_group_by_another_direction_does_not_generalise() -> None:
    pytest.importorskip("sklearn")
    features, labels, groups, kinds = drawn(signal=3.0, by_group=True)
    assert probe(features, labels, groups, kinds, controls=1).accuracy.value < 0.65
    one = [i for i, group in enumerate(groups) if group == groups[0]]
    within = probe(
        features[one], [labels[i] for i in one], [str(i // 2 % 4) for i in one], [kinds[i] for i in one], controls=1
    )
    assert within.accuracy.value > 0.8, "within a domain the label is there"


def test_a_control_task_shows_a_probe_that_memorises() -> None:
    """Kinds that recur in every group are read whatever their labels are, so selectivity is small."""
    pytest.importorskip("sklearn")
    _, labels, groups, kinds = drawn(signal=0.0)
    own = torch.eye(10)[[int(kind.split()[1]) for kind in kinds]]
    found = probe(own, labels, groups, kinds, controls=4)
    assert found.accuracy.value == 1.0
    assert found.control > 0.95
    assert found.selectivity < 0.05


def test_probes_refuse_what_cannot_be_scored() -> None:
    pytest.importorskip("sklearn")
    features, labels, groups, kinds = drawn(signal=1.0)
    with pytest.raises(ValueError, match="two groups and two labels"):
        probe(features, labels, ["a"] * 120, kinds)
    with pytest.raises(ValueError, match="two groups and two labels"):
        probe(features, [True] * 120, groups, kinds)
    with pytest.raises(ValueError, match="two kinds"):
        probe(features, labels, groups, ["a"] * 120)


def test_control_labels_are_by_kind() -> None:
    rng = np.random.default_rng(1)
    labels = control_labels(["a", "b", "a", "c", "d"], [True, True, True, False, False], rng)
    assert labels[0] == labels[2]
    assert len({*labels}) == 2
    assert {tuple(control_labels("abcd", [True, False] * 2, rng)) for _ in range(60)} >= {
        (True, True, False, False),
        (False, True, True, False),
    }


def test_the_mean_direction() -> None:
    features = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 5.0]])
    torch.testing.assert_close(mean_direction(features, [True, True, False]), torch.tensor([0.0, -1.0]))
    with pytest.raises(ValueError, match="items of both"):
        mean_direction(features, [True, True, True])


def test_alignment_finds_the_subspace_that_was_used() -> None:
    """The logits to predict come from exchanges along a hidden subspace: the search finds it, random subspaces fail."""
    engine = tiny_engine("llama", num_hidden_layers=1, hidden_size=16)
    site = Site(Place.RESIDUAL, 1)
    ids = [(7 + 31 * i) % 500 for i in range(12)]
    buffer = engine.new_buffer()
    engine.append(buffer, ids[:-1], logits=0)
    rows = Rows((ids[-1],), (11,), (11,))
    hidden = random_basis(torch.zeros(16, 1, dtype=torch.float64), 9)
    exchanges = []
    for token in range(40, 64):
        with recorded(engine, buffer, [site], [11]) as found:
            engine.compute(buffer, Rows((token,), (11,), (11,)))
        values = found[site]
        with changed(engine, buffer, site, interchanged(values, hidden), [11]):
            predicted = engine.compute(buffer, rows)[-1]
        exchanges.append(Exchange(buffer, rows, values, lambda logits, p=predicted: kl(p, logits)))
    before = [tensor.clone() for tensor in buffer.tensors().values()]
    fitted, held_out = exchanges[:16], exchanges[16:]
    found = align(engine, site, fitted, 1, steps=50, rate=0.1)
    overlap = float((found.basis.T @ hidden).pow(2))
    assert overlap > 0.5, (
        f"the learned subspace has cos^2 {overlap:.2f} with the hidden one, chance 0.06 ({found.losses[::10]})"
    )
    nulls = [expected_loss(engine, site, held_out, random_basis(hidden, seed)) for seed in range(5)]
    assert expected_loss(engine, site, held_out, found.basis) < 0.35 * min(nulls)
    assert expected_loss(engine, site, held_out, hidden) == pytest.approx(0, abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(buffer.tensors().values(), before, strict=True))
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    with pytest.raises(InvalidArgumentError, match="cannot fit"):
        align(engine, site, fitted, 17)
