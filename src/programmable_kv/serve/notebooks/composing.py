"""Finds the skills of a notebook in the tokens of a prompt, and names their places for the plugin inside of vLLM.

The upstream renders the prompt to token ids. If these do not contain every skill as it was compiled, the request names
none and is sent like any other, with the client's own salt.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from programmable_kv.errors import InvalidRequestError, StorageError, UnknownSkillError
from programmable_kv.serve.notebooks.book import HEAD_ROLES
from programmable_kv.serve.notebooks.stored import StoredText, StoredTexts
from programmable_kv.serve.notebooks.telling import BookRewriting
from programmable_kv.serve.rewriting.body import Body, Spot, read, written
from programmable_kv.serve.rewriting.prompt import CHAT
from programmable_kv.vllm_plugin.marks import SALT_PREFIX, Mark, Marks
from programmable_kv.vllm_plugin.matching import place

Ask = Callable[[str, bytes], Awaitable[bytes | None]]
"""Sends a body to a path of the upstream. Returns the answer's body; None if the answer is an error."""
_OPENING = "opening"
"""The name of the store's entries with which prompts may begin (`pkv vllm opening`)."""
_OF_TOKENIZE = ("model", "messages", "tools", "chat_template_kwargs")
_MOST = 1024
"""The number of heads for which the places of skills are remembered."""


class Composer:
    """Names the skills of prompts. Use it from one event loop."""

    def __init__(self, texts: StoredTexts) -> None:
        self._texts = texts
        self._known: OrderedDict[str, Marks] = OrderedDict()

    async def composed(self, work: BookRewriting, data: bytes, ask: Ask) -> bytes:
        """Return a body that names its skills and their places in the prompt. `work.skills` states what was done."""
        assert work.book is not None
        keys = [each["key"] for each in work.book.source["skills"].values()]
        body = read(data)
        if not keys or body is None:
            return data
        head = _head(work.route, body, work.book.identity)
        moves = any(each["role"] not in HEAD_ROLES for each in work.book.messages)  # fields in turns may move skills
        marks = None if moves else self._known.get(head)
        if marks is None:
            try:
                marks = await asyncio.to_thread(self._placed, keys, await ask(*_rendering(work.route, body)))
            except (InvalidRequestError, UnknownSkillError, StorageError) as error:
                work.skills = f"none; why={' '.join(str(error).split())[:400]}"
                return data
            self._known[head] = marks
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
        work.skills = f"named={len(marks.marks)}"
        own = body.data.get("cache_salt")
        parted = f"-{blake2b(json.dumps(own).encode(), digest_size=16).hexdigest()}" if own is not None else ""
        members = {"cache_salt": f"{SALT_PREFIX}{work.tenant}{parted}", "kv_transfer_params": marks.parameters}
        return _with(body, members)

    def _placed(self, keys: Sequence[str], rendered: bytes | None) -> Marks:
        """Find the skills, and the opening before them, in a rendered prompt.

        Raises:
            InvalidRequestError: the upstream does not render prompts, or this one does not contain a skill as compiled.
            UnknownSkillError: a skill is not in the store any more.
            StorageError: the store cannot be read.
        """
        ids = _tokens(rendered)
        found: list[Mark] = []
        skills = [(each, place(each.key, each.ids, ids, None)) for each in map(self._texts.of_key, keys)]
        skills.sort(key=lambda it: it[1].start)
        opening = self._opening(ids, skills[0][1].start)
        if opening is not None:
            found.append(Mark(opening.key, 0))
        after = 0
        for skill, span in skills:
            place(skill.key, skill.ids, ids, span.start, after=after)
            found.append(Mark(skill.key, span.start))
            after = span.stop
        return Marks(tuple(found))

    def _opening(self, ids: Sequence[int], stop: int) -> StoredText | None:
        """The longest opening in the store with which the prompt begins, and which fits before the token `stop`."""
        fitting = [
            each
            for each in self._texts.named(_OPENING)
            if len(each.ids) <= stop and tuple(ids[: len(each.ids)]) == each.ids
        ]
        return max(fitting, key=lambda each: len(each.ids), default=None)


def _rendering(route: str, body: Body) -> tuple[str, bytes]:
    """The path at which vLLM renders a prompt to token ids, and the body. Only Chat Completions' path always exists."""
    if route != CHAT:
        return f"{route}/render", body.text.encode()
    kept = {name: body.data[name] for name in _OF_TOKENIZE if name in body.data}
    return "/tokenize", json.dumps(kept).encode()


def _tokens(rendered: bytes | None) -> tuple[int, ...]:
    try:
        found = json.loads(rendered or b"")
        return tuple(map(int, found["token_ids"] if "token_ids" in found else found["tokens"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            "the upstream does not render prompts to token ids: it must be vLLM, started with --enable-scale-out for "
            "Messages and Responses. Skills are sent as text"
        ) from error


def _head(route: str, body: Body, notebook: str) -> str:
    """A digest of everything before the client's messages, which decides the places of a notebook's skills."""
    data = body.data
    listed = data.get("messages", data.get("input"))
    leading = []
    for message in listed if isinstance(listed, list) else ():
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer"):
            break
        leading.append(message)
    before = [
        data.get(name) for name in ("model", "system", "instructions", "tools", "chat_template_kwargs", "tool_choice")
    ]
    return blake2b(json.dumps([route, notebook, *before, leading]).encode(), digest_size=16).hexdigest()


def _with(body: Body, members: Mapping[str, Any]) -> bytes:
    """Set members of a body. Everything else stays byte for byte."""
    start = body.text.index("{") + 1
    new = "".join(f"{written(key)}:{written(value)}," for key, value in members.items() if key not in body.spots)
    changes = [(body.spots[key], written(value)) for key, value in members.items() if key in body.spots]
    return body.spliced([*changes, (Spot(start, start), new)])
