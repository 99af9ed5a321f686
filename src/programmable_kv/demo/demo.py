"""The demo: its cases, the code that runs them, and the HTML page with the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib import resources

from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import Mode
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.html import tokens_html
from programmable_kv.notebook.notebook import Notebook

VALUES = {"account_role": "verified_admin", "today": "2026-03-01", "tier": "premium", "order_status": "pending"}
MODES = (
    Mode.FULL, Mode.STALE, Mode.IN_PLACE, Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.SELECTIVE, Mode.READERS, Mode.SUFFIX,
)  # fmt: skip
DESIGN = "by design"
"""name of the outcome whose context was prefilled with `visibility="design"`"""


@dataclass(frozen=True, slots=True)
class Case:
    """A field with its new value, the request in the cached context, and the right action before and after the edit."""

    field: str
    value: str
    request: str
    before: str
    after: str


CASES = (
    Case("account_role", "suspended_user", "Somebody asks for a refund. What do you do?", "issue_refund", "escalate"),
    Case("today", "2026-03-15", "Request: a price question. Which action?", "offer_coupon", "quote_price"),
    Case("tier", "basic", "Request: a late parcel. Which action?", "expedite", "open_ticket"),
    Case("order_status", "shipped", "Somebody asks for a cancellation. What do you do?", "cancel", "deny"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one edit mode on one case."""

    case: Case
    mode: str
    """an edit mode, or `DESIGN`"""
    decision: Decision
    agrees: bool
    """whether the decision is the same as after a full prefill of the new text"""
    ratio: float
    """time to the first answer token after that full prefill, divided by the time after this edit"""
    page: str
    """the tokens after the edit, as HTML"""


def policy() -> str:
    return resources.files(__package__).joinpath("policy.md").read_text(encoding="utf-8").strip()


def build(model: Model, request: str, visibility: Visibility = Visibility.CAUSAL) -> Notebook:
    """Return the demo's context, prefilled: the policy with its fields, and a customer's request."""
    notebook = Notebook(model, visibility=visibility)
    notebook.message("system", policy(), **VALUES)
    notebook.message("user", request)
    notebook.prefill()
    return notebook


def run(model: Model) -> Iterator[tuple[Case, Decision, list[Outcome]]]:
    """Yield each case, its decision before the edit, and the outcome of every mode.

    The first outcome is the full prefill, which is the oracle. The last one is `DESIGN`: it edits a context of its own,
    in which tokens read less.
    """
    for case in CASES:
        notebook = build(model, case.request)
        options = [case.before, case.after]
        before = notebook.decide(None, options)
        outcomes: list[Outcome] = []
        full: Decision | None = None
        designed = build(model, case.request, Visibility.DESIGN)
        for mode in (*MODES, DESIGN):
            edited = designed if mode == DESIGN else notebook
            mark = edited.mark()
            asked = None if mode == DESIGN else Mode(mode)
            decision = edited.decide(None, options, edits={case.field: case.value}, mode=asked)
            page = tokens_html(edited)
            edited.rollback(mark)
            full = full or decision
            outcomes.append(
                Outcome(
                    case, str(mode), decision, decision.choice == full.choice, full.ttft_ms / decision.ttft_ms, page
                )
            )
        yield case, before, outcomes


def html_page(model_name: str, results: list[tuple[Case, Decision, list[Outcome]]]) -> str:
    """Return a self-contained page: a table for each case, and the tokens after each edit, coloured by state."""
    body = []
    for case, before, outcomes in results:
        body.append(
            f"<h2>{escape(case.field)}: {escape(VALUES[case.field])} → {escape(case.value)}</h2>"
            f"<p>“{escape(case.request)}” Before the edit: <b>{escape(before.choice)}</b> "
            f"({before.probabilities[before.choice]:.3f}).</p><table><tr><th>mode</th><th>decision</th><th>probability</th>"
            "<th>agrees with full prefill</th><th>tokens computed</th><th>ms</th><th>times faster</th></tr>"
        )
        for o in outcomes:
            chosen = o.decision.choice
            body.append(
                f"<tr><td>{o.mode}</td><td>{escape(chosen)}</td><td>{o.decision.probabilities[chosen]:.3f}</td>"
                f"<td class={'yes' if o.agrees else 'no'}>{'yes' if o.agrees else 'no'}</td>"
                f"<td>{o.decision.account.tokens_computed}</td><td>{o.decision.ttft_ms:.0f}</td><td>{o.ratio:.1f}</td></tr>"
            )
        body.append("</table>")
        for o in outcomes:
            body.append(f"<details><summary>{o.mode}: the tokens</summary>{o.page}</details>")
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}"
        ".yes{background:#b9e3d2}.no{background:#f0c3ae}pre{font-size:13px}summary{cursor:pointer;padding:.2rem 0}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>programmable-kv demo</title>'
        f"<style>{style}</style></head><body><h1>One cached policy, edited</h1><p>Model: {escape(model_name)}. Full prefill "
        "of the new text is the oracle; every other row edits the cache that was computed for the old text. The row "
        "“by design” edits a context in which a field is read by the lines that mention it only.</p>"
        + "".join(body)
        + "</body></html>"
    )
