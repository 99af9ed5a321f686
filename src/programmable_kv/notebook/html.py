"""A notebook as HTML: every cached token, coloured by its state. The page needs no script and no network."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook

# Colours of Okabe and Ito (2008), lightened: people with the common colour blindnesses can tell them apart too.
COLOURS = {
    TokenState.EXACT: "#f3f3f3",
    TokenState.REPAIRED: "#d5d0ee",
    TokenState.RELOCATED: "#cfe6f5",
    TokenState.REFRESHED: "#b9e3d2",
    TokenState.AFTER_EDIT: "#ece6a5",
    TokenState.STALE: "#f0c3ae",
}
MEANINGS = {
    TokenState.EXACT: "a full prefill of this text gives the same numbers",
    TokenState.REPAIRED: "exact too: the first tokens of a spliced skill, recomputed in their place",
    TokenState.RELOCATED: "compiled outside this context and moved here",
    TokenState.REFRESHED: "recomputed by an edit, reading stale tokens too",
    TokenState.AFTER_EDIT: "computed after an edit, reading stale tokens too",
    TokenState.STALE: "computed on another text, or under a value that has changed since",
}
ERRATUM_STYLE = "outline:2px solid #e69f00"
"""an erratum is marked by a frame, because it is a kind of text and not a state"""


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of one unit in one state."""

    text: str
    state: TokenState
    erratum: bool
    tokens: int


def token_runs(notebook: Notebook) -> list[TokenRun]:
    """The tokens of a prefilled notebook, in runs of one unit and state."""
    states = notebook.states
    runs: list[TokenRun] = []
    slot = 0
    for unit in notebook._state.context.units:
        written = 0
        texts = []
        for start, stop in unit.offsets.tolist():
            # A character that several tokens share is shown with the first of them. A special token may show nothing.
            texts.append(unit.text[max(written, start) : stop] if stop > written else "")
            written = max(written, stop)
        for state, group in groupby(zip(states[slot : slot + len(unit)], texts, strict=True), key=lambda item: item[0]):
            found = [text for _, text in group]
            runs.append(TokenRun("".join(found), state, unit.kind is Kind.ERRATUM, len(found)))
        slot += len(unit)
    return runs


def tokens_html(notebook: Notebook) -> str:
    """The tokens of a prefilled notebook, with a legend of the states that occur."""
    if not len(notebook):
        return "<p><em>Notebook, not prefilled yet</em></p>"
    states = notebook.states
    pieces = []
    for run in token_runs(notebook):
        frame = ";" + ERRATUM_STYLE if run.erratum else ""
        style = f"background:{COLOURS[run.state]}{frame}"
        pieces.append(f'<span style="{style}" title="{run.state.value}">{escape(run.text)}</span>')
    legend = " ".join(
        f'<span style="background:{COLOURS[state]};padding:0 .4em">{state.value}</span> '
        f"<small>{MEANINGS[state]} ({states.count(state)})</small>"
        for state in TokenState
        if state in states
    )
    if any(part.kind is Kind.ERRATUM for part in notebook.parts):
        legend += (
            f' <span style="{ERRATUM_STYLE};padding:0 .4em">erratum</span> <small>states a field\'s new value</small>'
        )
    return (
        '<div class="pkv"><p>' + legend + '</p><pre style="white-space:pre-wrap;line-height:1.5">'
        + "".join(pieces) + "</pre></div>"
    )  # fmt: skip
