"""Every experiment on a tiny random model: what must be exactly zero or one, and that a record of it is whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from leaves import leaves
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.experiments import blast_radius, dissociation, knock_out, locality, where
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.control import randomised
from programmable_kv.lab.experiments.experiment import Experiment, of_other_domains, record_name
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
from programmable_kv.lab.experiments.runs import WRONG, run
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, share
from programmable_kv.lab.experiments.written import TAIL, Part
from programmable_kv.records import read_record

CLOSE = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


@pytest.fixture(scope="module")
def pair(model: Any) -> Pair:
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


def test_nothing_moves_before_the_field_and_no_later_token_in_the_first_layer(pair: Pair) -> None:
    for apart in blast_radius.distances(pair.old, pair.fresh).values():
        assert apart.shape == (len(pair.old), len(pair.text.ids) - 1)
        assert not apart[:, : pair.text.field.start].any()
        assert not apart[0, pair.text.field.stop :].any(), "the first layer's rows know their own token alone"
        assert bool((apart[1:, pair.text.field.stop :] > 0).all())
    row = blast_radius.measure(pair, [])
    assert row["before_largest"] == 0.0
    assert row["keys"]["layers"][0] == 0.0


def test_arms_of_locality_end_where_they_must(pair: Pair) -> None:
    ranking = locality.rank(pair)
    assert set(ranking["roles"]) == {pair.text.role(slot) for slot in pair.text.later}
    row = locality.measure(pair, [ranking])
    old, new = round(pair.scale.old, 4), round(pair.scale.new, 4)
    assert row["patched"]["all"] == pytest.approx(new, abs=1e-4)
    assert row["recomputed"]["all"] == pytest.approx(new, abs=1e-4)
    assert row["recomputed"]["field"] == pytest.approx(row["patched"]["field"], abs=1e-4)
    assert row["bands"]["layer_0"] == pytest.approx(old, abs=1e-4), "later tokens have nothing of it in the first layer"
    assert row["bands"]["from_1"] == pytest.approx(row["patched"]["later"], abs=1e-4)
    assert row["noised"]["field"] != pytest.approx(new, abs=1e-4)
    scores = [row["patched"][f"same_{k}"] for k in (1, 32)]
    assert all(score is not None for score in scores)


def test_positions_are_ranked_by_roles_and_the_later_of_equals_first(pair: Pair) -> None:
    later = pair.text.later
    role = pair.text.role(later[3])
    order = locality.ranked(pair, [{"roles": {role: 0.9}}, {"roles": {role: 0.7}}])
    first = [slot for slot in later if pair.text.role(slot) == role]
    assert order[: len(first)] == first[::-1]
    assert sorted(order) == list(later)


def test_no_domain_is_scored_by_a_ranking_made_on_it() -> None:
    ranking = EXPERIMENTS["locality"].cases(48)
    rows = [{"part": part, "domain": case.domain} for part, case in ranking]
    for domain in {case.domain for _, case in ranking}:
        others = of_other_domains(rows, domain)
        assert len(others) == 24
        assert domain not in {row["domain"] for row in others}
    assert of_other_domains([{**rows[0], "skipped": "why"}], rows[1]["domain"]) == []


def test_sets_of_tokens_are_what_they_say(pair: Pair) -> None:
    text, sets = pair.text, where.sets(pair.text)
    assert set(sets["delimiters"]) | set(sets["words"]) == set(text.later)
    assert set(sets["rules"]) | set(sets["all_but_rules"]) == set(text.later)
    assert len(sets["first_of_actions"]) == 2
    assert set(sets["first_of_actions"]) < set(sets["rule_action"])
    row = where.measure(pair, [])
    assert set(row["patched"]) == set(row["noised"]) == set(sets)
    for name, slots in sets.items():
        assert (name in row["random"]) == (2 * len(slots) <= len(text.later)), name


def test_a_knock_out_of_nothing_changes_nothing_and_one_of_all_removes_it(pair: Pair) -> None:
    text = pair.text
    tail = tuple(range(min(text.of(*TAIL)), text.last + 1))
    before = [tensor.clone() for tensor in pair.old.tensors().values()]
    layers = tuple(range(len(pair.old)))
    clean, everything = knock_out._tail_logits(pair, tail, [(), (tuple(range(tail[0])), layers)])
    assert float(pair.gap_in(clean)) == pytest.approx(pair.scale.old, **CLOSE)
    alone = pair.engine.new_buffer()
    logits = pair.engine.compute(alone, Rows(tuple(text.ids[s] for s in tail), tuple(range(len(tail))), tail))[-1]
    assert torch.allclose(everything, logits, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.old.tensors().values(), strict=True))
    row = knock_out.measure(pair, [])
    assert set(row["attention"]) == {*row["blocked"], "tail"}
    assert -1 <= row["rank_correlation"] <= 1


def test_rules_exchanged_twice_are_the_rules(pair: Pair) -> None:
    exchanged = dissociation.exchanged_rules(pair)
    assert exchanged != pair.case.scenario.prompt
    assert sorted(exchanged.splitlines()) != sorted(pair.case.scenario.prompt.splitlines())
    assert len(exchanged) == len(pair.case.scenario.prompt)
    old, new = pair.change
    line = next(each for each in exchanged.splitlines() if pair.actions[0] in each and pair.case.gate.field in each)
    assert new in line
    assert old not in line.replace(new, "")


def test_what_the_donor_shares_with_the_context_changes_nothing(pair: Pair) -> None:
    row = dissociation.measure(pair, [])
    assert row["field"]["later"]["gap"] != pytest.approx(pair.scale.old, abs=1e-4)
    assert row["depth"]["from_0"] == row["field"]["actions"]["gap"]
    assert row["depth"]["from_1"] == pytest.approx(row["depth"]["from_0"], abs=1e-4)
    if "rules" in row:
        assert row["rules"]["field"]["gap"] == pytest.approx(pair.scale.old, abs=1e-4), "its field is the same"
    sets = dissociation.sets(pair.text)
    assert set(sets["first_of_actions"]) | set(sets["rest_of_actions"]) == set(sets["actions"])
    assert all(pair.text.parts[slot] is Part.ACTION for slot in sets["actions"])


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_a_record_of_it(name: str, model: Any, tmp_path: Path) -> None:
    chosen = EXPERIMENTS[name]
    # Autoencoders are trained for minutes where they are trained at length.
    measured = chosen.briefly().measure if name == "sparse-features" else chosen.measure
    short = Experiment(name, 1, chosen.title, measured, chosen.summarise, chosen.rank)
    control = randomised(model)
    seen: list[tuple[int, int]] = []
    record = run(short, control, 12, tmp_path / f"{name}.json", report=lambda *done: seen.append(done))
    assert record.complete
    assert record.name == record_name(chosen, control.name) == f"{name}-random-weights"
    assert len(record.rows) == len(chosen.cases(12)) == seen[-1][1]
    assert record.figure("drawn") == 12
    assert 0 < record.figure("counted") == record.figure("aligned")  # of the control, every pair counts
    assert {row["skipped"] for row in record.rows if "skipped" in row} <= {
        "no two values are equally many tokens long",
        "two actions begin with one token",
    }


@pytest.mark.parametrize("name", sorted(name for name, each in EXPERIMENTS.items() if each.quick is not None))
def test_less_of_it_is_a_part_of_it(name: str, model: Any, tmp_path: Path) -> None:
    chosen, control = EXPERIMENTS[name], randomised(model)
    count = 20 if name == "conclusion" else 6  # one that has others to learn from
    brief = run(chosen.briefly(), control, count, tmp_path / "brief.json")
    assert brief.figure("counted") > 0
    if name == "sparse-features":
        return
    whole = run(chosen, control, count, tmp_path / "whole.json")
    differs = {"seconds", "projected_out_learned"}  # measured anew, and of as many dimensions as are learnt
    smaller = False
    for some, every in zip(brief.rows, whole.rows, strict=True):
        few, many = (
            {path: value for path, value in leaves(row) if not differs & set(path.split("."))} for row in (some, every)
        )
        smaller |= len(few) < len(many)
        assert few == {path: many[path] for path in few}
    assert smaller


def test_a_case_that_the_model_decides_wrongly_is_not_measured(model: Any, tmp_path: Path) -> None:
    chosen = EXPERIMENTS["where-notes-are"]
    record = run(chosen, model, 24, tmp_path / "it.json", everyday=True)
    assert record.settings == {"scenarios": 24, "everyday": True}
    assert record.figure("drawn") == 24
    wrong = [row for row in record.rows if row.get("skipped") == WRONG]
    assert wrong
    assert record.figure("aligned") == len(wrong) + record.figure("counted")
    assert record.figure("right_both_ways") == record.figure("counted")


def test_estimates_are_about_what_the_records_took() -> None:
    results = Path(__file__).parents[3] / "results"
    records = {name: results / f"{name}.json" for name in EXPERIMENTS if (results / f"{name}.json").exists()}
    assert len(records) > 10
    for name, path in records.items():
        record, experiment = read_record(path), EXPERIMENTS[name]
        if record.settings["scenarios"] != experiment.scenarios:
            continue  # made before the experiment became cheaper, and with it larger
        took, estimate = record.wall_seconds / record.settings["scenarios"], experiment.seconds
        assert took / 3 < estimate < 3 * took, f"{name}: {took:.1f} s a case, estimated {estimate}"


def test_an_unknown_experiment_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown experiment 'x'; choose from blast-radius, "):
        experiment("x")


def test_an_arm_counts_recoveries_where_both_prefills_are_right() -> None:
    rng = random.Random(0)
    rows = [
        {"domain": f"d{n % 4}", "old_gap": -2.0, "new_gap": 2.0, "valid": n != 0, "a": {"gap": 1.0 + rng.random() / 10}}
        for n in range(12)
    ]
    found = arm(rows, at("a.gap"))
    assert found["recovery"]["n"] == 11
    assert 0.74 < found["recovery"]["low"] <= found["recovery"]["value"] <= found["recovery"]["high"] < 0.79
    assert found["flipped"]["value"] == 1.0
    assert 3 < found["moved"]["value"] < 3.2
    assert mean_by_domain(rows, at("none"))["n"] == share(rows, lambda row: None)["n"] == 0
    assert at("a.gap")({"a": {"gap": None}}) is None
