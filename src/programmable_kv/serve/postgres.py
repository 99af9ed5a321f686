"""The state of several servers, in one PostgreSQL database.

No call waits for long: each has a time limit. While the database cannot be reached, calls fail at once, and one tries
again from time to time.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.address import DatabaseAddress
from programmable_kv.serve.state import VERSION, Outcome, State, StateUnavailableError, Transaction, statements

_LOG = logging.getLogger("programmable_kv.serve")
_CONNECTIONS = 16
_CALL_S = 5.0
"""Time limit of a query or a transaction, if `within` sets no other."""
_CONNECT_S = 2
_FIRST_CONNECT_S = 15
"""Time limit of a connection at the start, when nobody waits for an answer and the machine may be busy."""
_REST_S = 1.0
"""After a failure, no call reaches the database for so long; then one call tries."""
_FIRST_S = 30.0
"""Time limit at the start, when another server may be creating the tables."""
_LOCK = 7_368_566
"""Number of the advisory lock under which the tables are created."""
_SESSION = b"SET lock_timeout = '1s'; SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '10s'"
"""Limits in the database server, so that the open work of a disconnected gateway does not block the others."""
_NEVER_CHANGED = """
CREATE FUNCTION errata_are_never_changed() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'a line is never changed'; END $$;
CREATE TRIGGER errata_are_never_changed BEFORE UPDATE ON errata EXECUTE FUNCTION errata_are_never_changed()
"""
_PORTS = re.compile(r"[0-9,]*")
_FORMAT = "programmable_kv_format"


T = TypeVar("T")


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose calls end at a deadline, whatever the network does."""

    deadline = math.inf

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        left = max(0.0, self.deadline - time.monotonic())
        return super().wait(gen, interval, left if timeout is None and left < math.inf else timeout)


class PostgresState(State):
    """A state in a database. It runs as many calls at a time as it has connections."""

    remote = True
    alone = False

    def __init__(self, address: DatabaseAddress, *, rest_s: float = _REST_S) -> None:
        """
        Args:
            rest_s: seconds after a failure in which no call reaches the database.

        Raises:
            InvalidArgumentError: the database cannot be reached or used, or its state has another version.
        """
        known = _parts(address)
        self._password = str(known.get("password") or "")
        self.name = f"{known.get('host') or 'localhost'}:{known.get('port') or 5432}/{known.get('dbname') or ''}"
        """Where the database is, without user and password."""
        self._has_limit = "connect_timeout" in known
        self._connect_s = _FIRST_CONNECT_S
        defaults: dict[str, str | int] = {
            "application_name": "programmable-kv",
            "client_encoding": "utf8",
        }
        self._url = make_conninfo(address.url, **{key: value for key, value in defaults.items() if key not in known})
        self._rest_s = rest_s
        self._rests_until = 0.0
        self._limit = threading.local()
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_CONNECTIONS)
        self._idle: list[_Connection] = []
        self._closed = False
        try:
            with self.within(_FIRST_S):
                self._open()
                self._connect_s = _CONNECT_S
        except (psycopg.Error, StateUnavailableError) as error:
            raise InvalidArgumentError(
                f"cannot keep the state in the database {self.name}: {self._told(error.__cause__ or error)}. Give --state a "
                "database of its own that can be reached, and a user that may create tables in it"
            ) from None

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `State.rows`."""
        with self._place() as until:
            connection, outcome = self._first(statement, values, until)
            found = outcome.fetchall()
            self._give_back(connection)
            return found

    @contextmanager
    def write(self, *, locked: str = "", durable: bool = False) -> Iterator[Transaction]:
        """See `State.write`."""
        del durable
        with self._place() as until:
            connection, _ = self._first("BEGIN", (), until)
            try:
                run = _Run(connection)
                if locked:
                    run.execute(f"LOCK TABLE {locked} IN SHARE ROW EXCLUSIVE MODE")
                yield run
                run.execute("COMMIT")
            except psycopg.Error as error:
                self._failed(connection, error)
                raise
            except BaseException:
                connection.close()  # the server rolls back what was not committed
                raise
            self._give_back(connection)

    def scrub(self) -> None:
        """See `State.scrub`."""

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """See `State.within`."""
        self._limit.until = time.monotonic() + seconds
        try:
            yield
        finally:
            del self._limit.until

    def close(self) -> None:
        """See `State.close`."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _place(self) -> Iterator[float]:
        """Wait for a place among the running calls, and yield the call's deadline."""
        now = time.monotonic()
        until = getattr(self._limit, "until", now + _CALL_S)
        with self._lock:
            if self._closed:
                raise StateUnavailableError(f"the state in {self.name} is closed")
            if now < self._rests_until:
                raise self._unavailable("it could not be reached a moment ago")
            if self._rests_until:
                self._rests_until = now + _CONNECT_S  # this call tries; others do not wait for its result
        if until <= now or not self._places.acquire(timeout=until - now):
            raise self._unavailable("it does not answer in time")
        try:
            yield until
        finally:
            self._places.release()

    def _first(self, statement: str, values: Sequence[Any], until: float) -> tuple[_Connection, Outcome]:
        """Run a statement on an open connection, or on a new one if none is open or the server closed it meanwhile."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            kept = connection is not None
            if connection is None:
                connection = self._connected(until)
            connection.deadline = until
            try:
                outcome = _Run(connection).execute(statement, values)
            except psycopg.Error as error:
                if kept and connection.broken and time.monotonic() < until:
                    connection.close()
                    continue
                self._failed(connection, error)
                raise
            if self._rests_until:
                with self._lock:
                    self._rests_until = 0.0
                _LOG.warning("the state in %s can be reached again", self.name)
            return connection, outcome

    def _connected(self, until: float) -> _Connection:
        wait_s = max(1, min(self._connect_s, math.ceil(until - time.monotonic())))
        try:
            limited = self._url if self._has_limit else make_conninfo(self._url, connect_timeout=wait_s)
            connection = _Connection.connect(limited, autocommit=True)
        except psycopg.Error as error:
            self._failed(None, error)
            raise
        connection.deadline = until  # a pooler may accept a connection and then let it wait
        try:
            connection.execute(_SESSION)
        except psycopg.Error as error:
            self._failed(connection, error)
            raise
        return connection

    def _give_back(self, connection: _Connection) -> None:
        connection.deadline = math.inf
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def _failed(self, connection: _Connection | None, error: psycopg.Error) -> None:
        """Close a connection after an error. If the database is gone or silent, the next calls do not wait for it.

        Raises:
            StateUnavailableError: the statement itself did not cause the error.
        """
        lost = connection is None or connection.broken or time.monotonic() >= connection.deadline
        if connection is not None:
            connection.close()
        if lost:
            with self._lock:
                rested, self._rests_until = self._rests_until, time.monotonic() + self._rest_s
            if not rested:
                _LOG.warning("the state in %s cannot be reached (%s)", self.name, self._told(error))
        if isinstance(error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction):
            raise self._unavailable(self._told(error)) from error

    def _unavailable(self, why: str) -> StateUnavailableError:
        return StateUnavailableError(
            f"the state in {self.name} cannot be used: {why}. The gateway retries automatically"
        )

    def _told(self, error: BaseException) -> str:
        """An error's message in one line, without the password."""
        text = " ".join(str(error).split()) or type(error).__name__
        return text.replace(self._password, "***") if self._password else text

    def _open(self) -> None:
        """Create the tables, or check that they have this version's format."""
        with self.write() as run:
            run.execute(f"SET LOCAL lock_timeout = '{_FIRST_S:.0f}s'")  # another server may be making the tables
            run.execute("SELECT pg_advisory_xact_lock(?)", (_LOCK,))
            [(known,)] = run.execute("SELECT to_regclass(?)::text", (_FORMAT,)).fetchall()
            if known is not None:
                [(version,)] = run.execute(f"SELECT version FROM {_FORMAT}").fetchall()
                if version != VERSION:
                    raise InvalidArgumentError(
                        f"the state in {self.name} has format {version}, but this version of the software reads {VERSION}: "
                        "give --state another database, or use the version that made this one"
                    )
            for statement in statements(new=known is None):
                run.execute(statement)
            if known is None:
                run.execute(_NEVER_CHANGED)
                run.execute(f"CREATE TABLE {_FORMAT} (version INTEGER NOT NULL)")
                run.execute(f"INSERT INTO {_FORMAT} VALUES (?)", (VERSION,))


def _parts(address: DatabaseAddress) -> dict[str, Any]:
    """The parts of a URL, by name.

    Raises:
        InvalidArgumentError: the URL is not valid, or part of its password is parsed as another part. It is not shown.
    """
    try:
        known = conninfo_to_dict(address.url)
    except psycopg.Error:
        known = None
    if (
        known is None
        or "@" in f"{known.get('host')} {known.get('dbname')}"
        or not _PORTS.fullmatch(str(known.get("port", "")))
    ):
        raise InvalidArgumentError(
            "the state's URL is not a valid PostgreSQL URL: write postgresql://USER@HOST:PORT/DATABASE, and signs such as "
            "@, / and # in a password as %40, %2F and %23. You can put the password into PGPASSWORD instead"
        )
    return known


class _Run:
    """Runs statements that are written as `state.py` describes."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Outcome:
        return self._connection.execute(_translated(statement), values or None)


@cache
def _translated(statement: str) -> bytes:
    """A statement in PostgreSQL's syntax."""
    text = statement.replace("?", "%s").replace("epoch()", "extract(epoch FROM clock_timestamp())::float8")
    return text.replace(" WITHOUT ROWID", "").encode()
