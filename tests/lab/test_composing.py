"""The composing suite: its questions can be answered, its arms are what they say, and an interrupted run resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from programmable_kv import SeamRepair
from programmable_kv.errors import MissingDataError
from programmable_kv.lab.composing import experiment, tasks, tools
from programmable_kv.lab.composing.arms import FEW_ARMS, NOT_ROTATED, Arm, ArmComparison
from programmable_kv.lab.composing.frame import TITLE, InsertionPoint, frame_at
from programmable_kv.lab.composing.horizon import play
from programmable_kv.lab.composing.suites.catalogue import Catalogue
from programmable_kv.lab.composing.suites.composing import Composing
from programmable_kv.lab.composing.suites.prefaces import Prefaces
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.skills.draft import Draft

NEAR = InsertionPoint("system", 64)


def every_kind(count: int) -> list[tasks.Task]:
    return [
        *tasks.policies(count), *tasks.coupled(count), *tasks.facts(count), *tasks.updates(count),
        *tasks.two_hops(count, together=True), *tasks.two_hops(count, together=False),
        *(task for pieces in range(1, tasks.MOST_PIECES + 1) for task in tasks.several(count, pieces)),
    ]  # fmt: skip


def test_every_answer_stands_in_what_the_model_reads() -> None:
    for task in every_kind(16):
        text = task.shared + "".join(task.pieces)
        assert task.right <= set(task.options)
        assert all(answer in text for answer in task.right), task
        assert len(task.options) >= 2
    assert len({task.domain for task in tasks.policies(16)}) == 16
    assert [len(next(tasks.several(1, n)).pieces) for n in (1, 6)] == [1, 6]


def test_a_coupled_piece_never_read_its_facts() -> None:
    for whole, part in zip(tasks.policies(16), tasks.coupled(16), strict=True):
        assert (part.shared + part.pieces[0]).strip() == whole.pieces[0].strip()
        assert part.pieces[0] != whole.pieces[0]


def test_two_updates_leave_the_last_one_in_charge() -> None:
    for task in tasks.updates(16):
        first, last = (piece.rpartition(": ")[2].rstrip(".\n") for piece in task.pieces)
        assert first != last
        right = next(iter(task.right))
        rules = [line for line in task.shared.splitlines() if right in line and not line.startswith("Possible")]
        assert any(last in rule or "band" in rule or "shelf" in rule for rule in rules), "what the last value asks for"


def test_more_sets_of_rules_hold_the_fewer() -> None:
    for two, six in zip(tasks.several(16, 2), tasks.several(16, 6), strict=True):
        assert set(two.pieces) < set(six.pieces)
        assert set(two.options) < set(six.options)
        assert two.right == six.right


def test_a_preface_gives_no_answer_away() -> None:
    """It holds what else is known ahead of the piece (a policy that it updates, its facts), or text of no use here."""
    for task in every_kind(16):
        for piece, preface in zip(task.pieces, task.prefaces, strict=bool(task.prefaces)):
            assert piece not in preface
            if task.kind not in ("coupled", "updates", "two_hops_split"):
                telling = [line for line in "".join(task.pieces).splitlines() if any(a in line for a in task.right)]
                assert telling, task
                assert not any(line in preface for line in telling), task
    for task in [*tasks.updates(4), *tasks.coupled(4)]:
        assert all(task.shared in preface for preface in task.prefaces)
    assert next(tasks.two_hops(1, together=False)).pieces[0] in next(tasks.two_hops(1, together=False)).prefaces[1]


def test_sixteen_tools_and_requests_for_them() -> None:
    assert len(tools.retail_tools()) == 16
    requests = list(tools.tool_requests(60))
    assert len(requests) == 60
    assert len({answer for task in requests for answer in task.right}) >= 6
    assert all(len(task.pieces) == len(task.options) == 16 for task in requests)
    assert not any("state_key" in piece for piece in requests[0].pieces)


def test_a_catalogue_in_several_orders() -> None:
    """The same tools and the same answers; what each read while it was compiled does not depend on the order."""
    groups = Catalogue(tools=12).groups()
    asked = {name: group.tasks for group in groups for name in {task.kind for task in group.tasks}}
    orders = ("in_order", "shuffled", "every_second")
    assert list(asked) == [f"{order}_{how}" for order in orders for how in ("alone", "behind_two", "together")]
    catalogue = asked["in_order_alone"][0].pieces
    assert len(asked["in_order_alone"]) == len(asked["shuffled_together"]) == 12
    assert asked["shuffled_alone"][0].pieces != catalogue
    assert sorted(asked["shuffled_alone"][0].pieces) == sorted(catalogue)
    for kind, several in asked.items():
        for task in several:
            assert task.right
            assert task.right <= set(task.options)
            assert all(name in piece for name, piece in zip(task.options, task.pieces, strict=True))
            if kind.endswith("together"):
                for piece, preface in zip(task.pieces, task.prefaces, strict=True):
                    before = catalogue[: catalogue.index(piece)]
                    assert isinstance(preface, str)
                    assert preface.endswith("".join(before))
                    assert not any(later in preface for later in catalogue[len(before) :])
    assert len(asked["every_second_together"][0].pieces) == len(catalogue) // 2


def test_tools_compiled_together_read_what_they_would_in_one_forward(embedded: Any) -> None:
    """The suite compiles each behind a text of all before it: the very tokens that `compile_together` puts there."""
    together = next(g.tasks[0] for g in Catalogue(1).groups() if g.tasks[0].kind == "in_order_together")
    at_once = Draft.together(embedded, dict(zip(together.options, together.pieces, strict=True)), {}, TITLE, "")
    for draft, piece, preface in zip(at_once, together.pieces, together.prefaces, strict=True):
        one = Draft.of(embedded, piece, {}, None, None, preface)
        assert (one.preface_ids, one.unit.ids) == (draft.preface_ids, draft.unit.ids)


def test_agreement_is_left_out_where_full_prefill_is_never_right() -> None:
    seam = {"agrees": True, "cosine": 1.0, "kl": 0.0}
    row = {"kind": "policy", "domain": "a", "place": "system_64", "right": False, "seam_0": seam}
    wrong = experiment.summarise([row])["policy"]["system_64"]["seam_0"]
    assert "agreement" not in wrong
    assert wrong["flips"]["value"] == 0
    right = experiment.summarise([row, row | {"right": True}])["policy"]["system_64"]["seam_0"]
    assert right["agreement"]["n"] == 1


def test_a_server_that_lists_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_PACKAGE", "json")  # a package without a server
    tools.retail_tools.cache_clear()
    with pytest.raises(MissingDataError, match="could not list its tools"):
        tools.retail_tools()


@pytest.mark.parametrize("point", [NEAR, InsertionPoint("conversation", 200)], ids=str)
def test_a_frame_has_the_text_it_was_asked_for(embedded: Any, point: InsertionPoint) -> None:
    frame = frame_at(embedded, point)
    assert point.preceding_tokens <= len(frame.before) < point.preceding_tokens + 60
    assert frame.after("What now?").count("What now?") == 1
    assert frame.after("What now?").endswith("<|im_start|>assistant\n")


def test_computing_a_whole_piece_again_is_a_full_prefill(embedded: Any) -> None:
    """Splicing it without recomputing is not, and keys left unrotated differ from rotated ones."""
    comparison = ArmComparison(embedded, frame_at(embedded, NEAR))
    task = next(tasks.policies(1))
    whole = Arm("whole", SeamRepair(10_000))
    row = comparison.compare([task], [whole, *FEW_ARMS])[0]
    assert row["whole"]["cosine"] > 1 - 1e-5
    assert row["whole"]["kl"] < 1e-5
    assert row["whole"]["kl"] < row["seam_4"]["kl"]
    assert row["seam_0"]["kl"] != row[NOT_ROTATED.name]["kl"]
    again = comparison.compare([task], [whole, *FEW_ARMS])[0]
    assert again == row  # what was put behind the prefix was taken away again


def test_a_piece_that_depends_on_what_it_never_read_is_worse(embedded: Any) -> None:
    comparison = ArmComparison(embedded, frame_at(embedded, NEAR))
    arm = [Arm("seam_4", SeamRepair(4))]
    whole = [comparison.compare([task], arm)[0]["seam_4"]["kl"] for task in tasks.policies(4)]
    part = [comparison.compare([task], arm)[0]["seam_4"]["kl"] for task in tasks.coupled(4)]
    assert sum(part) > 4 * sum(whole)


def test_a_preface_tells_what_a_piece_lacks(embedded: Any) -> None:
    comparison = ArmComparison(embedded, frame_at(embedded, NEAR))
    alone, informed = Arm("alone", SeamRepair(0)), Arm("informed", SeamRepair(0), preface=True)
    rows = [comparison.compare([task], [alone, informed])[0] for task in tasks.coupled(4)]
    assert sum(row["alone"]["kl"] for row in rows) > 4 * sum(row["informed"]["kl"] for row in rows)
    together = next(tasks.two_hops(1, together=True))
    assert "informed" not in comparison.compare([together], [alone, informed])[0]  # it has no preface


def test_a_value_that_comes_back_is_decided_right(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth edit gives the field its first value again. Its line must read the field, as the notes are of that
    value: a line from which the field is hidden is not obeyed there."""
    assert [row["live_right"] for row in play(embedded, 3, 4)] == [True] * 4
    monkeypatch.setattr(Ledger, "noted_behind", lambda *_: frozenset())
    assert [row["live_right"] for row in play(embedded, 3, 4)] == [True, True, True, False]


def test_the_horizon_compares_an_edited_cache_with_the_text_as_it_is_now(embedded: Any) -> None:
    rows = play(embedded, 0, 3)
    assert [row["turn"] for row in rows] == [0, 1, 2]
    assert all(row["tokens"] > row["full_tokens"] for row in rows)  # errata stay; a rendered policy has none
    assert rows[0]["tokens"] < rows[1]["tokens"] < rows[2]["tokens"]


def test_a_slice_of_the_suite_resumes(embedded: Any, tmp_path: Path) -> None:
    class NearOnly(Composing):
        points = (NEAR,)

    path = tmp_path / "compose-embedded.json"
    suite = NearOnly(policies=1, others=1, tools=0, horizons=1)
    stop_after = 1

    def interrupted(done: int, _: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(embedded, path, suite, turns=3, report=interrupted)
    record = experiment.run(embedded, path, suite, turns=3)
    assert [row["kind"] for row in record.rows] == ["policy", "updates", "horizon"]
    assert record.figure("policy.system_64.seam_1.cosine.value") > 0.9
    assert record.figure("horizon.first.full_right.n") == 1
    assert experiment.record_name(suite, replace(embedded, name="models/Qwen2.5_Coder.gguf")) == "compose-qwen2-5-coder"


def test_every_preface_is_tried(embedded: Any, tmp_path: Path) -> None:
    record = experiment.run(embedded, tmp_path / "preface-embedded.json", Prefaces(policies=1, others=1))
    names = ("none", "title", "rules_4", "rules_20", "like")
    assert list(record.summary) == [f"{kind}_{name}" for kind in ("policy", "rule_sets_2") for name in names]
    found = [record.figure(f"policy_{name}.system_512.preface_0.kl.value") for name in names[1:]]
    assert len(set(found)) == len(found), "each of them leaves something else"
    assert record.figure("policy_none.system_512.seam_32.cosine.value") > 0.99
