"""`docs/claims.md`: every published claim with its status, from `lab/claims/claims.toml` and records in `results/`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from programmable_kv.lab.claims.claim import Claim, Evidence, Status, read_claims
from programmable_kv.quotes import CITED, refreshed
from programmable_kv.records import Record, all_records

_TEXT = f"""# Published claims, and what is known here

The idea behind this package was published in *Models Take Notes at Prefill* (arXiv 2606.17107), with its code and records.
This page lists what was claimed there, and what our own records say about it.

- **{Status.REPRODUCED}**: the claim holds here, by our own measure.
- **{Status.BOUNDED}**: the claim holds within limits, which are stated.
- **{Status.REFUTED}**: measured properly, the claim does not hold here.
- **{Status.NOT_TESTED}**: none of our records settles it.
- **{Status.NOT_TESTABLE}**: no record can settle it on the machines and with the tools of this project.

A status that rests on records is a set of conditions on them, in brackets. A test fails if a record does not meet one. If a
condition names an end of the interval, that end must meet it. We chose the limits with the records at hand. They are not
predictions; they show when a later record contradicts a status. A status is about the models named, which are small.
`embedded-plain` is [the embedded model](embedded-model.md) before its training by design; we trained it on policies.

{{table}}

{{sections}}
"""


def claims_page(results: Path) -> str:
    """Return the page. Every figure of ours in it is taken from a record in `results`."""
    claims, records = read_claims(), {record.name: record for record in all_records(results)}
    groups = {name: list(each) for name, each in groupby(claims, key=lambda claim: claim.group)}
    sections = [
        f"## {name}\n\n" + "\n\n".join(_section(claim, records) for claim in each) for name, each in groups.items()
    ]
    page = _TEXT.format(table=_table(claims), sections="\n\n".join(sections))
    return refreshed(page, results)


def _table(claims: list[Claim]) -> str:
    counts = ", ".join(f"{sum(claim.status is status for claim in claims)} {status}" for status in Status)
    rows = [f"| [{claim.id}](#{claim.id.lower()}) | {claim.title} | {claim.status} |" for claim in claims]
    return "\n".join(
        [f"{len(claims)} claims: {counts}.", "", "| claim | what | status |", "| --- | --- | --- |", *rows]
    )


def _section(claim: Claim, records: Mapping[str, Record]) -> str:
    lines = [
        f"### {claim.id}",
        "",
        f"{claim.title}: **{claim.status}**.",
        "",
        f"- Published: {claim.published} ({claim.source}). {CITED}",
        f"- What would settle it: {claim.settles}",
        *(_measured(list(each), records[name]) for (name, _), each in groupby(claim.evidence, key=_figure)),
    ]
    if claim.note:
        lines.append(f"- {claim.note} {CITED}" if any(c.isdigit() for c in claim.note) else f"- {claim.note}")
    return "\n".join(lines)


def _figure(evidence: Evidence) -> tuple[str, str]:
    return evidence.record, evidence.figure


def _measured(conditions: list[Evidence], record: Record) -> str:
    """Return the line for one figure, with the conditions on it."""
    evidence = conditions[0]

    def quote(path: str, spec: str) -> str:
        return f"<!--{evidence.record}:{path}:{spec}-->?<!--/-->"

    if evidence.is_interval(record):
        value, low, high = (quote(f"{evidence.figure}.{end}", ".3f") for end in ("value", "low", "high"))
        shown = f"{value} [{low}, {high}], {quote(f'{evidence.figure}.n', '.0f')} items"
    else:
        shown = quote(evidence.figure, ".3g")
    holds = ", ".join(f"`{each.condition}`" for each in conditions)
    return f"- Here: {evidence.of}: {shown} ({holds}). `{record.model}`, `{record.command}`."
