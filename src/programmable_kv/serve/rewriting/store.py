"""Conversations, their lines, and what was found out about upstreams, in the state's file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from programmable_kv.explain.difference import common_length
from programmable_kv.serve.rewriting.conversation import Conversation, Form, Note, Texts
from programmable_kv.serve.rewriting.plan import Plan
from programmable_kv.serve.state import State

_MOST_KEYS = 500
"""beginnings of one conversation that are looked for: the longest"""
_OFTEN = 2
"""changes of one line after which it counts as one that changes repeatedly"""
_FORGET_EVERY = 64
"""new conversations between two clean-ups"""
_OF_CONVERSATIONS = ("sessions", "rebases", "errata")
"""tables of what belongs to one"""
_SET_KEY = "UPDATE conversations SET key = ? WHERE identity = ?"
_FORGET_REBASE = "DELETE FROM rebases WHERE conversation = ?"
_ENDED = ""
"""the key of conversations that were replaced after a reset, and of prefixes that are not in use yet"""
_WARMING, _READY, _FAILED = "warming", "ready", "failed"
_CONVERSATIONS_S = 7 * 86400.0
"""what was silent for longer is forgotten"""
_BEGINNINGS_S = 30 * 86400.0


class ConversationStore:
    """What a rewriting gateway remembers. Each write is one transaction."""

    def __init__(self, state: State, *, most: int) -> None:
        """
        Args:
            most: conversations that are kept; those that were silent longest are forgotten first.
        """
        self._state = state
        self._most = most
        self._made = 0
        self._templates: dict[str, dict[str, int]] = {}
        for owner, template, seen in state.rows("SELECT owner, template, seen FROM templates"):
            self._templates.setdefault(owner, {})[template] = seen
        self._verdicts: dict[tuple[str, str], tuple[str, float | None]] = {
            (subject, about): (verdict, until)
            for subject, about, verdict, until in state.rows("SELECT subject, about, verdict, until FROM verdicts")
        }
        with state.write() as run:  # whoever computed it is gone
            run.execute("DELETE FROM rebases WHERE state = ?", (_WARMING,))
        self._forget()
        self._forget_orphans()

    def __len__(self) -> int:
        return int(self._state.rows("SELECT count(*) FROM conversations")[0][0])

    def candidates(self, keys: Sequence[str]) -> list[Conversation]:
        """What a request with these beginnings may go on with: the conversations with the most turns, the latest first."""
        wanted = keys[-_MOST_KEYS:]
        marks = ",".join("?" * len(wanted))
        rows = self._state.rows(
            f"SELECT identity, key, version, document FROM conversations WHERE key IN ({marks}) ORDER BY used DESC",
            wanted,
        )
        length = {key: turns for turns, key in enumerate(keys, start=1)}
        longest = max((length[row[1]] for row in rows), default=0)
        return [self._read(*row) for row in rows if length[row[1]] == longest]

    def begun(self, keys: Sequence[str]) -> int:
        """How many conversations were first seen with the same turns: the most, over all beginnings of this one."""
        marks = ",".join("?" * len(keys[:_MOST_KEYS]))
        statement = f"SELECT max(conversations) FROM beginnings WHERE key IN ({marks})"
        return int(self._state.rows(statement, keys[:_MOST_KEYS])[0][0] or 0)

    def latest(self, session: str) -> Conversation | None:
        """The conversation that a named session went on with last."""
        rows = self._state.rows(
            "SELECT identity, key, version, document FROM sessions JOIN conversations ON identity = conversation "
            "WHERE session = ?",
            (session,),
        )
        return self._read(*rows[0]) if rows else None

    def commit(self, plan: Plan, session: str = "") -> bool:
        """Remember what is about to be sent. False where another request went on with the conversation meanwhile.

        Args:
            session: under which name the conversation is found again when its turns are new; empty: under none.
        """
        after, before = plan.after, plan.before
        if after is None:
            return True
        now = time.time()
        with self._state.write() as run:
            if plan.replaced is not None:
                run.execute(_SET_KEY, (_ENDED, plan.replaced.identity))
                run.execute(_FORGET_REBASE, (plan.replaced.identity,))
            if before is None:
                run.execute(
                    "INSERT INTO conversations VALUES (?, ?, ?, ?, ?)",
                    (after.identity, after.key, after.version, _document(after), now),
                )
                if after.origin == after.identity:
                    run.execute(
                        "INSERT INTO beginnings VALUES (?, 1, ?) "
                        "ON CONFLICT (key) DO UPDATE SET conversations = conversations + 1, used = excluded.used",
                        (after.key, now),
                    )
            else:
                changed = run.execute(
                    "UPDATE conversations SET key = ?, version = ?, document = ?, used = ? WHERE identity = ? AND version = ?",
                    (after.key, after.version, _document(after), now, before.identity, before.version),
                ).rowcount
                if not changed:
                    return False
            if session:
                run.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (session, after.identity))
            if plan.note is not None:
                note, number = plan.note, len(after.notes) - 1
                run.execute(
                    "INSERT INTO errata VALUES (?, ?, ?, ?, ?)",
                    (after.identity, number, note.after, note.form, note.line),
                )
        if before is None:
            self._made += 1
            if self._made % _FORGET_EVERY == 0:
                self._forget()
        return True

    def take_back(self, plan: Plan) -> bool:
        """Undo a commit: the upstream refused the request, so that nothing was sent. False where it was built on meanwhile."""
        after, before = plan.after, plan.before
        if after is None:
            return True
        with self._state.write() as run:
            found = run.execute("SELECT version FROM conversations WHERE identity = ?", (after.identity,)).fetchall()
            if found != [(after.version,)]:
                return False
            if plan.note is not None:
                run.execute(
                    "DELETE FROM errata WHERE conversation = ? AND number = ?", (after.identity, len(after.notes) - 1)
                )
            if plan.replaced is not None:
                run.execute(_SET_KEY, (plan.replaced.key, plan.replaced.identity))
            if before is None:
                run.execute("DELETE FROM conversations WHERE identity = ?", (after.identity,))
                if after.origin == after.identity:
                    run.execute("UPDATE beginnings SET conversations = conversations - 1 WHERE key = ?", (after.key,))
            else:
                run.execute(
                    "UPDATE conversations SET key = ?, version = ?, document = ? WHERE identity = ?",
                    (before.key, before.version, _document(before), before.identity),
                )
        return True

    def begin_rebase(self, conversation: Conversation, warmed: Conversation) -> bool:
        """Remember that a new prefix of a conversation is being computed. False where one is, was, or failed a short while ago.

        Until it is switched to, no request goes on with it.
        """
        lines = len(conversation.notes)
        with self._state.write() as run:
            run.execute(
                "DELETE FROM rebases WHERE conversation = ? AND state = ? AND lines * 1.5 < ?",
                (conversation.identity, _FAILED, lines),
            )
            begun = run.execute(
                "INSERT OR IGNORE INTO rebases VALUES (?, ?, ?, ?)",
                (conversation.identity, warmed.identity, _WARMING, lines),
            ).rowcount
            if begun:
                run.execute(
                    "INSERT INTO conversations VALUES (?, ?, ?, ?, ?)",
                    (warmed.identity, _ENDED, warmed.version, _document(warmed), time.time()),
                )
                run.executemany(
                    "INSERT INTO errata VALUES (?, ?, ?, ?, ?)",
                    [(warmed.identity, at, note.after, note.form, note.line) for at, note in enumerate(warmed.notes)],
                )
        return bool(begun)

    def end_rebase(self, warmed: Conversation, *, done: bool) -> None:
        """The new prefix was computed, or could not be."""
        with self._state.write() as run:
            run.execute("UPDATE rebases SET state = ? WHERE warmed = ?", (_READY if done else _FAILED, warmed.identity))

    def warmed(self, conversation: Conversation, keys: Sequence[str]) -> Conversation | None:
        """The prefix that was computed for a conversation to go on with; None where there is none for these turns.

        Args:
            keys: of each beginning of the request.
        """
        rows = self._state.rows(
            "SELECT identity, version, document FROM rebases JOIN conversations ON identity = warmed "
            "WHERE conversation = ? AND state = ?",
            (conversation.identity, _READY),
        )
        for identity, version, document in rows:
            found = self._read(identity, _ENDED, version, document)
            if found.turns <= len(keys):
                return replace(found, key=keys[found.turns - 1])
        return None

    def end(self, conversation: Conversation) -> None:
        """No request goes on with it any more."""
        with self._state.write() as run:
            run.execute(_SET_KEY, (_ENDED, conversation.identity))

    def learned(self, owner: str) -> frozenset[str]:
        """Lines that changed repeatedly."""
        return frozenset(each for each, seen in list(self._templates.get(owner, {}).items()) if seen >= _OFTEN)

    def learn(self, owner: str, templates: Sequence[str], *, most: int = 200) -> None:
        """Count a change of each line."""
        known = self._templates.setdefault(owner, {})
        counted = [each for each in templates if known.get(each, 0) < _OFTEN and (each in known or len(known) < most)]
        if not counted:
            return
        with self._state.write() as run:
            for template in counted:
                known[template] = known.get(template, 0) + 1
                run.execute(
                    "INSERT INTO templates VALUES (?, ?, 1) ON CONFLICT (owner, template) DO UPDATE SET seen = seen + 1",
                    (owner, template),
                )

    def verdict(self, subject: str, about: str) -> str:
        """What was found out; empty where nothing was, or it no longer holds."""
        verdict, until = self._verdicts.get((subject, about), ("", None))
        return verdict if until is None or until > time.time() else ""

    def decide(self, subject: str, about: str, verdict: str, *, for_s: float | None = None) -> None:
        """Remember what was found out, for a time or for good."""
        until = None if for_s is None else time.time() + for_s
        with self._state.write() as run:
            run.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", (subject, about, verdict, until))
        self._verdicts[subject, about] = (verdict, until)

    def verdicts(self) -> list[tuple[str, str, str]]:
        """All that holds now: subject, what about it, and the verdict."""
        found = [(*key, self.verdict(*key)) for key in sorted(self._verdicts)]
        return [row for row in found if row[2]]

    def _read(self, identity: str, key: str, version: int, document: str) -> Conversation:
        given: dict[str, Any] = json.loads(document)
        notes = self._state.rows(
            "SELECT after, form, line FROM errata WHERE conversation = ? ORDER BY number", (identity,)
        )
        return Conversation(
            identity,
            version,
            key,
            given["turns"],
            given["tools"],
            tuple(_texts(each) for each in given["head"]),
            given["token"],
            given["named"],
            given["spoke"],
            given["origin"],
            {int(at): _texts(each) for at, each in given["inside"].items()},
            tuple(Note(after, Form(form), line) for after, form, line in notes),
        )

    def _forget(self) -> None:
        """Forget the conversations that were silent longest, and their lines. What stays is not looked through: there may be
        a hundred thousand, and clients wait."""
        now = time.time()
        with self._state.write() as run:
            silent = "SELECT identity FROM conversations WHERE used < ?"
            gone = [identity for (identity,) in run.execute(silent, (now - _CONVERSATIONS_S,)).fetchall()]
            over = len(self) - len(gone) - self._most
            if over > 0:
                longest = "SELECT identity FROM conversations WHERE used >= ? ORDER BY used LIMIT ?"
                gone += [identity for (identity,) in run.execute(longest, (now - _CONVERSATIONS_S, over)).fetchall()]
            for at in range(0, len(gone), _MOST_KEYS):
                lot = gone[at : at + _MOST_KEYS]
                marks = ",".join("?" * len(lot))
                run.execute(f"DELETE FROM conversations WHERE identity IN ({marks})", lot)
                for table in _OF_CONVERSATIONS:
                    run.execute(f"DELETE FROM {table} WHERE conversation IN ({marks})", lot)
            run.execute("DELETE FROM beginnings WHERE used < ?", (now - _BEGINNINGS_S,))

    def _forget_orphans(self) -> None:
        """Forget what belongs to conversations that are not there: those whose first request was refused leave it."""
        with self._state.write() as run:
            for table in _OF_CONVERSATIONS:
                run.execute(f"DELETE FROM {table} WHERE conversation NOT IN (SELECT identity FROM conversations)")


def _document(conversation: Conversation) -> str:
    return json.dumps(
        {
            "turns": conversation.turns,
            "tools": conversation.tools,
            "head": [_written(each) for each in conversation.head],
            "token": conversation.token,
            "named": conversation.named,
            "spoke": conversation.spoke,
            "origin": conversation.origin,
            "inside": {str(at): _written(each) for at, each in conversation.inside.items()},
        }
    )


def _written(texts: Texts) -> list[Any]:
    """The texts, and how those that the client sent last differ: a long system prompt is not kept twice for its clock."""
    last = {
        place: text if place not in texts.base else _changed(texts.base[place], text)
        for place, text in texts.last.items()
    }
    same = dict(texts.last) == dict(texts.base)
    return [texts.frame, dict(texts.base), None if same else last]


def _texts(given: list[Any]) -> Texts:
    frame, base, last = given
    if last is None:
        return Texts(frame, base, base)
    whole = {place: text if isinstance(text, str) else _whole(base[place], *text) for place, text in last.items()}
    return Texts(frame, base, whole)


def _changed(before: str, after: str) -> list[Any]:
    """How many characters are the same at the beginning and at the end, and what stands between."""
    start = common_length(before, after)
    rest, rest_after = before[start:], after[start:]
    stop = common_length(rest[::-1], rest_after[::-1])
    return [start, stop, rest_after[: len(rest_after) - stop]]


def _whole(before: str, start: int, stop: int, between: str) -> str:
    return before[:start] + between + before[len(before) - stop :]
