"""The places at which a test keeps states: files, or schemas of a database."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from programmable_kv.serve.address import DatabaseAddress

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database


@dataclass
class Places:
    """Files, or with a database, one schema instead of each file."""

    database: Database | None = None
    known: dict[Path, DatabaseAddress] = field(default_factory=dict)

    def at(self, path: Path | None) -> Path | DatabaseAddress | None:
        """The place for a path, always the same. Without a path: a new schema, or memory if there is no database."""
        if self.database is None:
            return path
        if path is None:
            return self.database.new()
        if path not in self.known:
            self.known[path] = self.database.new()
        return self.known[path]

    def option(self, path: Path) -> str:
        """The place for a path, as an argument of `pkv serve --state`."""
        found = self.at(path)
        return found.url if isinstance(found, DatabaseAddress) else str(found)


now = Places()
"""The places of the running test."""
