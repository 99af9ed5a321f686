"""The handlers that create, edit, fork and delete a gateway's notebooks. A local server has the same routes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.endpoint import Call, Routing
from programmable_kv.serve.notebooks.book import (
    Book,
    changed,
    check_messages,
    check_size,
    declared,
    guard,
    located,
)
from programmable_kv.serve.notebooks.opening import check_tools
from programmable_kv.serve.notebooks.routes import notebook_routes
from programmable_kv.serve.notebooks.shelf import BookShelf
from programmable_kv.serve.notebooks.source import busy, check_version, invalid, new_identity, source_of
from programmable_kv.serve.notebooks.stored import StoredTexts
from programmable_kv.serve.notebooks.telling import BookRewriter, line_bytes
from programmable_kv.serve.rewriting.wording import new_token

_TRIES = 8
"""The most tries of an edit or deletion while other edits come first."""
_LONGEST_LINE = 8192
_MODES = ("erratum", "full")


class BookResource:
    """The handlers of the notebooks' routes. Each works in a thread, because a notebook may be as long as a request."""

    def __init__(
        self, shelf: BookShelf, rewriter: BookRewriter, stored: StoredTexts | None = None, *, most_bytes: int
    ) -> None:
        """
        Args:
            stored: the skills that notebooks may name; None if the gateway has no store.
            most_bytes: the most bytes of one notebook's values, in all of their places together.
        """
        self._shelf = shelf
        self._rewriter = rewriter
        self._stored = stored
        self._most_bytes = most_bytes

    async def create(self, call: Call) -> Response:
        """`POST /v1/notebooks`."""
        return await asyncio.to_thread(self._created, call)

    async def listed(self, call: Call) -> Response:
        """`GET /v1/notebooks`."""
        return await asyncio.to_thread(self._all, call)

    async def read(self, call: Call) -> Response:
        """`GET /v1/notebooks/{id}`."""
        return await asyncio.to_thread(lambda: self._told(self._book(call)))

    async def edit(self, call: Call) -> Response:
        """`PATCH /v1/notebooks/{id}/fields`."""
        mode = call.request.query_params.get("mode") or _MODES[0]
        if mode not in _MODES:
            raise InvalidArgumentError(
                f"a gateway's edit mode must be one of {', '.join(_MODES)}, got {mode!r:.40}: leave it out"
            )
        for _ in range(_TRIES):
            # An edit that has begun is completed even if the client leaves, because nothing stops a thread.
            found = await asyncio.to_thread(self._edited, call, mode)
            if found is not None:
                return found
        raise busy()

    async def fork(self, call: Call) -> Response:
        """`POST /v1/notebooks/{id}/fork`."""
        return await asyncio.to_thread(self._forked, call)

    async def delete(self, call: Call) -> Response:
        """`DELETE /v1/notebooks/{id}`."""
        for _ in range(_TRIES):
            if await asyncio.to_thread(self._removed, call):
                return Response(status_code=204)
        raise busy()

    def _created(self, call: Call) -> Response:
        source = source_of(call.body, "upstream_model", "skills")
        model = call.body.get("upstream_model")
        if not isinstance(model, str) or not model:
            raise invalid("upstream_model must be the name of a model of the upstream, as GET /v1/models lists it")
        check_messages(source["messages"])
        check_tools(source["tools"])
        source["upstream_model"] = model
        source["skills"] = self._skills(call.body.get("skills"), call.tenant)
        source["places"] = located(source)
        texts, types = declared(source)
        guard(texts, types, texts)
        book = Book(new_identity(), call.tenant, 1, source, new_token(), texts, texts)
        check_size(book.messages, {**texts, **book.skills}, self._most_bytes)
        self._shelf.add(book)
        return self._told(book, 201)

    def _all(self, call: Call) -> Response:
        found = [self._as_json(book) for book in self._shelf.of_tenant(call.tenant)]
        return JSONResponse({"object": "list", "data": found})

    def _edited(self, call: Call, mode: str) -> Response | None:
        """Edit the latest version. Returns None if another edit came first."""
        before = self._book(call)
        check_version(before.version, call.request.headers.get("if-match"))
        texts = changed(before, call.body)
        if texts == before.texts and (mode != "full" or before.base == texts):
            return self._told(before, account=_account(mode, "none", "the notebook has these values already", before))
        check_size(before.messages, {**texts, **before.skills}, self._most_bytes)
        book, used, why = _settled(replace(before, texts=texts), mode)
        changes = (book.texts, book.base) != (before.texts, before.base)
        book = replace(book, version=before.version + changes)
        if not self._shelf.change(book, before):
            return None
        return self._told(book, account=_account(mode, used, why, book))

    def _forked(self, call: Call) -> Response:
        book = replace(self._book(call), identity=new_identity())
        self._shelf.add(book)
        return self._told(book, 201)

    def _removed(self, call: Call) -> bool:
        book = self._book(call)
        check_version(book.version, call.request.headers.get("if-match"))
        return self._shelf.remove(book)

    def _skills(self, given: Any, tenant: str) -> dict[str, Any]:
        """Return the skills that a notebook names: placeholder -> skill. The notebook keeps their texts.

        Raises:
            RefusedError: the value is not an object of names, or this gateway has no store.
            UnknownSkillError: the store has no such skill that the tenant may name.
        """
        if given is None or given == {}:
            return {}
        if not isinstance(given, Mapping) or not all(isinstance(which, str) for which in given.values()):
            raise invalid('skills must be an object: {"PLACEHOLDER": "a skill\'s name or key"}')
        if self._stored is None:
            raise invalid("this gateway has no skill store: start it with --skills STORE")
        found = {which: self._stored.find(which, tenant) for which in set(given.values())}
        return {
            name: {"skill": which, "key": found[which].key, "text": found[which].text} for name, which in given.items()
        }

    def _book(self, call: Call) -> Book:
        return self._shelf.get(call.tenant, call.request.path_params["id"])

    def _as_json(self, book: Book, **more: Any) -> dict[str, Any]:
        return book.as_json(usage=asdict(self._rewriter.counted(book)), **more)

    def _told(self, book: Book, status: int = 200, **more: Any) -> Response:
        return JSONResponse(self._as_json(book, **more), status, {"etag": book.etag})


def book_routes(books: BookResource, routing: Routing) -> list[Route]:
    """The routes of a gateway's notebooks. Other paths and methods below them answer 404 and are not forwarded."""
    below = "/v1/notebooks/{rest:path}"
    return [
        *notebook_routes(books, routing),
        routing.nothing("/v1/notebooks", below),
        routing.nothing(below, below),
    ]


def _settled(book: Book, mode: str) -> tuple[Book, str, str]:
    """Return the notebook after an edit, the mode used, and why this is not the mode asked for.

    In mode `full`, new conversations begin with the latest values in the notebook's text. Conversations that have begun
    keep the text that was sent.
    """
    if mode == "full":
        return replace(book, base=book.texts), mode, ""
    told = line_bytes(book)
    room = sum(len(str(message.get("content"))) for message in book.messages)
    if told > _LONGEST_LINE or 2 * told > room + sum(map(len, book.base.values())):
        return replace(book, base=book.texts), "full", "the line would be longer than what it saves"
    return book, mode, ""


def _account(asked: str, used: str, why: str, book: Book) -> dict[str, Any]:
    """The account of an edit. Nothing is sent to the upstream before the next request."""
    return {"mode_asked": asked, "mode_used": used, "why": why, "line_bytes": line_bytes(book)}
