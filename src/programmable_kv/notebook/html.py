"""A notebook as HTML: every cached token, coloured by what it is worth. Self-contained; no script, no network."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from programmable_kv.prompt.units import TokenState

if TYPE_CHECKING:
    from programmable_kv.notebook.cached_context import CachedContext

# Colours of Okabe and Ito (2008), lightened: told apart with the common colour blindnesses too.
COLOURS = {
    TokenState.EXACT: "#f3f3f3",
    TokenState.RELOCATED: "#cfe6f5",
    TokenState.REPAIRED: "#d5d0ee",
    TokenState.REFRESHED: "#b9e3d2",
    TokenState.ERRATUM: "#ffd48a",
    TokenState.AFTER_EDIT: "#ece6a5",
    TokenState.STALE: "#f0c3ae",
}
MEANINGS = {
    TokenState.EXACT: "as a full prefill would have computed it",
    TokenState.RELOCATED: "moved to another position, not computed again",
    TokenState.REPAIRED: "the seam of a spliced skill, computed again in its place",
    TokenState.REFRESHED: "computed again for the new value",
    TokenState.ERRATUM: "the line that states the new value",
    TokenState.AFTER_EDIT: "computed after an edit, reading stale tokens too",
    TokenState.STALE: "computed under a value that has changed since",
}


def tokens_html(notebook: CachedContext) -> str:
    """The tokens of a prefilled notebook, with a legend of the states that occur."""
    if not len(notebook):
        return "<p><em>Notebook, not prefilled yet</em></p>"
    states = notebook.states
    pieces = []
    slot = 0
    for unit in notebook._context.units:
        written = 0
        spans = []
        for start, stop in unit.offsets:
            # A character that several tokens share is shown with the last of them; a special token may show none.
            spans.append(unit.text[max(written, start) : stop] if stop > written else "")
            written = max(written, stop)
        for state, group in groupby(zip(states[slot : slot + len(unit)], spans, strict=True), key=lambda item: item[0]):
            shown = escape("".join(text for _, text in group))
            pieces.append(f'<span style="background:{COLOURS[state]}" title="{state.value}">{shown}</span>')
        slot += len(unit)
    legend = " ".join(
        f'<span style="background:{COLOURS[state]};padding:0 .4em">{state.value}</span> '
        f"<small>{MEANINGS[state]} ({states.count(state)})</small>"
        for state in TokenState
        if state in states
    )
    return (
        '<div class="pkv"><p>' + legend + '</p><pre style="white-space:pre-wrap;line-height:1.5">'
        + "".join(pieces) + "</pre></div>"
    )  # fmt: skip
