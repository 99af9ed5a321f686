"""`field_erratum` as it was published: the line that states the new value reads the refreshed field.

The product's line reads it only if the text behind the field was computed with this value. Otherwise a line that finds
its own value there already corrects less (`docs/mechanism.md`, "A line that repeats corrects less"). Experiments about
the published method use this one.
"""

from __future__ import annotations

from programmable_kv.notebook.notebook import Notebook


def as_published(notebook: Notebook) -> Notebook:
    """Let the notebook's errata read the fields that are refreshed with them. Returns the notebook."""
    notebook._lines_read_fields = True
    return notebook
