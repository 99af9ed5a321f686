"""What a server keeps on disk: one SQLite file, one writer."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from programmable_kv.errors import InvalidArgumentError

_VERSION = 1
_CHECKPOINT_PAGES = 16_384
"""64 MiB. Whoever writes when so much has gathered waits for the disk: with 4 MiB, as SQLite has it, every hundredth request"""
_SCHEMA = """
CREATE TABLE conversations (
    identity TEXT PRIMARY KEY, key TEXT NOT NULL, version INTEGER NOT NULL, document TEXT NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX conversations_by_key ON conversations (key);
CREATE INDEX conversations_by_use ON conversations (used);
CREATE TABLE errata (
    conversation TEXT NOT NULL, number INTEGER NOT NULL, after INTEGER NOT NULL, form TEXT NOT NULL, line TEXT NOT NULL,
    PRIMARY KEY (conversation, number)
) WITHOUT ROWID;
CREATE TRIGGER errata_are_never_changed BEFORE UPDATE ON errata BEGIN SELECT RAISE(ABORT, 'a line is never changed'); END;
CREATE TABLE beginnings (key TEXT PRIMARY KEY, conversations INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE templates (
    owner TEXT NOT NULL, template TEXT NOT NULL, seen INTEGER NOT NULL, PRIMARY KEY (owner, template)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    subject TEXT NOT NULL, about TEXT NOT NULL, verdict TEXT NOT NULL, until REAL, PRIMARY KEY (subject, about)
) WITHOUT ROWID;
CREATE TABLE notebooks (
    identity TEXT PRIMARY KEY, tenant TEXT NOT NULL, version INTEGER NOT NULL, source TEXT NOT NULL, fields TEXT NOT NULL,
    number INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rebases (
    conversation TEXT PRIMARY KEY, warmed TEXT NOT NULL, state TEXT NOT NULL, lines INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (session TEXT PRIMARY KEY, conversation TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""


class State:
    """A file of state. For several threads; one statement or transaction at a time."""

    def __init__(self, path: Path | None, *, durable: bool) -> None:
        """
        Args:
            path: the file, which is made where there is none; None keeps the state in memory.
            durable: whether a transaction survives a loss of power. It survives the end of the process in any case.

        Raises:
            InvalidArgumentError: the file cannot be used, is of another version, or another server uses it.
        """
        self._lock = threading.RLock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it holds text of prompts
            self._connection = sqlite3.connect(
                path or ":memory:", isolation_level=None, check_same_thread=False, timeout=1.0
            )
            self._open(durable)
        except (OSError, sqlite3.Error) as error:
            busy = "locked" in str(error)
            why = "another server uses it" if busy else str(error)
            raise InvalidArgumentError(
                f"cannot keep the state in {path}: {why}. Give each server a file of its own with --state"
            ) from error

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block is kept, or nothing where it raises. When it ends, the process may die."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _open(self, durable: bool) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with self.write():
            [(version,)] = run("PRAGMA user_version").fetchall()
            if version not in (0, _VERSION):
                raise sqlite3.DatabaseError(
                    f"it has format {version}, and this version of the software reads {_VERSION}"
                )
            for statement in _statements():
                if (
                    version == 0 or "IF NOT EXISTS" in statement
                ):  # added since that format; older software leaves it alone
                    run(statement)
            if version == 0:
                run(f"PRAGMA user_version = {_VERSION}")


def _statements() -> Iterator[str]:
    """The statements of the schema. One of them holds others."""
    part = ""
    for line in _SCHEMA.splitlines():
        part += f"{line}\n"
        if sqlite3.complete_statement(part):
            yield part
            part = ""
