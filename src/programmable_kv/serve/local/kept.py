"""Notebooks as the state keeps them: what each was made from and its latest values. Caches are computed again.

Several servers may share one state: what is read may have been written by another one.
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
    """One notebook as it is kept."""

    identity: str
    tenant: str
    version: int
    source: Mapping[str, Any] = field(repr=False)
    """the request it was made from"""
    values: Mapping[str, Any] = field(repr=False)
    """the latest values that clients gave"""
    shown: Mapping[str, str] = field(repr=False)
    """all values as they stand in the text"""
    tokens: int = 0

    def request(self) -> dict[str, Any]:
        """The request that makes it with its latest values. Each field keeps the kind that its first value declared: the number
        5 in a field of text is text."""
        given = dict(self.source.get("fields") or {})
        for name, value in self.values.items():
            known = given[name]
            kind = type_of(field_of(name, known)).kind.value
            given[name] = {**(known if isinstance(known, Mapping) else {}), "value": value, "kind": kind}
        return {**self.source, "fields": given}


class NotebookShelf:
    """All notebooks that are kept. Each call is one transaction, and is kept when it returns."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __len__(self) -> int:
        return int(self._state.rows("SELECT count(*) FROM notebooks")[0][0])

    def identities(self) -> set[str]:
        """Of all notebooks."""
        return {identity for (identity,) in self._state.rows("SELECT identity FROM notebooks")}

    def of_tenant(self, tenant: str) -> list[KeptNotebook]:
        """A tenant's notebooks, in the order in which they were made."""
        return self._read("tenant = ? ORDER BY number", tenant)

    def get(self, identity: str) -> KeptNotebook | None:
        """One notebook; None where there is none."""
        found = self._read("identity = ?", identity) if "\0" not in identity else []  # no text holds that
        return found[0] if found else None

    def add(self, kept: KeptNotebook, *, most: int) -> bool:
        """Keep a new one. False where there are as many as there may be."""
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
        """Keep new values of one. False where it has another version than this one by now, or is gone."""
        with self._state.write() as run:
            changed = run.execute(
                "UPDATE notebooks SET version = ?, fields = ? WHERE identity = ? AND version = ?",
                (kept.version, _fields(kept), kept.identity, version),
            )
            return changed.rowcount == 1

    def remove(self, identity: str, *, version: int | None) -> bool:
        """Forget one. False where it has another version than this one by now, or is gone; None is any version."""
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
