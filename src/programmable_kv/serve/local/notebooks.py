"""Notebooks as a resource: made from messages with placeholders, their fields edited by version, forked and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from programmable_kv.account import Account
from programmable_kv.model_queue import ModelQueue
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.serve.local.kept import KeptNotebook, NotebookShelf
from programmable_kv.serve.local.tools import check_tools
from programmable_kv.serve.notebooks.source import (
    check_version,
    etag_of,
    field_of,
    full,
    new_identity,
    no_such_notebook,
    source_of,
    tools_differ,
)
from programmable_kv.serve.refusal import Refusal, RefusedError


@dataclass(slots=True)
class Entry:
    """One notebook of one tenant."""

    kept: KeptNotebook
    """as it is on disk"""
    notebook: Notebook | None = field(default=None, repr=False)
    """None after a restart, until it is used"""
    in_use: asyncio.Lock = field(default_factory=asyncio.Lock)
    """an answer that is drawn keeps edits waiting, and the other way round"""

    @property
    def tenant(self) -> str:
        return self.kept.tenant

    @property
    def identity(self) -> str:
        return self.kept.identity

    @property
    def version(self) -> int:
        """One more with every edit that changes a value."""
        return self.kept.version

    @property
    def etag(self) -> str:
        return etag_of(self.version)

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Check that a request's tools are the notebook's: its cached text names them.

        Raises:
            RefusedError: they are others.
        """
        if tools and list(tools) != (self.kept.source.get("tools") or []):
            raise tools_differ()

    def as_json(self, account: Account | None = None) -> dict[str, Any]:
        """As data; with what the latest operation cost where that is known."""
        found: dict[str, Any] = {
            "id": self.identity,
            "object": "notebook",
            "model": f"notebook:{self.identity}",
            "version": self.version,
            "fields": dict(self.kept.shown),
            "tokens": self.kept.tokens,
        }
        return (
            found if account is None else {**found, "account": {**asdict(account), "exactness": str(account.exactness)}}
        )


class NotebookStore:
    """The notebooks of all tenants. All work on a model goes through its queue."""

    def __init__(self, model: Model, queue: ModelQueue, shelf: NotebookShelf, *, most: int, wait_s: float) -> None:
        """
        Args:
            shelf: where they are kept. Those that it holds are there from the start, and computed when they are first used.
            most: how many notebooks are kept; to make more, delete some.
            wait_s: how long an operation waits for a notebook that is in use.
        """
        self._model = model
        self._queue = queue
        self._most = most
        self._wait_s = wait_s
        self._shelf = shelf
        self._entries = {kept.identity: Entry(kept) for kept in shelf.all()}
        self._making = 0

    def __len__(self) -> int:
        return len(self._entries)

    def of_tenant(self, tenant: str) -> list[Entry]:
        """A tenant's notebooks, in the order in which they were made."""
        return [entry for entry in self._entries.values() if entry.tenant == tenant]

    def get(self, tenant: str, identity: str) -> Entry:
        """
        Raises:
            RefusedError: the tenant has no such notebook.
        """
        entry = self._entries.get(identity)
        if entry is None or entry.tenant != tenant:
            raise no_such_notebook()
        return entry

    async def create(self, tenant: str, body: Mapping[str, Any]) -> tuple[Entry, Account]:
        """Make a notebook and prefill it.

        Raises:
            RefusedError: the body is none, or there are as many as there may be.
            ProgrammableKVError: the messages, fields or tools are refused.
        """
        given = source_of(body)
        identity = new_identity()
        with self._room():
            notebook = await self._queue.run(_made, self._model, given)
            kept = KeptNotebook(identity, tenant, 1, given, {}, dict(notebook.fields), len(notebook))
            return await self._add(Entry(kept, notebook)), notebook.last_account

    async def fork(self, entry: Entry) -> tuple[Entry, Account]:
        """An independent copy.

        Raises:
            RefusedError: there are as many as there may be, or the notebook is in use for too long.
        """
        with self._room():
            async with self.use(entry) as notebook:
                copy = await self._queue.run(notebook.fork)
                kept = replace(entry.kept, identity=new_identity())
            return await self._add(Entry(kept, copy)), copy.last_account

    async def edit(self, entry: Entry, fields: Mapping[str, Any], if_match: str | None, mode: str | None) -> Account:
        """Give fields new values. The same values again change nothing, and leave the version as it is.

        Raises:
            RefusedError: the notebook has another version than was expected, or is in use for too long.
            ProgrammableKVError: a field or a value is refused.
        """
        # Shielded: an edit that has begun runs to its end, and the version with it, whether or not the client stays.
        return await asyncio.shield(asyncio.ensure_future(self._edited(entry, fields, if_match, mode)))

    async def delete(self, entry: Entry, if_match: str | None) -> None:
        """Forget a notebook and its cache.

        Raises:
            RefusedError: as in `edit`.
        """
        async with self._locked(entry):
            check_version(entry.version, if_match)
            await asyncio.to_thread(self._shelf.remove, entry.identity)
            self._entries.pop(entry.identity, None)

    @asynccontextmanager
    async def use(self, entry: Entry) -> AsyncIterator[Notebook]:
        """A notebook for the length of the block. After a restart it is computed first.

        Raises:
            RefusedError: it is in use for too long, or was deleted meanwhile.
        """
        async with self._locked(entry):
            if entry.notebook is None:
                entry.notebook = await self._queue.run(_made, self._model, entry.kept.request())
            yield entry.notebook

    @asynccontextmanager
    async def _locked(self, entry: Entry) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._wait_s):
                await entry.in_use.acquire()
        except TimeoutError as error:
            raise RefusedError(Refusal(503, "notebook_busy", "the notebook is in use: try again", 1)) from error
        try:
            self.get(entry.tenant, entry.identity)
            yield
        finally:
            entry.in_use.release()

    async def _edited(self, entry: Entry, fields: Mapping[str, Any], if_match: str | None, mode: str | None) -> Account:
        async with self.use(entry) as notebook:
            check_version(entry.version, if_match)
            account = await self._queue.run(notebook.edit, dict(fields), mode=mode)
            shown = dict(notebook.fields)
            if shown != dict(entry.kept.shown):
                kept = replace(
                    entry.kept,
                    version=entry.version + 1,
                    values={**entry.kept.values, **fields},
                    shown=shown,
                    tokens=len(notebook),
                )
                try:
                    await asyncio.to_thread(self._shelf.change, kept)
                except BaseException:
                    entry.notebook = None  # what is on disk holds: it is computed again
                    raise
                entry.kept = kept
            return account

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Room for one more notebook, kept free while it is made."""
        if len(self._entries) + self._making >= self._most:
            raise full(self._most)
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _add(self, entry: Entry) -> Entry:
        await asyncio.to_thread(self._shelf.add, entry.kept)
        self._entries[entry.identity] = entry
        return entry


def _made(model: Model, source: Mapping[str, Any]) -> Notebook:
    """A notebook from what it is made from, prefilled."""
    fields = {name: field_of(name, value) for name, value in source["fields"].items()}
    notebook = Notebook.from_messages(
        model, source["messages"], fields=fields, tools=source["tools"], template_kwargs=source["template_kwargs"]
    )
    if source["tools"]:
        check_tools(model, source["tools"])
    notebook.prefill()
    return notebook
