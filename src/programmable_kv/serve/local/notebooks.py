"""Notebooks as a resource: created from messages with placeholders, edited by version, forked and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from programmable_kv.account import Account
from programmable_kv.model_queue import ModelQueue
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.serve.local.chat import refuse_strict
from programmable_kv.serve.local.kept import KeptNotebook, NotebookShelf
from programmable_kv.serve.local.tools import check_tools
from programmable_kv.serve.notebooks.source import (
    any_version,
    check_version,
    etag_of,
    field_of,
    full,
    new_identity,
    no_such_notebook,
    source_of,
    tools_differ,
    types_told,
)
from programmable_kv.serve.refusal import Refusal, RefusedError

_TRIES = 8
"""The most tries of an edit while other servers edit the same notebook first."""
_BUSY = Refusal(503, "notebook_busy", "the notebook is in use: try again", 1)


@dataclass(slots=True)
class Entry:
    """One notebook of one tenant."""

    kept: KeptNotebook
    """The notebook as the server last read it from the state or wrote it there."""
    notebook: Notebook | None = field(default=None, repr=False)
    """The computed notebook; None after a restart, until it is used."""
    computed: int = 0
    """The version whose values `notebook` has. Another server that shares the state may have made a later one."""
    in_use: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Locked while an answer is generated or an edit is made, so that they wait for each other."""

    @property
    def tenant(self) -> str:
        return self.kept.tenant

    @property
    def identity(self) -> str:
        return self.kept.identity

    @property
    def version(self) -> int:
        """The version, from 1. Every edit that changes a value adds one."""
        return self.kept.version

    @property
    def etag(self) -> str:
        return etag_of(self.version)

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Check that a request gives no tools or the notebook's own, because the cached text contains those.

        Raises:
            RefusedError: the request gives other tools.
        """
        if tools and list(tools) != (self.kept.source.get("tools") or []):
            raise tools_differ()

    def as_json(self, account: Account | None = None) -> dict[str, Any]:
        """The notebook as JSON data, with the latest operation's account if it is given."""
        found: dict[str, Any] = {
            "id": self.identity,
            "object": "notebook",
            "model": f"notebook:{self.identity}",
            "version": self.version,
            "fields": dict(self.kept.shown),
            "types": types_told(self.kept.source),
            "tokens": self.kept.tokens,
        }
        return (
            found if account is None else {**found, "account": {**asdict(account), "exactness": str(account.exactness)}}
        )


class NotebookStore:
    """The notebooks of all tenants. Every operation on the model goes through its queue."""

    def __init__(self, model: Model, queue: ModelQueue, shelf: NotebookShelf, *, most: int, wait_s: float) -> None:
        """
        Args:
            shelf: the notebooks in the state, which several servers may share. Each cache is computed at first use.
            most: the most notebooks in the state.
            wait_s: the seconds for which an operation waits for a notebook in use.
        """
        self._model = model
        self._queue = queue
        self._most = most
        self._wait_s = wait_s
        self._shelf = shelf
        self._entries: dict[str, Entry] = {}
        """id -> a notebook that this server has used, with its cache and lock"""
        self._making = 0

    def __len__(self) -> int:
        return len(self._shelf)

    async def of_tenant(self, tenant: str) -> list[Entry]:
        """A tenant's notebooks, oldest first.

        Raises:
            StateUnavailableError: the state cannot be reached. All methods below raise it too.
        """
        return [self._seen(kept) for kept in await asyncio.to_thread(self._shelf.of_tenant, tenant)]

    async def get(self, tenant: str, identity: str) -> Entry:
        """
        Raises:
            RefusedError: the tenant has no such notebook.
        """
        kept = await asyncio.to_thread(self._shelf.get, identity)
        if kept is None:
            self._entries.pop(identity, None)
        if kept is None or kept.tenant != tenant:
            raise no_such_notebook()
        return self._seen(kept)

    def _seen(self, kept: KeptNotebook) -> Entry:
        """The entry of a notebook that was just read. The entry may be newer, if an edit ended in the meantime."""
        entry = self._entries.setdefault(kept.identity, Entry(kept))
        if kept.version > entry.version:
            entry.kept = kept
        return entry

    async def create(self, tenant: str, body: Mapping[str, Any]) -> tuple[Entry, Account]:
        """Create a notebook and prefill it.

        Raises:
            RefusedError: the body does not describe a notebook, or the server has as many notebooks as it may keep.
            ProgrammableKVError: the messages, fields or tools are refused.
        """
        given = source_of(body)
        for tool in given["tools"] or ():
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping):
                refuse_strict(function)
        identity = new_identity()
        async with self._room():
            notebook = await self._queue.run(_made, self._model, given)
            kept = KeptNotebook(identity, tenant, 1, given, {}, dict(notebook.fields), len(notebook))
            return await self._add(Entry(kept, notebook, 1)), notebook.last_account

    async def fork(self, entry: Entry) -> tuple[Entry, Account]:
        """Create an independent copy of a notebook and its cache.

        Raises:
            RefusedError: the server has as many notebooks as it may keep, or the notebook was in use too long.
        """
        async with self._room():
            async with self.use(entry) as notebook:
                copy = await self._queue.run(notebook.fork)
                kept = replace(entry.kept, identity=new_identity())
            return await self._add(Entry(kept, copy, kept.version)), copy.last_account

    async def edit(self, entry: Entry, fields: Mapping[str, Any], if_match: str | None, mode: str | None) -> Account:
        """Give fields new values. If all values are the same as before, the version stays unchanged.

        Raises:
            RefusedError: the notebook has another version than expected, or was in use too long.
            ProgrammableKVError: a field or a value is refused.
        """
        # Shielded: an edit that has begun is completed and stored with its version, even if the client leaves.
        return await asyncio.shield(asyncio.ensure_future(self._edited(entry, fields, if_match, mode)))

    async def delete(self, entry: Entry, if_match: str | None) -> None:
        """Delete a notebook and its cache.

        Raises:
            RefusedError: as in `edit`.
        """
        async with self._locked(entry):
            check_version(entry.version, if_match)
            version = None if any_version(if_match) else entry.version
            removed = await asyncio.to_thread(self._shelf.remove, entry.identity, version=version)
            if not removed:  # another server was first
                await self.get(entry.tenant, entry.identity)
                check_version(entry.version, if_match)
            self._entries.pop(entry.identity, None)

    @asynccontextmanager
    async def use(self, entry: Entry) -> AsyncIterator[Notebook]:
        """Lock a notebook for the block. After a restart, or an edit on another server, its cache is computed first.

        Raises:
            RefusedError: the notebook was in use too long, or was deleted in the meantime.
        """
        async with self._locked(entry):
            if entry.notebook is None or entry.computed != entry.version:
                kept, entry.notebook = entry.kept, None
                entry.notebook = await self._queue.run(_made, self._model, kept.request())
                entry.computed = kept.version
            yield entry.notebook

    @asynccontextmanager
    async def _locked(self, entry: Entry) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._wait_s):
                await entry.in_use.acquire()
        except TimeoutError as error:
            raise RefusedError(_BUSY) from error
        try:
            await self.get(entry.tenant, entry.identity)
            yield
        finally:
            entry.in_use.release()

    async def _edited(self, entry: Entry, fields: Mapping[str, Any], if_match: str | None, mode: str | None) -> Account:
        for _ in range(_TRIES):
            account = await self._tried(entry, fields, if_match, mode)
            if account is not None:
                return account
        raise RefusedError(_BUSY)

    async def _tried(
        self, entry: Entry, fields: Mapping[str, Any], if_match: str | None, mode: str | None
    ) -> Account | None:
        """Edit the latest version. Returns None if another server made a later one in the meantime."""
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
                    changed = await asyncio.to_thread(self._shelf.change, kept, version=entry.version)
                except BaseException:
                    entry.notebook = None  # the state keeps the old values: the cache is computed again from them
                    raise
                if not changed:
                    entry.notebook = None
                    return None
                entry.kept, entry.computed = kept, kept.version
            return account

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """Reserve room for one more notebook of this server while the block creates it."""
        kept = await asyncio.to_thread(self._shelf.identities)
        for gone in self._entries.keys() - kept:  # deleted on another server
            if not self._entries[gone].in_use.locked():
                del self._entries[gone]
        if len(kept) + self._making >= self._most:
            raise full(self._most)
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _add(self, entry: Entry) -> Entry:
        if not await asyncio.to_thread(self._shelf.add, entry.kept, most=self._most):
            raise full(self._most)  # another server took the room
        self._entries[entry.identity] = entry
        return entry


def _made(model: Model, source: Mapping[str, Any]) -> Notebook:
    """Create a notebook from its source, and prefill it."""
    fields = {name: field_of(name, value) for name, value in source["fields"].items()}
    notebook = Notebook.from_messages(
        model, source["messages"], fields=fields, tools=source["tools"], template_kwargs=source["template_kwargs"]
    )
    if source["tools"]:
        check_tools(model, source["tools"])
    notebook.prefill()
    return notebook
