"""Notebooks in the server's state: the source of each and its latest values. The state keeps no KV caches.

Several servers may share one state, so a notebook that is read may have been written by another server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.prompt.fields import type_of
from programmable_kv.serve.notebooks.source import field_of
from programmable_kv.serve.state import State


@dataclass(frozen=True, slots=True)
class KeptNotebook:
    """One notebook as the state keeps it."""

    identity: str
    tenant: str
    version: int
    source: Mapping[str, Any] = field(repr=False)
    """The request that created the notebook."""
    values: Mapping[str, Any] = field(repr=False)
    """The latest values of the fields that clients edited."""
    shown: Mapping[str, str] = field(repr=False)
    """The values of all fields as the text shows them."""
    tokens: int = 0

    def request(self) -> dict[str, Any]:
        """Return a request that creates the notebook with its latest values.

        Each field keeps the kind that its first value declared: the number 5 in a text field stays text.
        """
        given = dict(self.source.get("fields") or {})
        for name, value in self.values.items():
            known = given[name]
            kind = type_of(field_of(name, known)).kind.value
            given[name] = {**(known if isinstance(known, Mapping) else {}), "value": value, "kind": kind}
        return {**self.source, "fields": given}


class NotebookShelf:
    """All notebooks in the state. Each call is one transaction, and its change is stored when it returns."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __len__(self) -> int:
        return int(self._state.rows("SELECT count(*) FROM notebooks")[0][0])

    def identities(self) -> set[str]:
        """The ids of all notebooks."""
        return {identity for (identity,) in self._state.rows("SELECT identity FROM notebooks")}

    def of_tenant(self, tenant: str) -> list[KeptNotebook]:
        """A tenant's notebooks, oldest first."""
        return self._read("tenant = ? ORDER BY number", tenant)

    def get(self, identity: str) -> KeptNotebook | None:
        """The notebook with an id; None if it does not exist."""
        found = self._read("identity = ?", identity) if "\0" not in identity else []  # PostgreSQL has no NUL in texts
        return found[0] if found else None

    def add(self, kept: KeptNotebook, *, most: int) -> bool:
        """Store a new notebook. Returns False, and stores nothing, if the state has `most` notebooks already."""
        with self._state.write(locked="notebooks") as run:
            [(count, number)] = run.execute("SELECT count(*), coalesce(max(number), 0) + 1 FROM notebooks").fetchall()
            if count >= most:
                return False
            run.execute(
                "INSERT INTO notebooks VALUES (?, ?, ?, ?, ?, ?)",
                (kept.identity, kept.tenant, kept.version, json.dumps(kept.source), _fields(kept), number),
            )
        return True

    def change(self, kept: KeptNotebook, *, version: int) -> bool:
        """Store new values of a notebook. Returns False if it no longer has this version, or was deleted."""
        with self._state.write() as run:
            changed = run.execute(
                "UPDATE notebooks SET version = ?, fields = ? WHERE identity = ? AND version = ?",
                (kept.version, _fields(kept), kept.identity, version),
            )
            return changed.rowcount == 1

    def remove(self, identity: str, *, version: int | None) -> bool:
        """Delete a notebook. Returns False if it no longer has this version (None: any version), or was deleted."""
        with self._state.write() as run:
            same, values = ("", ()) if version is None else (" AND version = ?", (version,))
            removed = run.execute(f"DELETE FROM notebooks WHERE identity = ?{same}", (identity, *values)).rowcount == 1
        if removed:
            self._state.scrub()
        return removed

    def _read(self, where: str, value: str) -> list[KeptNotebook]:
        found = []
        for identity, tenant, version, source, fields in self._state.rows(
            f"SELECT identity, tenant, version, source, fields FROM notebooks WHERE {where}", (value,)
        ):
            held = json.loads(fields)
            found.append(
                KeptNotebook(
                    identity, tenant, version, json.loads(source), held["values"], held["shown"], held["tokens"]
                )
            )
        return found


def _fields(kept: KeptNotebook) -> str:
    return json.dumps({"values": dict(kept.values), "shown": dict(kept.shown), "tokens": kept.tokens})
