"""Decides what to do with each request of a rewriting route, stores what was sent, and measures its own gain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.explain.logs import conversation_name, session_name
from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.headers import Headers, readable, value_of
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.accepted import Accepted
from programmable_kv.serve.rewriting.body import read
from programmable_kv.serve.rewriting.conversation import Conversation, Form, Head, keys_of
from programmable_kv.serve.rewriting.forms import (
    LineRole,
    about,
    forms_of,
    head_role,
    is_behind_tool,
    lost_forms,
    open_to_lines,
)
from programmable_kv.serve.rewriting.heads import HeadStore, key_of
from programmable_kv.serve.rewriting.judge import Gain, Judge
from programmable_kv.serve.rewriting.matching import Known, Match, choose, match
from programmable_kv.serve.rewriting.plan import Action, Plan, compacted, plan, switched
from programmable_kv.serve.rewriting.prompt import ROUTES, Prompt, digest, prompt_of
from programmable_kv.serve.rewriting.rebase import LINES, Outcome, Warming
from programmable_kv.serve.rewriting.rendering import Probe
from programmable_kv.serve.rewriting.rules import Rules, Sharing
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.state import StateUnavailableError

_LOG = logging.getLogger("programmable_kv.serve")
REFUSALS = (400, 422, 500)
"""Statuses with which servers refuse a message's role. llama-server answers 500 if the chat template raises."""
_FAULT = 500


@dataclass(slots=True)
class Rewriting:
    """One request while it is processed."""

    tenant: str
    route: str
    plan: Plan
    original: bytes = field(repr=False)
    by: Rewriter = field(repr=False)
    """The rewriter that decides about this request."""
    model: str = ""
    session: str = ""
    """The client's own name for the conversation, or else for its user."""
    beginning: str = ""
    """The key of the conversation's first turn."""
    prompt: Prompt | None = field(default=None, repr=False)
    known: Known | None = field(default=None, repr=False)
    match: Match | None = field(default=None, repr=False)
    why: str = ""
    """Why no conversation was found that the request continues."""
    replaced: Conversation | None = field(default=None, repr=False)
    refused: list[Form] = field(default_factory=list)
    """Forms of a new line that the upstream refused for this request."""
    announcement_refused: bool = False
    as_it_came: bool = False
    """After a refusal: the request is sent once more without anything of the gateway's."""
    warming: Warming | None = field(default=None, repr=False)
    """The prefix to compute in the background once this request is answered."""
    skills: str = ""
    """What became of the skills in the request, if its notebook has any."""
    salt: str = ""
    """The client's own `cache_salt`."""
    head: str = ""
    """The key of the head that a conversation begins with, if others may begin with the same head."""

    @property
    def whose(self) -> tuple[str, str, str]:
        """Tenant, route and model."""
        return self.tenant, self.route, self.model

    @property
    def body(self) -> bytes:
        """The body that is sent upstream."""
        return self.original if self.plan.body is None else self.plan.body

    @property
    def rewritten(self) -> bool:
        return self.plan.body is not None


class Rewriter:
    """Rewrites requests in the modes `erratum` and `hoist`. Thread-safe."""

    def __init__(
        self,
        store: ConversationStore,
        verdicts: Verdicts,
        rules: Rules,
        mode: GatewayMode,
        upstream: str,
        tell: Callable[[str, int], None] = lambda _, __: None,
        rebased: Callable[[str, Outcome], None] = lambda _, __: None,
        *,
        rebase_after: int = LINES,
        heads: HeadStore | None = None,
        line_role: LineRole = LineRole.AUTO,
    ) -> None:
        """
        Args:
            mode: the mode of all routes for which `rules` gives none.
            upstream: the upstream's address. What the upstream accepts is stored under it.
            tell: called with a route and the tokens that rewriting one request gained, negative for a loss.
            rebased: called with a route and the outcome of a rebase there.
            rebase_after: number of lines after which a conversation is rebased.
            heads: heads that conversations may begin with; if None, each begins with its own.
            line_role: the role in which lines are sent.
        """
        self._line_role = line_role
        self._heads = heads
        self._rebased = rebased
        self._rebase_after = rebase_after
        self._store = store
        self._verdicts = verdicts
        self._rules = rules
        self._mode = mode
        self._tell = tell
        self.accepted = Accepted(verdicts, upstream)
        self.judge = Judge(self.accepted.decide, self.accepted.switch_off)

    def mode_of(self, route: str) -> GatewayMode:
        """The mode of a route."""
        found = self._rules.routes.get(route, self._mode)
        return GatewayMode.OBSERVE if found.rewrites and route not in ROUTES else found

    def begin(self, tenant: str, route: str, headers: Headers, data: bytes) -> Rewriting:
        """Plan a request, and store it as sent."""
        mode = self.mode_of(route)
        work = Rewriting(tenant, route, Plan(Action.FORWARDED, _why_not(mode)), data, self)
        if not mode.rewrites:
            return work
        if value_of(headers, b"content-encoding") not in (None, b"identity"):
            work.plan = Plan(Action.FORWARDED, "the body is compressed")
            return work
        body = read(data)
        prompt = prompt_of(route, body) if body is not None else None
        if body is None or prompt is None or not prompt.turns:
            work.plan = Plan(Action.FORWARDED, "the body is not a conversation that can be rewritten")
            return work
        work.prompt, work.model = prompt, prompt.model
        sent = {"headers": readable(headers)}
        work.session = session = session_name(sent, body.data)
        own = conversation_name(sent, body.data)  # other names separate conversations but do not identify one
        work.salt = salt = str(body.data.get("cache_salt") or "")
        whose = (tenant, route, prompt.model, session, salt)
        keys = keys_of(prompt, self._rules, *whose)
        work.beginning = keys[0]
        known = Known(
            self._rules, keys, bool(own), (), mode is GatewayMode.HOIST, (), self._rebase_after, digest(whose)
        )
        try:
            self._begin(work, known)
        except StateUnavailableError as error:
            _LOG.info("%s: forwarding a request unchanged: %s", route, error)
            work.plan, work.match = Plan(Action.FORWARDED, "the state cannot be reached"), None
        return work

    def _begin(self, work: Rewriting, known: Known) -> None:
        """Plan a request from what is known about its upstream and its tenant."""
        verdicts = self.accepted.found_out(work.tenant, work.route, work.model)
        if self.accepted.is_off(verdicts):
            work.plan = Plan(Action.FORWARDED, "rewriting is switched off here for now, because it did not pay")
            return
        owner = self._owner(work.tenant, work.route)
        known = replace(known, learned=self._verdicts.learned(owner))
        work.known = self._with_forms(known, work, verdicts)
        self._plan(work, owner)

    def _with_forms(self, known: Known, work: Rewriting, verdicts: Mapping[str, str]) -> Known:
        """`known`, with the forms that a line in this request may have."""
        assert work.prompt is not None
        forms = forms_of(work.prompt, verdicts, self._line_role)
        lost = lost_forms(work.prompt, verdicts)
        return replace(known, forms=forms, lost=lost, open=open_to_lines(work.prompt, verdicts, self._line_role))

    def probe_of(self, work: Rewriting) -> Probe | None:
        """What to ask the upstream to render, so that the role of lines in this conversation can be chosen. None if the
        role is configured, or no line can follow.
        """
        after = work.plan.after
        if self._line_role is not LineRole.AUTO or work.prompt is None or after is None or after.plain:
            return None
        return Probe(work.route, work.model, head_role(work.prompt))

    def abandoned(self, work: Rewriting) -> None:
        """Undo what was stored: the client left before anything was sent."""
        if work.warming is not None:
            self.warmed(work, done=False)
        self._store.take_back(work.plan)

    def refused(self, work: Rewriting, status: int) -> bool:
        """Handle an error from the upstream before it read the prompt. Returns whether another body can be tried."""
        if not work.rewritten or status not in REFUSALS or work.prompt is None or work.known is None:
            return False
        note = work.plan.note
        proven = note is None or self.accepted.is_proven(*work.whose, _about(work, note.form))
        if status == _FAULT and proven:
            return False  # the server's own fault
        if not self._store.take_back(work.plan):
            return False
        if note is not None and not proven:
            work.refused.append(note.form)
            left = tuple(form for form in work.known.forms if form not in work.refused)
            work.known = replace(work.known, forms=left)
            again = self._planned(work)
            if again.note is not None and self._store.commit(again):
                work.plan = again
                return True
        before = work.plan.before
        work.announcement_refused = before is None and not work.refused
        work.as_it_came = True
        work.plan = Plan(Action.RESET, "the upstream refused the rewritten request", None, before)
        return True

    def answered(self, work: Rewriting, status: int) -> None:
        """Record that the upstream accepted the request.

        A form that it refused before was refused for its role, if it accepted the same line in another form. If it
        accepted only the client's own request, that request may be the reason."""
        if not 200 <= status < 300 or work.prompt is None:
            return
        for form in work.refused:
            self.accepted.refused(*work.whose, _about(work, form), as_it_came=work.as_it_came)
        note = work.plan.note
        if note is not None:
            self.accepted.took(*work.whose, _about(work, note.form))
        if work.plan.after is None and work.plan.before is not None:
            self._store.end(work.plan.before)
        if work.plan.action is Action.REBASE and work.plan.before is not None:
            self._rebased(work.route, Outcome.SWITCHED)
        if (
            self._heads is not None
            and work.head
            and work.plan.action is Action.ANNOUNCED
            and work.plan.after is not None
        ):
            after = work.plan.after
            self._heads.keep(work.head, Head(after.head, after.order))
        if work.plan.before is None and work.plan.after is not None and work.plan.after.token:
            self.accepted.took_announcement(work.route, work.model)
        if work.announcement_refused:
            self.accepted.refused_announcement(*work.whose)
        self.judge.acted(work.tenant, work.route, work.model, work.plan)

    def settle(self, work: Rewriting, usage: Usage | None) -> Gain | None:
        """Evaluate the upstream's usage numbers. May be called from any thread."""
        try:
            gain = self.judge.judge(work.tenant, work.route, work.model, work.plan, len(work.body), usage)
        except StateUnavailableError as error:
            _LOG.warning("%s: could not store a verdict: %s", work.route, error)
            return None
        if gain is not None:
            self._tell(work.route, gain.tokens)
        return gain

    def as_json(self, tenant: str) -> dict[str, Any]:
        """What rewriting did for one tenant, and what was found out about the models that this tenant used."""
        found = {"routes": self.judge.as_json(tenant), "gained_money_estimate": self.judge.money(tenant)}
        try:
            return found | {
                "upstream": self.accepted.as_json(tenant, self.judge.used(tenant)),
                "learned": sum(len(self._verdicts.learned(self._owner(tenant, route))) for route in ROUTES),
            }
        except StateUnavailableError:
            return found | {"upstream": [], "learned": 0, "state": "cannot be reached now"}

    def _plan(self, work: Rewriting, owner: str) -> None:
        assert work.prompt is not None
        assert work.known is not None
        prompt = work.prompt
        candidates = self._store.candidates(work.known.keys)
        known = work.known = replace(work.known, seen=max((each.turns for each in candidates), default=0))
        others = self._store.begun(known.keys)
        matches = [match(each, prompt, known) for each in candidates]
        found, why = choose(matches, alone=others == 1, named=known.named, turns=len(known.keys))
        if not why and found is None and others:
            why = "an earlier message changed, or another conversation begins the same way"
        templates = next((each.templates for each in matches if each.templates), ())
        if templates:
            self._verdicts.learn(owner, templates)
            known = work.known = replace(known, learned=self._verdicts.learned(owner))
        if found is None and matches and known.named:
            work.replaced = next((each.conversation for each in matches if each.conversation.named), None)
        if found is None and not why and self._heads is not None and _shares(known):
            work.head = key_of(prompt, known.rules, known.learned, work.tenant, work.route, work.model, work.salt)
            known = work.known = replace(known, shared=self._heads.find(work.head))
        work.match, work.why = found, why
        work.plan = self._planned(work)
        ready = self._ready(found.conversation, prompt, known) if found is not None else None
        if found is not None and ready is not None:
            made = plan(prompt, ready, known, "")
            if made.before is not None:  # the request continues the warmed prefix
                work.match, work.plan = ready, switched(made, found.conversation)
        if not matches and known.named:
            latest = self._store.latest(known.whose)
            work.plan = (compacted(prompt, latest, known) if latest is not None else None) or work.plan
        self._commit(work, known.whose if known.named else "")

    def _commit(self, work: Rewriting, session: str = "") -> None:
        """Store a plan before it is carried out, and begin a rebase if one is due."""
        if not self._store.commit(work.plan, session):
            work.plan = Plan(Action.FORWARDED, "another request continued the conversation")
            return
        after, wanted = work.plan.after, work.plan.warming
        try:
            if wanted is not None and after is not None and self._store.begin_rebase(after, wanted.conversation):
                work.warming = wanted
        except StateUnavailableError as error:
            _LOG.info("%s: could not begin a rebase: %s", work.route, error)

    def _planned(self, work: Rewriting) -> Plan:
        """The plan for a request that was compared with the stored conversations."""
        assert work.prompt is not None
        assert work.known is not None
        return plan(work.prompt, work.match, work.known, work.why, work.replaced)

    def _ready(self, conversation: Conversation, prompt: Prompt, known: Known) -> Match | None:
        """The prefix that was warmed for a conversation, if the request continues it."""
        warmed = self._store.warmed(conversation, known.keys)
        found = match(warmed, prompt, known) if warmed is not None else None
        return found if found is not None and not found.refused else None

    def warmed(self, work: Rewriting, *, done: bool, usage: Usage | None = None) -> None:
        """Record whether the new prefix was computed. If not, nothing changes. May be called from any thread."""
        assert work.warming is not None
        self._store.end_rebase(work.warming.conversation, done=done)
        self._rebased(work.route, Outcome.WARMED if done else Outcome.FAILED)
        if usage is not None and usage.cached_known:
            spent = usage.tokens - usage.cached
            self.judge.spent(work.tenant, work.route, work.model, spent)
            self._tell(work.route, -spent)

    def _owner(self, tenant: str, route: str) -> str:
        return f"{tenant}\n{route}"


def _about(work: Rewriting, form: Form) -> str:
    """The name under which a verdict about a line at the end of this request is stored."""
    return about(form, behind_tool=work.prompt is not None and is_behind_tool(work.prompt))


def _shares(known: Known) -> bool:
    """Whether a conversation may begin with another one's head. With hoisting, heads are equal anyway."""
    sharing = known.rules.sharing
    learned = known.learned if sharing is Sharing.LEARNED else ()
    return sharing is not Sharing.NONE and not known.hoist and bool(known.rules.declared or learned)


def _why_not(mode: GatewayMode) -> str:
    return "no calibration covers it" if mode is GatewayMode.STRICT else ""
