"""Notebooks as a resource: made from messages with placeholders, their fields edited by version, forked and deleted."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import NoneType
from typing import Any

from programmable_kv.account import Account
from programmable_kv.model_queue import ModelQueue
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.fields import Field
from programmable_kv.serve.local.asks import checked_messages
from programmable_kv.serve.local.kept import KeptNotebook, NotebookShelf
from programmable_kv.serve.local.tools import check_tools
from programmable_kv.serve.refusal import Refusal, RefusedError

_OF_FIELD: Mapping[str, type] = {
    "value": object, "kind": str, "among": list, "at_least": float, "at_most": float, "charset": str, "max_length": int,
}  # fmt: skip
"""what may be said about a field. Whether the guard reads its values is not for a client to say"""
_OF_BODY = ("messages", "fields", "tools", "template_kwargs")
_PREFIX = "nb_"


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
        return f'"{self.version}"'

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Check that a request's tools are the notebook's: its cached text names them.

        Raises:
            RefusedError: they are others.
        """
        if tools and list(tools) != (self.kept.source.get("tools") or []):
            raise RefusedError(
                Refusal(
                    400,
                    "tools_differ",
                    "a notebook's tools are given when it is made: leave them out, or give the same",
                )
            )

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
            raise RefusedError(Refusal(404, "no_such_notebook", "there is no notebook with that id"))
        return entry

    async def create(self, tenant: str, body: Mapping[str, Any]) -> tuple[Entry, Account]:
        """Make a notebook and prefill it.

        Raises:
            RefusedError: the body is none, or there are as many as there may be.
            ProgrammableKVError: the messages, fields or tools are refused.
        """
        given = _source(body)
        identity = _PREFIX + secrets.token_hex(12)
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
                kept = replace(entry.kept, identity=_PREFIX + secrets.token_hex(12))
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
            _check_version(entry, if_match)
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
            _check_version(entry, if_match)
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
            raise RefusedError(
                Refusal(
                    429, "notebooks_full", f"{self._most} notebooks are kept at most: delete one that is not needed"
                )
            )
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _add(self, entry: Entry) -> Entry:
        await asyncio.to_thread(self._shelf.add, entry.kept)
        self._entries[entry.identity] = entry
        return entry


def _source(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook is made from, checked.

    Raises:
        RefusedError: the body is none.
    """
    if unknown := body.keys() - set(_OF_BODY):
        raise _invalid(f"a notebook has {', '.join(_OF_BODY)}; got {min(unknown)!r:.60}")
    fields = {} if body.get("fields") is None else body["fields"]
    if not isinstance(fields, Mapping):
        raise _invalid("fields is an object")
    tools, variables = body.get("tools"), body.get("template_kwargs")
    if not isinstance(tools, list | NoneType) or not isinstance(variables, Mapping | NoneType):
        raise _invalid("tools is a list, and template_kwargs an object")
    messages = checked_messages(body.get("messages"))
    for name, value in fields.items():
        _field(name, value)
    return {"messages": messages, "fields": fields, "tools": tools, "template_kwargs": variables}


def _made(model: Model, source: Mapping[str, Any]) -> Notebook:
    """A notebook from what it is made from, prefilled."""
    fields = {name: _field(name, value) for name, value in source["fields"].items()}
    notebook = Notebook.from_messages(
        model, source["messages"], fields=fields, tools=source["tools"], template_kwargs=source["template_kwargs"]
    )
    if source["tools"]:
        check_tools(model, source["tools"])
    notebook.prefill()
    return notebook


def _check_version(entry: Entry, if_match: str | None) -> None:
    if if_match is None or if_match.strip() == "*":
        return
    if entry.etag not in [each.strip() for each in if_match.split(",")]:
        raise RefusedError(
            Refusal(
                412, "version_changed", f"the notebook is at version {entry.version} now: read it, and decide again"
            )
        )


def _field(name: str, value: Any) -> Any:
    """A plain value, or an object that says more about it."""
    if not isinstance(value, Mapping):
        return value
    if "value" not in value or not all(_fits(key, each) for key, each in value.items()):
        raise _invalid(f"the field {name!r:.60} is a value, or an object with {', '.join(_OF_FIELD)}, each of its type")
    return Field(**value)


def _fits(key: str, value: Any) -> bool:
    kind = _OF_FIELD.get(key)
    if kind is None or (isinstance(value, bool) and kind in (int, float)):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _invalid(message: str) -> RefusedError:
    return RefusedError(Refusal(400, "invalid_request", message))
