"""Answers under visibility by design: the arms, the summary, and a slice of the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from programmable_kv.lab import by_design
from programmable_kv.records import read_record

RESULTS = Path(__file__).parents[2] / "results"


def test_every_kind_is_drawn_and_a_longer_draw_has_the_shorter_one() -> None:
    kinds = [by_design._key(one) for one in by_design.drawn(2) if by_design._key(one)["kind"] != "tools"]
    assert len(kinds) == 2 * (3 + 5)
    longer = {by_design._text(one) for one in by_design.drawn(3)}
    assert {by_design._text(one) for one in by_design.drawn(2)} <= longer
    assert len(by_design.drawn(2, policies=5)) == len(by_design.drawn(2)) + 3 * (5 - 2)


def test_the_summary_counts_right_answers_and_changes_by_order() -> None:
    def arm(choice: str, right: bool) -> dict[str, Any]:
        return {"choice": choice, "right": right, "tokens_computed": 10}

    policy = {
        "number": 0,
        "kind": "one_set",
        "domain": "a",
        **{a: arm("x", a == "design") for a in by_design.POLICY_ARMS},
    }
    pieces = {"number": 0, "kind": "rule_sets_2", "domain": "a", **{a: arm(a, True) for a in by_design.PIECE_ARMS}}
    found = by_design.summarise([policy, pieces])
    assert found["one_set"]["design"]["right"]["value"] == 1
    assert found["policies"]["causal"]["right"]["value"] == 0
    assert found["order_changes"]["value"] == 1
    assert found["rule_sets_2"]["design"]["mean_tokens_computed"] == 10


@pytest.mark.weights
def test_a_slice_of_the_record(embedded: Any) -> None:
    """The first case of each kind of policy, and of two rule sets, as the committed record has them."""
    committed = read_record(RESULTS / "by-design-embedded.json")
    assert committed.model_fingerprint == embedded.fingerprint
    known = {(row["kind"], row["number"]): row for row in committed.rows}
    wanted = ("one_set", "two_hops", "two_sets", "rule_sets_2")
    for one in by_design.drawn(1):
        key = by_design._key(one)
        if key["kind"] in wanted:
            assert by_design._row(embedded, one) == known[key["kind"], key["number"]]
