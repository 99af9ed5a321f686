"""Spliced memories, other texts and the diagnosis of edits, on a tiny random model in float64: what must be equal is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv.edits.modes import Mode
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments import diagnosis, families, memory, placed
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.boundary import in_setting
from programmable_kv.lab.experiments.cases import cases, domain_names
from programmable_kv.lab.experiments.dose import cached
from programmable_kv.lab.experiments.named_pair import known_of, named_pair
from programmable_kv.lab.experiments.pair import Pair, Texts, both_prefilled, pair_of, prefilled
from programmable_kv.lab.experiments.prevention import decided, tail_of
from programmable_kv.lab.experiments.written import RULES
from programmable_kv.lab.tools.together import Probe


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


@pytest.fixture(scope="module")
def pair(model: Any) -> Pair:
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair) and len(dict(placed.places(pair))) == 3)


@pytest.fixture(scope="module")
def two_sets(model: Any) -> Pair:
    found = (pair_of(model, case) for case in cases(64, sets=2))
    return next(pair for pair in found if isinstance(pair, Pair))


def test_the_memory_stands_above_the_rules_or_below_them(pair: Pair) -> None:
    found = dict(placed.places(pair))
    early, late, between = (found[name] for name in placed.PLACES)
    assert len(early.memory) == pytest.approx(len(late.memory), abs=2)
    assert late.texts.text.last - late.memory.stop < between.texts.text.last - between.memory.stop
    for it in (early, late, between):
        text = it.texts.text
        assert it.memory.start < text.field.start
        assert text.field.stop <= it.memory.stop <= tail_of(text)[0]
    assert early.texts.text.of(*RULES)
    for it in (late, between):
        assert it.texts.text.of(*RULES) == (), "no rule stands behind the field"
        whole, other = ("".join(each.texts.text.tokens).replace("<|im_end|>", "\n").split("\n") for each in (early, it))
        assert Counter(filter(None, whole)) == Counter(filter(None, other)), "the same lines, in another order"


def test_a_spliced_memory_is_what_is_compiled_alone_and_the_rest_reads_everything(pair: Pair) -> None:
    it = dict(placed.places(pair))[placed.EARLY]
    text, engine, chunk = pair.text, pair.engine, it.memory
    shared = known_of(pair)
    old, _ = memory.spliced(named_pair(pair, shared), chunk)
    shared.compute()
    found = shared.buffer(old[:-1])
    lone = engine.new_buffer(len(chunk))
    engine.compute(
        lone, Rows(text.ids[chunk.start : chunk.stop], tuple(range(len(chunk))), tuple(chunk.range)), logits=0
    )
    again = shared.buffer(old[:-1])
    rest = tuple(range(chunk.stop, text.last))
    engine.compute(again, Rows(tuple(text.ids[slot] for slot in rest), rest, rest), logits=0)
    for layer in range(len(found)):
        for mine, theirs in ((found.keys(layer), lone.keys(layer)), (found.values(layer), lone.values(layer))):
            assert torch.allclose(mine[:, :, chunk.start : chunk.stop], theirs, atol=1e-9)
        assert torch.allclose(found.values(layer), again.values(layer), atol=1e-9)
    last = len(found) - 1
    assert not torch.allclose(
        found.values(last)[:, :, chunk.start :], pair.old.values(last)[:, :, chunk.start :], atol=1e-6
    )


def test_with_everything_computed_again_a_spliced_memory_is_a_full_prefill(pair: Pair) -> None:
    shared = known_of(pair)
    for it in dict(placed.places(pair)).values():
        own = named_pair(it.texts, shared)
        old, _ = memory.spliced(own, it.memory)
        everything = own.recomputed(range(it.memory.start, it.texts.text.last), old)
        field = own.recomputed(it.texts.text.field.range, old)
        shared.compute()
        full = both_prefilled(it.texts).scale.new
        assert own.scale.new == pytest.approx(full, abs=1e-9)
        assert own.gap(everything) == pytest.approx(full, abs=1e-9)
        assert own.gap(field) != pytest.approx(full, abs=1e-4)


def test_a_line_is_appended_to_what_is_cached_and_read(pair: Pair) -> None:
    it = dict(placed.places(pair))[placed.EARLY]
    ids = memory.with_line(it)
    whole = prefilled(pair.engine, replace(pair.text, ids=ids))
    last = Rows((ids[-1],), (len(ids) - 1,), (len(ids) - 1,))
    expected = float(pair.gap_in(pair.engine.compute(whole, last)[-1]))
    own = named_pair(pair, known_of(pair))
    appended = memory.continued(own, own.old, ids)
    own.shared.compute()
    assert own.gap(appended) == pytest.approx(expected, abs=1e-9)
    assert own.scale.old == pytest.approx(pair.scale.old, abs=1e-9)


def test_what_is_asked_by_names_is_what_a_forward_of_its_own_decides(pair: Pair) -> None:
    own, tail = named_pair(pair, known_of(pair)), tail_of(pair.text)
    chosen = (*pair.text.field.range, *tail)
    patched, recomputed = own.patched(tail), own.recomputed(chosen)
    own.shared.compute()
    assert own.gap(patched) == pytest.approx(pair.gaps([Probe(tail)])[0], abs=1e-9)
    assert own.gap(recomputed) == pytest.approx(pair.recomputed(chosen), abs=1e-9)
    assert own.decision(own.fresh[-1]) == decided(pair, pair.fresh, pair.new_text, ())


def test_a_memory_row_is_summarised(pair: Pair) -> None:
    row: Any = {"domain": "a", **memory.measure(pair, [])}
    brief = memory.measure(pair, [], brief=True)
    assert brief == {"right": row["right"], "places": {"early": row["places"]["early"]}}
    for place in row["places"].values():
        for way in memory.WAYS:
            place[way]["old"] |= {"gap": -2.0, "choice": row["right"][0]}
            place[way]["new"] |= {"gap": 2.0, "choice": row["right"][1]}
            for arm, gap in zip(memory.ARMS, (-2.0, 0.0, 2.0), strict=True):
                place[way][arm] = {"gap": gap, "choice": row["right"][gap > 0]}
    row["prefilled"] = {name: {"old": True, "new": name != "between"} for name in placed.PLACES}
    wrong = {**row, "domain": "b"}
    wrong["places"] = {name: {**place} for name, place in row["places"].items()}
    late = wrong["places"]["late"]
    late["recomputed"] = {**late["recomputed"], "old": {"gap": 1.0, "choice": row["right"][1]}}
    found = memory.summarise([row, wrong])
    assert found["slope"]["value"] == pytest.approx(1.0)
    assert found["points"] == 9
    assert found["edited"] == 6
    assert found["places"]["early"]["counted"] == 2
    assert found["places"]["late"]["counted"] == 1, "where a prefill is wrong there is nothing to recover"
    assert found["places"]["early"]["spliced"]["erratum"]["recovery"]["value"] == pytest.approx(0.5)
    assert found["places"]["early"]["same"]["readers"]["value"] == 1
    tested = found["places"]["early"]["paired"]["in_place_erratum_spliced"]
    assert (tested["only_first"], tested["only_second"], tested["p"]) == (0, 0, 1.0)
    placement = found["placement"]
    assert [placement[name]["value"] for name in placed.PLACES] == [1, 1, 0.5]
    assert placement["early_between"] == {"only_first": 2, "only_second": 0, "p": pytest.approx(0.75)}
    assert placement["early_late"] == {"only_first": 0, "only_second": 0, "p": 1.0}


def test_other_texts_say_the_same_and_their_arms_end_where_they_must(pair: Pair) -> None:
    row = families.measure(pair, [])
    assert families.measure(pair, [], texts=("prose",)) == {"texts": {"prose": row["texts"]["prose"]}}
    assert set(row["texts"]) == {families.LIST, "two_hops", "prose", "passages", "rule_in_question"}
    for setting in families.settings(pair.case, pair.change):
        said = f"{setting.system} {setting.asked}"
        assert all(said.count(pair.case.gate.actions[value]) == 1 for value in pair.change), setting.name
    for name, text in row["texts"].items():
        assert text["patched"]["field"] != pytest.approx(text["old_gap"], abs=1e-6), name
        assert text["share"] == pytest.approx(families.SHARE, abs=0.02)
    in_question = in_setting(pair, families.settings(pair.case, pair.change)[-1])
    assert isinstance(in_question, Texts)
    in_question = both_prefilled(in_question)
    everything = in_question.recomputed((*in_question.text.field.range, *in_question.text.later))
    assert everything == pytest.approx(in_question.scale.new, abs=1e-4)
    later, far = pair.text.later, distances(pair.old, pair.fresh)
    assert len(families.deviating(far, 5, later)) == 5
    assert families.deviating(far, 10**6, later) == later
    assert families.deviating(far, -1, later) == ()
    apart = {name: each[1] for name, each in far.items()}
    (first,) = families.deviating(far, 1, later, layers=(1,))
    assert first == max(later, key=lambda slot: float(apart["keys"][slot] + apart["values"][slot]))


def test_edits_of_three_kinds_are_diagnosed_by_what_they_do(two_sets: Pair) -> None:
    kinds = [kind for kind, _, _ in diagnosis.edits(two_sets)]
    assert kinds[:2] == [diagnosis.ASKED, diagnosis.OTHER]
    notebook = cached(two_sets)
    opening = two_sets.text.ids[len(notebook) :]
    row: Any = {"domain": two_sets.case.domain, **diagnosis.measure(two_sets, [])}
    assert {kind: edit["named"] for kind, edit in row["edits"].items()} == {
        kind: kind != diagnosis.UNREAD for kind in kinds
    }
    for kind, name, value in diagnosis.edits(two_sets):
        notebook.edit({name: value}, mode=Mode.FULL)
        scores = diagnosis.likelihoods(two_sets, notebook, opening)
        assert max(scores.values()) == pytest.approx(row["edits"][kind]["full"]["p"], abs=1e-4)
        notebook = cached(two_sets)


def edit(alone: str, both: str, full: str, p: float, *, domain: str, named: bool = True) -> dict[str, Any]:
    return {
        "named": named, "in_place": {"choice": alone, "p": 0.9, "stale": 0.9}, "full": {"choice": full, "p": 0.9, "stale": 0.0},
        "field_erratum": {"choice": both, "p": p, "stale": 0.2}, "domain": domain,
    }  # fmt: skip


def test_rules_are_scored_against_a_full_prefill_and_margins_chosen_on_other_domains() -> None:
    domains = domain_names()[:2]
    rows: list[dict[str, Any]] = [
        {
            "domain": domain, "before": "stay",
            "edits": {
                "asked": edit("stay", "go", "go", 0.8, domain=domain),  # needed, and seen by a margin of up to 0.6
                "other": edit("stay", "go", "stay", 0.3, domain=domain),  # not needed, and taken for it below 0.1
                "unread": edit("stay", "stay", "stay", 0.9, domain=domain, named=False),
            },
        }
        for domain in domains
    ]  # fmt: skip
    found = diagnosis.summarise(rows)
    assert found["edits"] == 6
    assert [found["kinds"][kind]["needs"]["value"] for kind in diagnosis.KINDS] == [1, 0, 0]
    assert set(found["margins"].values()) == {0.1}
    perfect = {name: found["rules"]["calibrated"][name]["value"] for name in ("precision", "recall", "accuracy")}
    assert perfect == {"precision": 1, "recall": 1, "accuracy": 1}
    assert found["rules"]["named"]["precision"]["value"] == 0.5
    assert found["rules"]["named"]["recall"]["value"] == 1
    assert found["rules"]["always"]["precision"]["value"] == pytest.approx(1 / 3)
    assert not diagnosis.published({**rows[0]["edits"]["asked"], "before": "stay"}, 0.7)
