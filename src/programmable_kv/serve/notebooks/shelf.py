"""Notebooks of a gateway in its state. Each call is one transaction; a change is on disk when it returns."""

from __future__ import annotations

import json
from typing import Any

from programmable_kv.serve.notebooks.book import Book
from programmable_kv.serve.notebooks.source import full, no_such_notebook
from programmable_kv.serve.rewriting.store import OF_CONVERSATIONS
from programmable_kv.serve.state import State

_COLUMNS = "identity, tenant, version, source, fields"
_CONVERSATIONS = "(SELECT conversation FROM notebook_conversations WHERE notebook = ?)"
_ABOUT_CONVERSATIONS = (
    f"DELETE FROM conversations WHERE identity IN {_CONVERSATIONS}",
    *(f"DELETE FROM {table} WHERE conversation IN {_CONVERSATIONS}" for table in OF_CONVERSATIONS),
)


class BookShelf:
    """All notebooks of a gateway. Each is read from the state when it is used, so a restarted gateway has them all."""

    def __init__(self, state: State, *, most: int) -> None:
        """
        Args:
            most: the most notebooks of all tenants together.
        """
        self._state = state
        self._most = most

    def __len__(self) -> int:
        return int(self._state.rows("SELECT count(*) FROM gateway_notebooks")[0][0])

    def of_tenant(self, tenant: str) -> list[Book]:
        """A tenant's notebooks, oldest first."""
        statement = f"SELECT {_COLUMNS} FROM gateway_notebooks WHERE tenant = ? ORDER BY number"
        return [_book(*row) for row in self._state.rows(statement, (tenant,))]

    def get(self, tenant: str, identity: str) -> Book:
        """
        Raises:
            RefusedError: the tenant has no such notebook.
        """
        statement = f"SELECT {_COLUMNS} FROM gateway_notebooks WHERE identity = ? AND tenant = ?"
        rows = self._state.rows(statement, (identity, tenant)) if "\0" not in identity else []  # no text has NUL
        if not rows:
            raise no_such_notebook()
        return _book(*rows[0])

    def add(self, book: Book) -> None:
        """Store a new notebook.

        Raises:
            RefusedError: the state has as many notebooks as it may have.
        """
        with self._state.write(durable=True, locked="gateway_notebooks") as run:
            [(count, last)] = run.execute("SELECT count(*), max(number) FROM gateway_notebooks").fetchall()
            if count >= self._most:
                raise full(self._most)
            run.execute(
                "INSERT INTO gateway_notebooks VALUES (?, ?, ?, ?, ?, ?)",
                (book.identity, book.tenant, book.version, json.dumps(book.source), _fields(book), (last or 0) + 1),
            )

    def change(self, book: Book, before: Book) -> bool:
        """Store new values of a notebook. Returns False if it was edited or deleted since `before` was read."""
        with self._state.write(durable=True) as run:
            statement = "UPDATE gateway_notebooks SET version = ?, fields = ? WHERE identity = ? AND version = ?"
            values = (book.version, _fields(book), book.identity, before.version)
            return bool(run.execute(statement, values).rowcount)

    def remove(self, book: Book) -> bool:
        """Delete a notebook and every conversation with it, so that nothing of them is left in the state.

        Returns False if the notebook was edited or deleted since it was read.
        """
        with self._state.write(durable=True) as run:
            statement = "DELETE FROM gateway_notebooks WHERE identity = ? AND version = ?"
            if not run.execute(statement, (book.identity, book.version)).rowcount:
                return False
            for each in _ABOUT_CONVERSATIONS:
                run.execute(each, (book.identity,))
        self._state.scrub()
        return True


def _book(identity: str, tenant: str, version: int, source: str, fields: str) -> Book:
    held: dict[str, Any] = json.loads(fields)
    return Book(identity, tenant, version, json.loads(source), held["token"], held["texts"], held["base"])


def _fields(book: Book) -> str:
    return json.dumps({"token": book.token, "texts": dict(book.texts), "base": dict(book.base)})
