"""Finds requests whose model is the name of a notebook among all requests of a gateway, and plans them."""

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
"""The most plans for one request while edits of its notebook overtake it."""


class Asking:
    """Recognises and plans the requests to notebooks."""

    def __init__(
        self, shelf: BookShelf, rewriter: BookRewriter, aside: Aside, composer: Composer | None = None
    ) -> None:
        self._shelf = shelf
        self._aside = aside
        self._rewriter = rewriter
        self._composer = composer

    async def begin(self, tenant: str, route: str, headers: Headers, data: bytes) -> Rewriting | None:
        """Plan a request; None if it is not a request to a notebook.

        Raises:
            RefusedError: the tenant has no such notebook, the request does not fit a notebook, edits always come first,
                the state cannot be reached, or the gateway failed.
        """
        if _NAMED not in data:
            return None
        begin = partial(self._begun, tenant, route, headers, data)
        return await self._aside.run_long(begin, undo=_abandoned)

    async def composed(self, work: Rewriting | None, data: bytes, ask: Ask) -> bytes:
        """Return the body to send. If the notebook has skills, the body names them with their places in the prompt."""
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
                Refusal(400, "unsupported_parameter", "a notebook is a conversation: use one of the chat protocols")
            )
        try:
            return self._planned(tenant, route, headers, body, model.removeprefix(PREFIX))
        except RefusedError:
            raise
        except StateUnavailableError as error:
            raise RefusedError(STATE_UNAVAILABLE) from error
        except UnicodeEncodeError as error:
            raise invalid("a text has an unpaired surrogate: remove it") from error
        except Exception as error:  # a fault of ours: the client gets a typed error, the log its class and no text
            _LOG.error("a request to a notebook failed (%s)", type(error).__name__)
            raise RefusedError(Refusal(500, "internal_error", "the gateway failed to process this request")) from error

    def _planned(self, tenant: str, route: str, headers: Headers, body: Body, identity: str) -> BookRewriting:
        """Plan a request to a notebook. This reads the notebook, and then the conversation.

        If the notebook is edited in between, both are read again: another request may have stated the new values in the
        conversation, and this one would state the old values behind them.
        """
        book = self._shelf.get(tenant, identity)
        for _ in range(_TRIES):
            work = self._rewriter.ask(route, headers, body, book)
            if not work.overtaken:
                return work
            latest = self._shelf.get(tenant, identity)
            if latest.version == book.version:
                return work  # another request continued the conversation; this one states no values in it
            book = latest
        raise busy()


def _abandoned(work: Rewriting | None) -> None:
    if work is not None:
        work.by.abandoned(work)
