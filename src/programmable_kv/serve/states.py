"""Opens a state: in memory, in a file, or in a PostgreSQL database that several servers share."""

from __future__ import annotations

from pathlib import Path

from programmable_kv.extras import require_extra
from programmable_kv.serve.address import DatabaseAddress
from programmable_kv.serve.state import FileState, State


def open_state(place: Path | DatabaseAddress | None, *, durable: bool) -> State:
    """Open a state, or create it if there is none.

    Args:
        place: a file or a database; None keeps the state in memory.
        durable: whether a transaction in a file survives a loss of power. A database decides that itself.

    Raises:
        InvalidArgumentError: the state cannot be used, or has another version.
        MissingExtraError: the database driver is not installed.
    """
    if not isinstance(place, DatabaseAddress):
        return FileState(place, durable=durable)
    require_extra("postgres", "psycopg")
    from programmable_kv.serve.postgres import PostgresState

    return PostgresState(place)
