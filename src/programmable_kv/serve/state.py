"""The state of a server: its schema, its interface, and the state in one SQLite file with one writer.

The state of several servers is in `postgres.py`. Each statement is written once for both: with `?` for values,
`ON CONFLICT` instead of `OR REPLACE`, and `epoch()` for the state's own clock.
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from programmable_kv.errors import InvalidArgumentError, StorageError

VERSION = 1
_CHECKPOINT_PAGES = 16_384
"""64 MiB. A write that reaches this waits for the disk. With SQLite's default of 4 MiB, every hundredth request did."""
_SCHEMA = """
CREATE TABLE conversations (
    identity TEXT PRIMARY KEY, key TEXT NOT NULL, version BIGINT NOT NULL, document TEXT NOT NULL,
    used DOUBLE PRECISION NOT NULL
) WITHOUT ROWID;
CREATE INDEX conversations_by_key ON conversations (key);
CREATE INDEX conversations_by_use ON conversations (used);
CREATE TABLE errata (
    conversation TEXT NOT NULL, number INTEGER NOT NULL, after INTEGER NOT NULL, form TEXT NOT NULL, line TEXT NOT NULL,
    PRIMARY KEY (conversation, number)
) WITHOUT ROWID;
CREATE TABLE beginnings (key TEXT PRIMARY KEY, conversations INTEGER NOT NULL, used DOUBLE PRECISION NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS beginnings_by_use ON beginnings (used);
CREATE TABLE templates (
    owner TEXT NOT NULL, template TEXT NOT NULL, seen INTEGER NOT NULL, PRIMARY KEY (owner, template)
) WITHOUT ROWID;
CREATE TABLE verdicts (
    subject TEXT NOT NULL, about TEXT NOT NULL, verdict TEXT NOT NULL, until DOUBLE PRECISION, PRIMARY KEY (subject, about)
) WITHOUT ROWID;
CREATE TABLE notebooks (
    identity TEXT PRIMARY KEY, tenant TEXT NOT NULL, version INTEGER NOT NULL, source TEXT NOT NULL, fields TEXT NOT NULL,
    number INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS renewals (
    conversation TEXT PRIMARY KEY, warmed TEXT NOT NULL, state TEXT NOT NULL, lines INTEGER NOT NULL,
    until DOUBLE PRECISION NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (session TEXT PRIMARY KEY, conversation TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS heads (
    key TEXT PRIMARY KEY, document TEXT NOT NULL, made DOUBLE PRECISION NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gateway_notebooks (
    identity TEXT PRIMARY KEY, tenant TEXT NOT NULL, version INTEGER NOT NULL, source TEXT NOT NULL, fields TEXT NOT NULL,
    number INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS notebook_conversations (
    notebook TEXT NOT NULL, conversation TEXT NOT NULL, PRIMARY KEY (notebook, conversation)
) WITHOUT ROWID;
CREATE TABLE secrets (name TEXT PRIMARY KEY, value BYTEA NOT NULL) WITHOUT ROWID;
"""


_NEVER_CHANGED = """
CREATE TRIGGER errata_are_never_changed BEFORE UPDATE ON errata BEGIN SELECT RAISE(ABORT, 'a line is never changed'); END;
"""


class StateUnavailableError(StorageError):
    """The state cannot be reached, or does not answer in time. The operation was not stored, or not confirmed."""


class Outcome(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """The number of rows that the statement wrote."""
        ...

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows that the statement found."""
        ...


class Transaction(Protocol):
    """Runs the statements of one transaction."""

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Outcome: ...


class State(ABC):
    """The state of one server, or of several that share it. Thread-safe."""

    remote: bool
    """Whether the state is reached over a network, so that calls may take long."""
    alone: bool
    """Whether no other server uses the state."""
    busy: bool = False
    """Whether an operation is running that makes all others wait for the disk."""

    @abstractmethod
    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, all of one moment.

        Raises:
            StateUnavailableError: the state cannot be reached.
        """

    @abstractmethod
    def write(self, *, locked: str = "", durable: bool = False) -> AbstractContextManager[Transaction]:
        """One transaction: the whole block is stored, or nothing if it raises. After it, the process may end at any
        time.

        Args:
            locked: a table that no other transaction may write meanwhile.
            durable: survive a loss of power even if a file's other transactions do not. A database decides that itself.

        Raises:
            StateUnavailableError: the state cannot be reached.
        """

    @abstractmethod
    def scrub(self) -> None:
        """Erase deleted data from a file that does not do so by itself. A database does it in its own time."""

    @abstractmethod
    def close(self) -> None:
        """Close the state."""

    def within(self, seconds: float) -> AbstractContextManager[None]:
        """Limit the total time of this thread's calls inside the block, if the state is reached over a network."""
        del seconds
        return nullcontext()


class FileState(State):
    """A state in a file. It runs one statement or transaction at a time."""

    remote = False
    alone = True

    def __init__(self, path: Path | None, *, durable: bool) -> None:
        """
        Args:
            path: the file, which is created if there is none; None keeps the state in memory.
            durable: whether a transaction survives a loss of power. It survives the end of the process in any case.

        Raises:
            InvalidArgumentError: the file cannot be used or has another version, or another server uses it.
        """
        self._lock = threading.RLock()
        self._durable = durable
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it contains text of prompts
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
        """See `State.rows`."""
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def write(self, *, locked: str = "", durable: bool = False) -> Iterator[sqlite3.Connection]:
        """See `State.write`. Transactions run one at a time, and a durable one never inside another."""
        with self._lock:
            if durable and not self._durable:
                self._connection.execute("PRAGMA synchronous = FULL")
                self.busy = True
                try:
                    with self.write() as run:
                        yield run
                finally:
                    self.busy = False
                    self._connection.execute("PRAGMA synchronous = NORMAL")
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it
                    self._connection.execute("ROLLBACK")
                raise

    def scrub(self) -> None:
        """See `State.scrub`. Deleted data is overwritten, and the log that the file is written from is emptied."""
        with self._lock:
            self.busy = True
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self.busy = False

    def close(self) -> None:
        """See `State.close`."""
        with self._lock:
            self._connection.close()

    def _open(self, durable: bool) -> None:
        self._connection.create_function("epoch", 0, time.time)
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        run("PRAGMA secure_delete = ON")  # a deleted notebook leaves no text behind
        run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with self.write():
            [(version,)] = run("PRAGMA user_version").fetchall()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(
                    f"it has format {version}, but this version of the software reads {VERSION}"
                )
            for statement in statements(new=version == 0):
                run(statement)
            run("DROP TABLE IF EXISTS rebases")  # replaced by `renewals`, which has a time
            if version == 0:
                run(_NEVER_CHANGED)
                run(f"PRAGMA user_version = {VERSION}")


def statements(*, new: bool) -> Iterator[str]:
    """The statements of the schema: all of them, or only those that were added without a new format version.

    Older software does not use what those create."""
    for statement in _SCHEMA.split(";\n"):
        if statement.strip() and (new or "IF NOT EXISTS" in statement):
            yield statement


def counted(kept: Sized) -> float:
    """The number of items that a state stores, for the metrics; NaN while the state cannot be reached."""
    try:
        return float(len(kept))
    except StateUnavailableError:
        return math.nan
