"""The edit modes: which parts of an edit each one does. Another mode is another row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from programmable_kv.errors import InvalidEditError


class Mode(StrEnum):
    """How an edit is carried out. The table in `docs/which-edit.md` says when to use which."""

    STALE = "stale"
    """change nothing in the cache: the control"""
    IN_PLACE = "in_place"
    """recompute the field's own tokens; what later tokens concluded from it stays"""
    ERRATUM = "erratum"
    """append a line that states the new value"""
    FIELD_ERRATUM = "field_erratum"
    """both: the default"""
    SELECTIVE = "selective"
    """the field's tokens and the k later ones that matter most"""
    READERS = "readers"
    """the field's tokens, and the lines and the open question that read it"""
    SUFFIX = "suffix"
    """everything from the field on"""
    FULL = "full"
    """everything"""


DEFAULT_MODE = Mode.FIELD_ERRATUM
"""what an edit without a mode does, unless recomputing the suffix costs no more"""
DECLARED_MODE = Mode.READERS
"""what it does if the readers of every edited field were declared. Then it decides as a full prefill, more often than with an
erratum (results/readers.json); undeclared, it fails where a rule does not name the field (results/mentions.json)"""


@dataclass(frozen=True, slots=True)
class Strategy:
    """What a mode does. Each part is planned in `edits/edit.py`."""

    writes: bool = False
    """put the new value into the field's places and compute these tokens"""
    states: bool = False
    """append a line that states the new value, where later tokens have read another"""
    selects: bool = False
    """compute the k later tokens again that a ranking puts first"""
    rereads: bool = False
    """compute the field's readers again"""
    recomputes: bool = False
    """compute everything again from the first token that the edit makes inexact"""
    from_start: bool = False
    """compute everything again from the context's first token, all fields written"""


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
    """
    Raises:
        InvalidEditError: there is no such mode; the message lists them.
    """
    try:
        return Mode(mode)
    except ValueError:
        raise InvalidEditError(f"there is no edit mode {mode!r}; the modes are: {', '.join(Mode)}") from None


def mode_of(*, writes: bool, states: bool) -> Mode:
    """The mode that does just this."""
    return next(mode for mode, strategy in STRATEGIES.items() if strategy == Strategy(writes=writes, states=states))
