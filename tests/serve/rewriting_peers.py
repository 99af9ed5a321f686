"""A rewriter without sockets, and request bodies for it. It records what the upstream would get, request by request."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.address import DatabaseAddress
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.heads import HeadStore
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES
from programmable_kv.serve.rewriting.rewriter import Rewriter, Rewriting
from programmable_kv.serve.rewriting.rules import Rules, rules_of
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.states import open_state
from serve import places

RULES = "You are a shop's agent.\n" + "".join(
    f"- Rule {n}: say what holds, and nothing that was not asked.\n" for n in range(40)
)
CLOCK = rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}], "learn": False})


@dataclass
class Peer:
    """A rewriter, and the bodies that it sent."""

    mode: GatewayMode = GatewayMode.ERRATUM
    rules: Rules = CLOCK
    path: Path | None = None
    place: DatabaseAddress | None = None
    """The database that keeps the state, instead of the file."""
    sent: list[Any] = field(default_factory=list)
    works: list[Rewriting] = field(default_factory=list)
    rebase_after: int = 64
    rebases: list[tuple[str, str]] = field(default_factory=list)
    line_role: LineRole = LineRole.SYSTEM
    """The role is fixed, because there is no upstream that could be probed for it."""

    def __post_init__(self) -> None:
        self.state = open_state(self.place or places.now.at(self.path), durable=False)
        self.store, self.verdicts = ConversationStore(self.state, most=1000), Verdicts(self.state)
        told: Any = lambda *each: self.rebases.append(each)  # noqa: E731
        self.rewriter = Rewriter(
            self.store, self.verdicts, self.rules, self.mode, "http://upstream", rebased=told, rebase_after=self.rebase_after,
            heads=HeadStore(self.state), line_role=self.line_role,
        )  # fmt: skip

    def send(
        self, body: Any, *, session: str = "", tenant: str = "t", route: str = CHAT, status: int = 200,
        usage: Usage | None = None,
    ) -> Any:  # fmt: skip
        """Send a body. Returns the body that the upstream gets."""
        headers = ((b"x-session-id", session.encode()),) if session else ()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        work = self.rewriter.begin(tenant, route, headers, data)
        while self.rewriter.refused(work, status):
            pass
        self.rewriter.answered(work, status)
        self.rewriter.settle(work, usage)
        self.works.append(work)
        self.sent.append(json.loads(work.body))
        return self.sent[-1]

    def warmed(self, *, done: bool = True) -> Any:
        """End the warming that the latest request began, with success or not. Returns the body of the warming."""
        work = self.works[-1]
        assert work.warming is not None
        self.rewriter.warmed(work, done=done)
        return json.loads(work.warming.body)

    @property
    def action(self) -> str:
        return str(self.works[-1].plan.action)

    @property
    def why(self) -> str:
        return self.works[-1].plan.why

    @property
    def line(self) -> str:
        note = self.works[-1].plan.note
        return note.line if note is not None else ""


def chat(system: Any, *turns: Any, **other: Any) -> dict[str, Any]:
    """A Chat Completions body. Turns are alternating texts of user and assistant, or whole messages."""
    roles = ("user", "assistant")
    said = [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *said], **other}


def claude(system: Any, *turns: Any, **other: Any) -> dict[str, Any]:
    """A Messages body."""
    body = chat("", *turns, **other)
    return {"model": "m", "max_tokens": 9, "system": system, **other, "messages": body["messages"][1:]}


def codex(system: Any, *turns: Any, **other: Any) -> dict[str, Any]:
    """A Responses body. A turn given as a mapping is an item of any type."""
    return {"model": "m", "instructions": system, "input": chat("", *turns)["messages"][1:], **other}


def at(minute: str, rest: str = RULES) -> str:
    """A system prompt with a clock at the top."""
    return f"Now: 10:0{minute}\n{rest}"


def prefix(body: Any) -> list[Any]:
    """The texts of a body in the order in which a prefix cache reads them, without markers."""
    found = copy.deepcopy(body)
    system = found.get("system") or found.get("instructions")
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else list(system or [])
    items: list[Any] = [json.dumps([found.get("tools"), found.get("chat_template_kwargs")]), *blocks]
    for message in found.get("messages") or found["input"]:
        content = message.pop("content", None)
        items.append(json.dumps(message))
        items += content if isinstance(content, list) else [content]
    for item in items:
        if isinstance(item, dict):
            item.pop("cache_control", None)
    return [item if isinstance(item, str) else json.dumps(item) for item in items]


def extends(later: Any, earlier: Any) -> bool:
    """Whether the later request begins with the whole earlier one, byte for byte."""
    one, other = prefix(earlier), prefix(later)
    return other[: len(one)] == one


__all__ = [
    "CHAT",
    "CLOCK",
    "MESSAGES",
    "RESPONSES",
    "RULES",
    "Peer",
    "at",
    "chat",
    "claude",
    "codex",
    "extends",
    "prefix",
]
