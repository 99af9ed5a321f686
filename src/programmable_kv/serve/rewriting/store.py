"""Stores conversations and their lines in the state, which several gateways may share.

Nothing is cached here between two calls: another gateway may have written meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from programmable_kv.serve.rewriting.conversation import Conversation, Form, Note
from programmable_kv.serve.rewriting.documents import conversation_of, document_of
from programmable_kv.serve.rewriting.plan import Plan
from programmable_kv.serve.state import State, Transaction

_LOG = logging.getLogger("programmable_kv.serve")
_MOST_KEYS = 500
"""The most keys in one statement. Of more beginnings of one conversation, `candidates` looks up the longest."""
_FORGET_EVERY = 64
"""New conversations between two clean-ups."""
OF_CONVERSATIONS = ("sessions", "renewals", "errata", "notebook_conversations")
"""Tables with rows that belong to a conversation. The one that links them to notebooks is the last."""
_SET_KEY = "UPDATE conversations SET key = ? WHERE identity = ?"
_NOTEBOOK = "UPDATE gateway_notebooks SET number = number WHERE identity = ?"
"""Finds out whether a notebook exists, and prevents that it is deleted meanwhile."""
_NOTEBOOK_AT = f"{_NOTEBOOK} AND version = ?"
"""The same, and whether its values are still those that are stated."""
_OF_NOTEBOOK = "INSERT INTO notebook_conversations VALUES (?, ?) ON CONFLICT (notebook, conversation) DO NOTHING"
_FORGET_REBASE = "DELETE FROM renewals WHERE conversation = ?"
_BEGINS = (
    "INSERT INTO beginnings VALUES (?, ?, epoch()) ON CONFLICT (key) DO UPDATE SET "
    "conversations = beginnings.conversations + 1, used = excluded.used"
)
_NEW = "INSERT INTO conversations VALUES (?, ?, ?, ?, epoch())"
_LINE = "INSERT INTO errata VALUES (?, ?, ?, ?, ?)"
_ENDED = ""
"""The key of conversations that were replaced after a reset, and of prefixes that are not in use yet."""
_WARMING, _READY, _FAILED = "warming", "ready", "failed"
WARMING_S = 300.0
"""Seconds after which a gateway that computes a prefix is assumed to be gone, and another may begin."""
_CONVERSATIONS_S = 7 * 86400.0
"""Seconds without a request after which a conversation is deleted."""
_BEGINNINGS_S = 30 * 86400.0
_BEGINNINGS = 4
"""Beginnings kept for each conversation that may be kept. No conversation counts as alone with a deleted beginning."""
_FORGET_BEGINNINGS_EVERY = 1024
"""New conversations between two clean-ups of beginnings. Counting the beginnings takes some time."""


class ConversationStore:
    """What a rewriting gateway stores about conversations. Each write is one transaction."""

    def __init__(self, state: State, *, most: int) -> None:
        """
        Args:
            most: how many conversations are kept. Those without a request for the longest time are deleted first.
        """
        self._state = state
        self._most = most
        self._made = 0
        if state.alone:
            with state.write() as run:  # the process that computed them is gone
                run.execute("DELETE FROM renewals WHERE state = ?", (_WARMING,))
        self._forget()
        self._forget_beginnings()
        self._forget_orphans()

    def __len__(self) -> int:
        return int(self._state.rows("SELECT count(*) FROM conversations")[0][0])

    def candidates(self, keys: Sequence[str]) -> list[Conversation]:
        """The conversations that a request with these beginnings may continue: those with most turns, latest first."""
        wanted = keys[-_MOST_KEYS:]
        rows = self._read(f"key IN ({','.join('?' * len(wanted))})", wanted)
        length = {key: turns for turns, key in enumerate(keys, start=1)}
        longest = max((length[each.key] for each in rows), default=0)
        return [each for each in rows if length[each.key] == longest]

    def begun(self, keys: Sequence[str]) -> int:
        """How many conversations were first seen with the same turns: the most, over all beginnings of this one.

        This is a lower bound: 0 if the beginnings were deleted."""
        marks = ",".join("?" * len(keys[:_MOST_KEYS]))
        statement = f"SELECT max(conversations) FROM beginnings WHERE key IN ({marks})"
        return int(self._state.rows(statement, keys[:_MOST_KEYS])[0][0] or 0)

    def latest(self, session: str) -> Conversation | None:
        """The conversation that a named session continued last."""
        rows = self._read("identity IN (SELECT conversation FROM sessions WHERE session = ?)", (session,))
        return rows[0] if rows else None

    def commit(self, plan: Plan, session: str = "") -> bool:
        """Store what is about to be sent. False if another request continued the conversation meanwhile, or its
        notebook was edited or deleted.

        Args:
            session: the name under which the conversation is found again when its turns are new; empty: none.
        """
        after, before = plan.after, plan.before
        if after is None:
            return True
        with self._state.write() as run:
            if after.notebook and not run.execute(_NOTEBOOK_AT, (after.notebook, plan.notebook_version)).rowcount:
                return False  # deleted meanwhile: keep nothing of it; or edited: state no old value after a new one
            if before is None:
                run.execute(_NEW, (after.identity, after.key, after.version, document_of(after)))
            else:
                changed = run.execute(
                    "UPDATE conversations SET key = ?, version = ?, document = ?, used = epoch() "
                    "WHERE identity = ? AND version = ?",
                    (after.key, after.version, document_of(after), before.identity, before.version),
                ).rowcount
                if not changed:
                    return False
            if _begins(plan, after):
                first = after.origin == after.identity and before is None
                run.execute(_BEGINS, (after.key, 1 if first else 2))  # the one that it may continue counts, too
            if plan.replaced is not None:
                run.execute(_SET_KEY, (_ENDED, plan.replaced.identity))
                run.execute(_FORGET_REBASE, (plan.replaced.identity,))
            if after.notebook:
                run.execute(_OF_NOTEBOOK, (after.notebook, after.identity))
            if session:
                run.execute(
                    "INSERT INTO sessions VALUES (?, ?) ON CONFLICT (session) "
                    "DO UPDATE SET conversation = excluded.conversation",
                    (session, after.identity),
                )
            if plan.note is not None:
                note, number = plan.note, len(after.notes) - 1
                run.execute(_LINE, (after.identity, number, note.after, note.form, note.line))
        if before is None:
            self._made += 1
            if self._made % _FORGET_EVERY == 0:
                try:
                    self._forget()
                    if self._made % _FORGET_BEGINNINGS_EVERY == 0:
                        self._forget_beginnings()
                except Exception as error:  # the request is stored, and is sent
                    _LOG.warning("could not delete old conversations (%s)", type(error).__name__)
        return True

    def take_back(self, plan: Plan) -> bool:
        """Undo a commit whose request was refused or never sent. False if another request continued it meanwhile."""
        after, before = plan.after, plan.before
        if after is None:
            return True
        same = (after.identity, after.version)
        with self._state.write() as run:
            if before is None:
                taken = run.execute("DELETE FROM conversations WHERE identity = ? AND version = ?", same).rowcount
            else:
                taken = run.execute(
                    "UPDATE conversations SET key = ?, version = ?, document = ? WHERE identity = ? AND version = ?",
                    (before.key, before.version, document_of(before), *same),
                ).rowcount
            if not taken:
                return False
            if before is None:
                for table in OF_CONVERSATIONS:
                    run.execute(f"DELETE FROM {table} WHERE conversation = ?", (after.identity,))
            if _begins(plan, after):
                run.execute("UPDATE beginnings SET conversations = conversations - 1 WHERE key = ?", (after.key,))
            if plan.note is not None:
                run.execute(
                    "DELETE FROM errata WHERE conversation = ? AND number = ?", (after.identity, len(after.notes) - 1)
                )
            if plan.replaced is not None:
                run.execute(_SET_KEY, (plan.replaced.key, plan.replaced.identity))
        return True

    def begin_rebase(self, conversation: Conversation, warmed: Conversation) -> bool:
        """Record that a new prefix of a conversation is being computed.

        Returns False if one is or was, or the notebook is gone; also after a failure, until the number of lines is more
        than one and a half times what it was.

        No request continues the prefix before the conversation switches to it. If it takes too long, another may begin.
        """
        lines = len(conversation.notes)
        with self._state.write() as run:
            if warmed.notebook and not run.execute(_NOTEBOOK, (warmed.notebook,)).rowcount:
                return False
            run.execute(
                "DELETE FROM renewals WHERE conversation = ? "
                "AND ((state = ? AND lines * 1.5 < ?) OR (state = ? AND until < epoch()))",
                (conversation.identity, _FAILED, lines, _WARMING),
            )
            begun = run.execute(
                "INSERT INTO renewals VALUES (?, ?, ?, ?, epoch() + ?) ON CONFLICT (conversation) DO NOTHING",
                (conversation.identity, warmed.identity, _WARMING, lines, WARMING_S),
            ).rowcount
            if begun:
                run.execute(_NEW, (warmed.identity, _ENDED, warmed.version, document_of(warmed)))
                if warmed.notebook:
                    run.execute(_OF_NOTEBOOK, (warmed.notebook, warmed.identity))
                for at, note in enumerate(warmed.notes):
                    run.execute(_LINE, (warmed.identity, at, note.after, note.form, note.line))
        return bool(begun)

    def end_rebase(self, warmed: Conversation, *, done: bool) -> None:
        """Record whether the new prefix was computed. If it took too long and another was begun, that one counts."""
        with self._state.write() as run:
            run.execute(
                "UPDATE renewals SET state = ? WHERE warmed = ?", (_READY if done else _FAILED, warmed.identity)
            )

    def warmed(self, conversation: Conversation, keys: Sequence[str]) -> Conversation | None:
        """The prefix that was computed for a conversation to continue; None if there is none for these turns.

        Args:
            keys: the key of each beginning of the request.
        """
        ready = "identity IN (SELECT warmed FROM renewals WHERE conversation = ? AND state = ?)"
        for found in self._read(ready, (conversation.identity, _READY)):
            if found.turns <= len(keys):
                return replace(found, key=keys[found.turns - 1])
        return None

    def end(self, conversation: Conversation) -> None:
        """End a conversation: no request continues it any more."""
        with self._state.write() as run:
            run.execute(_SET_KEY, (_ENDED, conversation.identity))

    def _read(self, where: str, values: Sequence[str]) -> list[Conversation]:
        """Conversations with their lines, the latest first. One statement reads both, so that they fit each other."""
        rows = self._state.rows(
            f"SELECT identity, used, -1, key, document, version FROM conversations WHERE {where} UNION ALL "
            "SELECT identity, used, number, form, line, after FROM conversations JOIN errata ON conversation = identity "
            f"WHERE {where}",
            (*values, *values),
        )
        notes: dict[str, list[Note]] = {}
        for identity, _, number, form, line, after in sorted(rows, key=lambda row: row[2]):
            if number >= 0:
                notes.setdefault(identity, []).append(Note(after, Form(form), line))
        heads = sorted((row for row in rows if row[2] < 0), key=lambda row: -row[1])
        return [
            conversation_of(identity, key, version, document, tuple(notes.get(identity, ())))
            for identity, _, _, key, document, version in heads
        ]

    def _forget(self) -> None:
        """Delete the conversations without a request for the longest time, and their lines. Rows that stay are not
        read: there may be a hundred thousand, and clients wait."""
        with self._state.write() as run:
            for lot in _silent(run, "conversations", "identity", _CONVERSATIONS_S, self._most):
                marks = ",".join("?" * len(lot))
                run.execute(f"DELETE FROM conversations WHERE identity IN ({marks})", lot)
                for table in OF_CONVERSATIONS:
                    run.execute(f"DELETE FROM {table} WHERE conversation IN ({marks})", lot)

    def _forget_beginnings(self) -> None:
        """Delete the beginnings that were not seen for the longest time."""
        with self._state.write() as run:
            for lot in _silent(run, "beginnings", "key", _BEGINNINGS_S, self._most * _BEGINNINGS):
                run.execute(f"DELETE FROM beginnings WHERE key IN ({','.join('?' * len(lot))})", lot)

    def _forget_orphans(self) -> None:
        """Delete rows of conversations that do not exist: those whose first request was refused leave such rows."""
        for table in OF_CONVERSATIONS:
            with self._state.write() as run:
                run.execute(
                    f"DELETE FROM {table} WHERE NOT EXISTS (SELECT 1 FROM conversations WHERE identity = {table}.conversation)"
                )


def _silent(run: Transaction, table: str, name: str, silent_s: float, most: int) -> Iterator[list[str]]:
    """Keys of a table's rows that were not used for so long, or exceed `most`: found by an index, yielded in lots."""
    rows = run.execute(f"SELECT {name} FROM {table} WHERE used < epoch() - ?", (silent_s,)).fetchall()
    [(kept,)] = run.execute(f"SELECT count(*) FROM {table}").fetchall()
    over = kept - len(rows) - most
    if over > 0:
        longest = f"SELECT {name} FROM {table} WHERE used >= epoch() - ? ORDER BY used LIMIT ?"
        rows += run.execute(longest, (silent_s, over)).fetchall()
    gone = sorted(each for (each,) in rows)  # other gateways that delete lock rows in the same order
    yield from (gone[at : at + _MOST_KEYS] for at in range(0, len(gone), _MOST_KEYS))


def _begins(plan: Plan, after: Conversation) -> bool:
    """Whether a request may be the first one of a conversation. If it has no name and adds no turn to what was sent, it
    may be a repetition, or belong to another conversation that begins alike: nobody can tell."""
    old = plan.before or plan.replaced
    if old is None:
        return after.origin == after.identity
    return old.turns == after.turns and not after.named and not after.notebook
