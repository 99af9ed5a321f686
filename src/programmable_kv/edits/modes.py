"""The edit modes, and the steps that each of them takes. A new mode is a new row of `STRATEGIES`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from programmable_kv.errors import InvalidEditError


class Mode(StrEnum):
    """How an edit is carried out. The table in `docs/which-edit.md` says which mode to use when."""

    STALE = "stale"
    """change nothing in the cache: the control"""
    IN_PLACE = "in_place"
    """recompute the field's own tokens; later tokens keep what they concluded from the old value"""
    ERRATUM = "erratum"
    """append a line that states the new value"""
    FIELD_ERRATUM = "field_erratum"
    """`in_place` and `erratum` together: the default. The line does not read the refreshed field, unless the field goes back
    to the value with which the text behind it was computed."""
    SELECTIVE = "selective"
    """recompute the field's tokens and the k later tokens that matter most"""
    READERS = "readers"
    """recompute the field's tokens, and the lines and the open question that read it"""
    SUFFIX = "suffix"
    """recompute everything from the field on"""
    FULL = "full"
    """recompute everything"""


DEFAULT_MODE = Mode.FIELD_ERRATUM
"""The mode of an edit that names none, unless recomputing the suffix costs no more. It agrees with a full prefill about as
often as `erratum` does (results/edit-modes.json), and the cached field itself has the new value."""
DECLARED_MODE = Mode.READERS
"""The mode of an edit that names none if the readers of every edited field were declared. It then agrees with a full
prefill more often than an erratum does (results/readers.json). Without declarations it fails where a rule does not name
the field (results/mentions.json)."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """The steps that a mode takes. Each of them is planned in `edits/edit.py`."""

    writes: bool = False
    """write the new value into the field's places and compute these tokens"""
    states: bool = False
    """append a line that states the new value, if later tokens have read another value"""
    selects: bool = False
    """recompute the k later tokens that a ranking puts first"""
    rereads: bool = False
    """recompute the field's readers"""
    recomputes: bool = False
    """recompute everything from the first token that the edit makes inexact"""
    from_start: bool = False
    """write all fields and recompute everything from the context's first token"""


STRATEGIES: dict[Mode, Strategy] = {
    Mode.STALE: Strategy(),
    Mode.IN_PLACE: Strategy(writes=True),
    Mode.ERRATUM: Strategy(states=True),
    Mode.FIELD_ERRATUM: Strategy(writes=True, states=True),
    Mode.SELECTIVE: Strategy(writes=True, selects=True),
    Mode.READERS: Strategy(writes=True, rereads=True),
    Mode.SUFFIX: Strategy(writes=True, recomputes=True),
    Mode.FULL: Strategy(writes=True, recomputes=True, from_start=True),
}


def parse_mode(mode: str | Mode) -> Mode:
    """The mode of this name.

    Raises:
        InvalidEditError: no mode has this name; the message lists the modes.
    """
    try:
        return Mode(mode)
    except ValueError:
        raise InvalidEditError(f"unknown edit mode {mode!r}; choose from {', '.join(Mode)}") from None


def mode_of(*, writes: bool, states: bool) -> Mode:
    """The mode that takes exactly these steps."""
    return next(mode for mode, strategy in STRATEGIES.items() if strategy == Strategy(writes=writes, states=states))
