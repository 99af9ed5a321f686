"""Plans requests to a notebook: the notebook's text as it was sent first, and new values in lines.

Each request is first written as a client without notebooks would write it, with the latest values in their places. The
gateway sends this form if it cannot use lines. Otherwise it uses the mechanism of mode `erratum`, with the fields as
declared pieces. The changes follow from the values, never from comparing texts.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from programmable_kv.explain.logs import session_name
from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.headers import Headers, readable
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.notebooks.book import Book
from programmable_kv.serve.notebooks.opening import Own, marked, own_of, places_of, request_of
from programmable_kv.serve.notebooks.source import invalid
from programmable_kv.serve.rewriting.body import Body
from programmable_kv.serve.rewriting.changes import Change
from programmable_kv.serve.rewriting.conversation import Conversation, Texts, keys_of
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.judge import Gain
from programmable_kv.serve.rewriting.matching import Known, Match
from programmable_kv.serve.rewriting.plan import Action, Plan, plan, switched
from programmable_kv.serve.rewriting.prompt import Prompt, Unit, prompt_of
from programmable_kv.serve.rewriting.rebase import LINES, Outcome
from programmable_kv.serve.rewriting.rewriter import Rewriter, Rewriting
from programmable_kv.serve.rewriting.rules import Rule, Rules
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.rewriting.wording import line_of

_MOST_COUNTED = 10_000
"""The number of notebooks whose usage is summed."""


@dataclass(slots=True)
class Counted:
    """The upstream's usage numbers, summed over a notebook's requests since the gateway started."""

    requests: int = 0
    counted_by_upstream: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class BookRewriting(Rewriting):
    """One request to a notebook."""

    book: Book | None = field(default=None, repr=False)
    root: Conversation | None = field(default=None, repr=False)
    """The notebook as a conversation without turns of a client. Each new conversation continues it."""
    overtaken: bool = False
    """Whether the plan was dropped because the notebook or the conversation changed after they were read."""


class BookRewriter(Rewriter):
    """Plans requests to notebooks. Thread-safe.

    Its verdicts about an upstream are separate from those of the gateway's modes, so neither affects the other.
    """

    def __init__(
        self,
        store: ConversationStore,
        verdicts: Verdicts,
        upstream: str,
        tell: Callable[[str, int], None] = lambda _, __: None,
        rebased: Callable[[str, Outcome], None] = lambda _, __: None,
        *,
        rebase_after: int = LINES,
        line_role: LineRole = LineRole.AUTO,
    ) -> None:
        """The arguments are those of `Rewriter`, without rules and a mode."""
        super().__init__(
            store, verdicts, Rules(learn=False), GatewayMode.ERRATUM, f"notebooks at {upstream}", tell, rebased,
            rebase_after=rebase_after, line_role=line_role,
        )  # fmt: skip
        self._counted: dict[str, Counted] = {}
        self._lock = threading.Lock()

    def ask(self, route: str, headers: Headers, body: Body, book: Book) -> BookRewriting:
        """Plan a request to a notebook, and store the conversation as if it were sent.

        Raises:
            RefusedError: the request does not have the form of its protocol, or gives other tools than the notebook's.
        """
        whole = request_of(route, body, book, book.texts)
        prompt = prompt_of(route, whole)
        if prompt is None or not prompt.turns:
            raise invalid(
                "the request is not a valid conversation of its protocol, or continues a conversation stored on a server"
            )
        nothing = Plan(Action.FORWARDED, "rewriting is switched off here for now, because it did not pay")
        work = BookRewriting(book.tenant, route, nothing, whole.text.encode(), self, prompt.model, book=book)
        work.prompt = prompt
        sent = {"headers": readable(headers)}
        work.session = session_name(sent, body.data)
        verdicts = self.accepted.found_out(book.tenant, route, prompt.model)
        if self.accepted.is_off(verdicts):
            return work
        own = _Renderings(route, body, book)
        if not own.steady:
            work.plan = Plan(Action.FORWARDED, "a field with an empty value has no place in this request")
            return work
        rules = Rules(tuple(Rule("a field", None, path) for _, path in own.places), learn=False)
        salt = str(body.data.get("cache_salt") or "")
        keys = keys_of(prompt, rules, book.tenant, route, prompt.model, work.session, salt, book.identity)
        work.beginning = keys[0] if keys else ""
        known = Known(rules, keys, bool(work.session), rebase_after=self._rebase_after)
        work.known = known = self._with_forms(known, work, verdicts)
        matches = [own.match(each, prompt) for each in self._store.candidates(keys)]
        found = next((each for each in matches if not each.refused), None)
        if found is not None:
            work.match = found
        else:
            work.root = _root(own.of(book.base), prompt, known, book)
            work.match = Match(work.root, own.changes(book.base))
        work.plan = self._planned(work)
        warmed = self._store.warmed(found.conversation, keys) if found is not None else None
        ready = own.match(warmed, prompt) if warmed is not None else None
        if found is not None and ready is not None and not ready.refused:
            made = plan(prompt, ready, known, "")
            if made.before is not None:
                work.match, work.plan = ready, _of_book(switched(made, found.conversation), book)
        self._commit(work)
        return work

    def settle(self, work: Rewriting, usage: Usage | None) -> Gain | None:
        """Take the upstream's usage numbers, and add them to the notebook's sums."""
        assert isinstance(work, BookRewriting)
        assert work.book is not None
        with self._lock:
            counted = self._counted.pop(work.book.identity, None) or Counted()
            self._counted[work.book.identity] = counted
            if len(self._counted) > _MOST_COUNTED:
                del self._counted[next(iter(self._counted))]
            counted.requests += 1
            if usage is not None:
                counted.counted_by_upstream += 1
                counted.input_tokens += usage.tokens
                counted.cached_tokens += usage.cached
        return Rewriter.settle(self, work, usage)

    def counted(self, book: Book) -> Counted:
        """The sums of the upstream's usage numbers for a notebook's requests."""
        return self._counted.get(book.identity, Counted())

    def _commit(self, work: Rewriting, session: str = "") -> None:
        assert isinstance(work, BookRewriting)
        planned = work.plan
        Rewriter._commit(self, work, session)
        work.overtaken = work.plan is not planned

    def _planned(self, work: Rewriting) -> Plan:
        assert isinstance(work, BookRewriting)
        assert work.book is not None
        made = _of_book(Rewriter._planned(self, work), work.book)
        return replace(made, before=None) if made.before is not None and made.before is work.root else made


class _Renderings:
    """The notebook's own units with several sets of values, each rendered once."""

    def __init__(self, route: str, body: Body, book: Book) -> None:
        self._asked = (route, body, book)
        self._made: dict[str, Own] = {}
        base, mark = self.of(book.base), self.of(marked(book))
        self.steady = _frames(base) == _frames(mark) == _frames(self.of(book.texts))
        """Whether all sets of values give the same frames. An empty value may remove a text block with its place."""
        self.places = places_of((*base.head, *base.turns), (*mark.head, *mark.turns)) if self.steady else []
        """Every text that contains a field, as (unit, path of the text)."""
        self._types = book.types

    def of(self, values: Mapping[str, str]) -> Own:
        """The units with a set of values."""
        key = repr(sorted(values.items()))
        if key not in self._made:
            self._made[key] = own_of(*self._asked, values)
        return self._made[key]

    def changes(self, told: Mapping[str, str]) -> tuple[Change, ...]:
        """The latest values that differ from the values that a reader was told."""
        _, _, book = self._asked
        return tuple(
            Change(name, self._types[name].told(text), True, "value", True, self._trusted(name))
            for name, text in book.texts.items()
            if told.get(name) != text
        )

    def match(self, conversation: Conversation, prompt: Prompt) -> Match:
        """Match a request to a conversation. They match if they differ only in values, and the old values are known."""
        _, _, book = self._asked
        if conversation.notebook != book.identity or conversation.values.keys() != book.texts.keys():
            return Match(conversation, refused="it belongs to another notebook")
        own = self.of(conversation.values)
        same = (
            _frames(own) == _frames(self.of(book.texts))
            and conversation.tools == prompt.tools
            and dict(conversation.dates.last) == dict(prompt.dates)
            and [(kept.frame, kept.last) for kept in conversation.head]
            == [(unit.frame, unit.texts) for unit in _head(own, prompt)]
            and all(kept.last == own.turns[at].texts for at, kept in conversation.inside.items())
        )
        if not same:
            return Match(conversation, refused="the system prompt, the tools or a date of the chat template changed")
        return Match(conversation, self.changes(conversation.values))

    def _trusted(self, name: str) -> bool:
        """Whether a field has a place in the system prompt."""
        _, _, book = self._asked
        others = self.of({**book.base, name: marked(book)[name]})
        return bool(places_of(self.of(book.base).head, others.head))


def _frames(own: Own) -> tuple[list[str], list[str]]:
    return [unit.frame for unit in own.head], [unit.frame for unit in own.turns]


def line_bytes(book: Book) -> int:
    """The size of the line that states the latest values to a new conversation, in bytes; 0 if there is no line."""
    types = book.types
    told = [
        Change(name, types[name].told(text), True, "value")
        for name, text in book.texts.items()
        if book.base[name] != text
    ]
    return len(line_of(book.token, told).encode()) if told else 0


def _root(own: Own, prompt: Prompt, known: Known, book: Book) -> Conversation:
    """The notebook, with the values in its text, as a conversation that a request can continue."""
    inside = {
        at: _texts(unit)
        for at, unit in enumerate(own.turns)
        if any(known.rules.mask(unit, place, text).values for place, text in unit.texts.items())
    }
    count, identity = len(own.turns), secrets.token_hex(8)
    return Conversation(
        identity, version=0, key=known.keys[count - 1] if count else "", turns=count, tools=prompt.tools,
        head=tuple(map(_texts, _head(own, prompt))), token=book.token if book.texts else "", named=known.named, inside=inside,
        origin=identity, dates=Texts("", prompt.dates, prompt.dates),
    )  # fmt: skip


def _head(own: Own, prompt: Prompt) -> tuple[Unit, ...]:
    """The units before the conversation: the notebook's own, and the client's system messages."""
    return (*own.head, *prompt.head[len(own.head) :])


def _texts(unit: Unit) -> Texts:
    return Texts(unit.frame, unit.texts, unit.texts)


def _of_book(made: Plan, book: Book) -> Plan:
    """Mark the conversation that a plan stores as the notebook's, with the latest values."""
    if made.after is None:
        return made
    after = replace(made.after, notebook=book.identity, values=book.texts)
    made = replace(made, notebook_version=book.version)
    if made.warming is None or book.skills:  # a prefix with skills is not warmed, because vLLM loads the skills
        return replace(made, after=after, warming=None)
    conversation = replace(made.warming.conversation, notebook=book.identity, values=book.texts)
    return replace(made, after=after, warming=replace(made.warming, conversation=conversation))
