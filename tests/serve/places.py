"""Where the states of a test are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from programmable_kv.serve.address import DatabaseAddress

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database


@dataclass
class Places:
    """Files; or, with a database, a schema in the place of each file."""

    database: Database | None = None
    known: dict[Path, DatabaseAddress] = field(default_factory=dict)

    def at(self, path: Path | None) -> Path | DatabaseAddress | None:
        """The same place for the same path; without one a new place, in memory where there is no database."""
        if self.database is None:
            return path
        if path is None:
            return self.database.new()
        if path not in self.known:
            self.known[path] = self.database.new()
        return self.known[path]

    def option(self, path: Path) -> str:
        """What `pkv serve --state` takes."""
        found = self.at(path)
        return found.url if isinstance(found, DatabaseAddress) else str(found)


now = Places()
"""of the test that runs"""
