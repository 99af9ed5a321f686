"""Requests with a notebook's name as their model: found among all that go through a gateway, and planned."""

from __future__ import annotations

import logging
from functools import partial

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.headers import Headers
from programmable_kv.serve.notebooks.composing import Ask, Composer
from programmable_kv.serve.notebooks.shelf import BookShelf
from programmable_kv.serve.notebooks.source import PREFIX, busy, invalid
from programmable_kv.serve.notebooks.telling import BookRewriter, BookRewriting
from programmable_kv.serve.reading import collector_paused
from programmable_kv.serve.refusal import STATE_UNAVAILABLE, Refusal, RefusedError
from programmable_kv.serve.rewriting.body import Body, read
from programmable_kv.serve.rewriting.prompt import ROUTES
from programmable_kv.serve.rewriting.rewriter import Rewriting
from programmable_kv.serve.state import StateUnavailableError

_LOG = logging.getLogger("programmable_kv.serve")
_NAMED = PREFIX.encode()
_TRIES = 8
"""how often a request that edits overtake is planned again"""


class Asking:
    """Knows which requests are to notebooks."""

    def __init__(
        self, shelf: BookShelf, rewriter: BookRewriter, aside: Aside, composer: Composer | None = None
    ) -> None:
        self._shelf = shelf
        self._aside = aside
        self._rewriter = rewriter
        self._composer = composer

    async def begin(self, tenant: str, route: str, headers: Headers, data: bytes) -> Rewriting | None:
        """What is done with a request; None where it is to no notebook.

        Raises:
            RefusedError: there is no such notebook, or the request is not one that a notebook can answer.
        """
        if _NAMED not in data:
            return None
        begin = partial(self._begun, tenant, route, headers, data)
        return await self._aside.run_long(begin, undo=_abandoned)

    async def composed(self, work: Rewriting | None, data: bytes, ask: Ask) -> bytes:
        """What is sent: with the skills of a notebook named, where they stand in the prompt."""
        if self._composer is None or not isinstance(work, BookRewriting) or work.book is None or not work.book.skills:
            return data
        return await self._composer.composed(work, data, ask)

    def _begun(self, tenant: str, route: str, headers: Headers, data: bytes) -> Rewriting | None:
        with collector_paused():
            body = read(data)
        model = body.data.get("model") if body is not None else None
        if body is None or not isinstance(model, str) or not model.startswith(PREFIX):
            return None
        if route not in ROUTES:
            raise RefusedError(
                Refusal(
                    400, "unsupported_parameter", "a notebook is a conversation: ask it by one of the chat protocols"
                )
            )
        try:
            return self._planned(tenant, route, headers, body, model.removeprefix(PREFIX))
        except RefusedError:
            raise
        except StateUnavailableError as error:
            raise RefusedError(STATE_UNAVAILABLE) from error
        except UnicodeEncodeError as error:
            raise invalid("a text has half of a surrogate pair, which is no character: take it out") from error
        except Exception as error:  # a fault of ours: the client gets a typed error, the log its class and no text
            _LOG.error("a request to a notebook failed (%s)", type(error).__name__)
            raise RefusedError(Refusal(500, "internal_error", "the gateway failed at this request")) from error

    def _planned(self, tenant: str, route: str, headers: Headers, body: Body, identity: str) -> BookRewriting:
        """The plan for a request. The notebook is read, and then its conversation. Where it is edited in between, both are
        read again: another request may have told the new values in the conversation, and the old ones would follow them.
        """
        book = self._shelf.get(tenant, identity)
        for _ in range(_TRIES):
            work = self._rewriter.ask(route, headers, body, book)
            if not work.overtaken:
                return work
            latest = self._shelf.get(tenant, identity)
            if latest.version == book.version:
                return work  # another request went on with the conversation: this one tells nothing in it
            book = latest
        raise busy()


def _abandoned(work: Rewriting | None) -> None:
    if work is not None:
        work.by.abandoned(work)
