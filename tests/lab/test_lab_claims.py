"""Published claims: no record contradicts a status, and a record that did would be found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from programmable_kv.lab.claims.claim import Claim, Evidence, Status, read_claims
from programmable_kv.records import Record, all_records
from scripts.claims_page import claims_page

ROOT = Path(__file__).parent.parent.parent
RECORDS = {record.name: record for record in all_records(ROOT / "results")}
CLAIMS = read_claims()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_no_record_contradicts_a_status(claim: Claim) -> None:
    assert claim.contradictions(RECORDS) == [], (
        f"{claim.id} is called {claim.status}: change its status, or see what changed"
    )
    assert all(RECORDS[each.record].complete for each in claim.evidence)


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.evidence], ids=lambda claim: claim.id)
def test_a_record_that_says_otherwise_is_found(claim: Claim) -> None:
    """Each condition is turned around: it must then be contradicted, with the figure in the sentence."""
    for each in claim.evidence:
        turned = replace(each, at_least=each.at_most, at_most=each.at_least)
        path = f"{each.figure}.{each.bound}" if each.is_interval(RECORDS[each.record]) else each.figure
        if RECORDS[each.record].figure(path) not in (each.at_least, each.at_most):
            (sentence,) = replace(claim, evidence=(turned,)).contradictions(RECORDS)
            assert f"{each.record}:{path} is " in sentence


def test_a_change_of_a_record_is_found() -> None:
    claim = next(claim for claim in CLAIMS if claim.id == "T1")
    first = claim.evidence[0]
    record = RECORDS[first.record]
    asked = {**record.summary["asked_before"], "in_place": {"recovery": {"value": 0.4, "low": 0.3, "high": 0.5}}}
    changed: Record = record.model_copy(update={"summary": {**record.summary, "asked_before": asked}})
    found = claim.contradictions({**RECORDS, first.record: changed})
    assert (
        found[0]
        == "edit-modes-embedded-plain:asked_before.in_place.recovery.high is 0.5, which is not high end <= 0.03"
    )
    assert "has no figure" in found[1]
    assert claim.contradictions({}) == ["there is no record edit-modes-embedded-plain"] * 3


def test_a_status_goes_with_its_evidence() -> None:
    evidence = (Evidence("agent", "decisions", "decisions", at_least=1),)
    words = {"id": "X", "group": "g", "title": "t", "published": "p", "source": "s", "settles": "w"}
    for status in Status:
        assert Claim(**words, status=status, evidence=evidence if status.needs_evidence else ())
        with pytest.raises(ValueError, match="conditions on records"):
            Claim(**words, status=status, evidence=() if status.needs_evidence else evidence)
    with pytest.raises(ValueError, match="one condition"):
        Evidence("agent", "decisions", "decisions")
    with pytest.raises(ValueError, match="value, low or high"):
        Evidence("agent", "decisions", "decisions", bound="middle", at_least=1)  # type: ignore[arg-type]


_ONE = '[[claim]]\nid = "X"\ngroup = "g"\ntitle = "t"\npublished = "p"\nsource = "s"\nsettles = "w"\nstatus = "{}"\n'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (_ONE.format("proved"), "'proved' is not a valid Status"),
        (_ONE.format("not tested yet") * 2, "several claims are called X"),
        (_ONE.format("not tested yet").replace("settles", "settled"), "claim X: .*settled"),
        (_ONE.format("refuted"), "has 0 conditions"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_claims(text)


def test_every_published_capability_is_listed() -> None:
    """The thesis in eight claims, and the experiments by their letter."""
    ids = {claim.id for claim in CLAIMS}
    assert {f"T{number}" for number in range(1, 9)} <= ids
    assert {each[0] for each in ids} == set("TABCDEFGHM")
    assert len(CLAIMS) >= 50


def test_the_page_has_every_claim_with_its_figures() -> None:
    page = claims_page(ROOT / "results")
    for claim in CLAIMS:
        section = page.partition(f"### {claim.id}\n")[2].partition("\n### ")[0]
        assert f"**{claim.status}**" in section
        assert section.count("- Here: ") == len({(each.record, each.figure) for each in claim.evidence})
        for each in claim.evidence:
            assert f"`{RECORDS[each.record].command}`" in section
    assert "?<!--/-->" not in page
