"""Ending a streamed answer before the model ends it: at a stop string, or after a time limit."""

from __future__ import annotations

import time
from collections.abc import Sequence


class StopStrings:
    """Ends a streamed text before the first stop string that is complete.

    Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None
        """the stop string that ended the text"""

    def passed(self, piece: str) -> str:
        """Take the next piece, and return the text that may be shown now. Empty once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            # The stop string that is complete first wins, so that the result does not depend on the pieces.
            place, self.found = min(places, key=lambda it: (it[0] + len(it[1]), it[0]))
            self._held = ""
            return text[:place]
        kept = max((self._begun(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """The text that is still held back, to be shown when the stream ends."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """How many characters at the end of `text` begin the stop string `string`."""
        most = min(len(string) - 1, len(text))
        return next((count for count in range(most, 0, -1) if text.endswith(string[:count])), 0)


class Deadline:
    """The time limit of an answer; it never passes when `seconds` is None."""

    def __init__(self, seconds: float | None) -> None:
        self._ends = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends
