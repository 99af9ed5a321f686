"""Notebooks on disk: what each was made from and its latest values. Caches are not kept: they are computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        """The request that makes it with its latest values."""
        given = dict(self.source.get("fields") or {})
        for name, value in self.values.items():
            known = given.get(name)
            given[name] = {**known, "value": value} if isinstance(known, Mapping) else value
        return {**self.source, "fields": given}


class NotebookShelf:
    """All notebooks that are kept. Each call is one transaction, and is on disk when it returns."""

    def __init__(self, state: State) -> None:
        self._state = state

    def all(self) -> list[KeptNotebook]:
        """Every notebook, in the order in which they were made."""
        rows = self._state.rows("SELECT identity, tenant, version, source, fields FROM notebooks ORDER BY number")
        found = []
        for identity, tenant, version, source, fields in rows:
            held = json.loads(fields)
            found.append(
                KeptNotebook(
                    identity, tenant, version, json.loads(source), held["values"], held["shown"], held["tokens"]
                )
            )
        return found

    def add(self, kept: KeptNotebook) -> None:
        """Keep a new one."""
        with self._state.write() as run:
            run.execute(
                "INSERT INTO notebooks SELECT ?, ?, ?, ?, ?, coalesce(max(number), 0) + 1 FROM notebooks",
                (kept.identity, kept.tenant, kept.version, json.dumps(kept.source), _fields(kept)),
            )

    def change(self, kept: KeptNotebook) -> None:
        """Keep new values of one."""
        with self._state.write() as run:
            run.execute(
                "UPDATE notebooks SET version = ?, fields = ? WHERE identity = ?",
                (kept.version, _fields(kept), kept.identity),
            )

    def remove(self, identity: str) -> None:
        """Forget one."""
        with self._state.write() as run:
            run.execute("DELETE FROM notebooks WHERE identity = ?", (identity,))


def _fields(kept: KeptNotebook) -> str:
    return json.dumps({"values": dict(kept.values), "shown": dict(kept.shown), "tokens": kept.tokens})
