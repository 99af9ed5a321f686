"""Stores heads (tools and system prompt) that were sent: later conversations of the same tenant may begin with them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from programmable_kv.serve.rewriting.changes import may_hold
from programmable_kv.serve.rewriting.conversation import Head, Texts
from programmable_kv.serve.rewriting.prompt import Prompt, Unit, digest
from programmable_kv.serve.rewriting.rules import Found, Rules, Sharing
from programmable_kv.serve.state import State

_KEPT_S = 86400.0
"""Seconds for which conversations may begin with a head. After that, a new one is sent with the values of the day."""
_MOST = 1000
"""How many heads are kept: the latest."""
_FORGET_EVERY = 64
_DIGITS = re.compile(r"\d+")


class HeadStore:
    """The heads that conversations may begin with, one for each key. Thread-safe."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._kept = 0

    def find(self, key: str) -> Head | None:
        """The head that was sent under a key in the last day; None if there is none."""
        rows = self._state.rows("SELECT document FROM heads WHERE key = ? AND made > epoch() - ?", (key, _KEPT_S))
        if not rows:
            return None
        given = json.loads(rows[0][0])
        whole = given if isinstance(given, dict) else {"texts": given, "order": []}  # stored by an earlier version
        return Head(tuple(Texts(frame, base, base) for frame, base in whole["texts"]), tuple(whole["order"]))

    def keep(self, key: str, head: Head) -> None:
        """Store a head that an upstream accepted."""
        document = json.dumps({"texts": [[texts.frame, dict(texts.base)] for texts in head.texts], "order": head.order})
        with self._state.write() as run:
            run.execute(
                "INSERT INTO heads VALUES (?, ?, epoch()) "
                "ON CONFLICT (key) DO UPDATE SET document = excluded.document, made = excluded.made",
                (key, document),
            )
            if self._kept % _FORGET_EVERY == 0:
                run.execute("DELETE FROM heads WHERE made <= epoch() - ?", (_KEPT_S,))
                latest = "SELECT key FROM heads ORDER BY made DESC LIMIT ?"
                run.execute(f"DELETE FROM heads WHERE key NOT IN ({latest})", (_MOST,))
        self._kept += 1


def key_of(prompt: Prompt, rules: Rules, learned: Collection[str], *whose: str) -> str:
    """A key of all that two heads must have in common so that one may be sent for the other: everything except the
    order of the tools and values that may be shared. A value that may be shared only as a clock counts without its
    digits, so that two people's names give two keys.

    Args:
        learned: templates of lines that were seen to change repeatedly.
        whose: what separates heads with the same text, such as the tenant and the model.
    """
    lines = learned if rules.sharing is Sharing.LEARNED else ()
    texts = [
        (unit.frame, place, _skeleton(unit, place, text, rules, lines))
        for unit in prompt.head
        for place, text in unit.texts.items()
    ]
    return digest([whose, sorted(prompt.order) or prompt.tools, texts, sorted(prompt.dates.items())])


def _skeleton(unit: Unit, place: str, text: str, rules: Rules, learned: Collection[str]) -> str:
    parts: list[str] = []
    at = 0
    for value in rules.mask(unit, place, text).values:
        parts += [text[at : value.start], _kept_of(value)]
        at = value.stop
    found = "".join([*parts, text[at:]])
    if not learned:
        return found
    return "\n".join(_DIGITS.sub("#", line) if may_hold(line, learned) else line for line in found.split("\n"))


def _kept_of(value: Found) -> str:
    """The part of a value that two heads must have in common."""
    if value.rule.share is None:
        return _DIGITS.sub("#", value.value)
    return "" if value.rule.share else value.value
