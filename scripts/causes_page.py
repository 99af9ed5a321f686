"""`docs/explain-miss.md`: the causes that `pkv explain-miss` knows, from their tables in the code."""

from __future__ import annotations

import re


def causes_page(page: str) -> str:
    """Return the page with its table of causes replaced. The text around the table is kept."""
    found = re.search(r"<!-- generated: causes -->\n(.*?)<!-- end -->", page, re.DOTALL)
    if found is None:
        raise ValueError("docs/explain-miss.md must contain '<!-- generated: causes -->' with an '<!-- end -->'")
    return page[: found.start(1)] + causes_table() + page[found.end(1) :]


def causes_table() -> str:
    """Return a table of all causes that cost something, with their fixes. Causes that texts do not show come last."""
    from programmable_kv.explain.classes import CLASSES
    from programmable_kv.explain.explain import TEMPLATE
    from programmable_kv.explain.upstream import CLASSES as UNREAD

    rows = [row for row in (*CLASSES, TEMPLATE, *UNREAD) if row.lost]
    lines = ["| cause | what happened | what to do |", "| --- | --- | --- |"]
    lines += [f"| {row.name} | {row.what} | {row.fix} |" for row in rows]
    return "\n".join(line.replace("<", "\\<") for line in lines) + "\n"
