"""Stores findings about upstreams, and about lines of prompts that change. Several gateways may share them.

Nothing is cached here between two calls: another gateway may have written meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from programmable_kv.serve.state import State

_OFTEN = 2
"""Number of changes after which a line counts as one that changes repeatedly."""


class Verdicts:
    """What a rewriting gateway found out. Each write is one transaction."""

    def __init__(self, state: State) -> None:
        self._state = state

    def learned(self, owner: str) -> frozenset[str]:
        """Templates of the lines that changed repeatedly."""
        found = self._state.rows("SELECT template FROM templates WHERE owner = ? AND seen >= ?", (owner, _OFTEN))
        return frozenset(template for (template,) in found)

    def learn(self, owner: str, templates: Sequence[str], *, most: int = 200) -> None:
        """Count one change of each line. At most `most` different lines are kept for an owner."""
        known = dict(self._state.rows("SELECT template, seen FROM templates WHERE owner = ?", (owner,)))
        counted = [each for each in templates if known.get(each, 0) < _OFTEN and (each in known or len(known) < most)]
        if not counted:
            return
        with self._state.write() as run:
            for template in sorted(counted):
                run.execute(
                    "INSERT INTO templates VALUES (?, ?, 1) "
                    "ON CONFLICT (owner, template) DO UPDATE SET seen = templates.seen + 1",
                    (owner, template),
                )

    def of(self, subject: str, *others: str) -> dict[str, str]:
        """The verdicts about a subject that are valid now, by what they are about.

        Args:
            others: subjects whose verdicts take precedence.
        """
        subjects = (subject, *others)
        found = self._state.rows(
            f"SELECT subject, about, verdict FROM verdicts WHERE subject IN ({', '.join('?' * len(subjects))}) "
            "AND (until IS NULL OR until > epoch())",
            subjects,
        )
        return {about: verdict for _, about, verdict in sorted(found, key=lambda row: subjects.index(row[0]))}

    def decide(self, subject: str, about: str, verdict: str, *, for_s: float | None = None) -> None:
        """Store a verdict, for a time or for good."""
        with self._state.write() as run:
            run.execute(
                "INSERT INTO verdicts VALUES (?, ?, ?, epoch() + ?) "
                "ON CONFLICT (subject, about) DO UPDATE SET verdict = excluded.verdict, until = excluded.until",
                (subject, about, verdict, for_s),
            )
