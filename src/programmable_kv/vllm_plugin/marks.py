"""Marks: a request names the skills in its prompt in `kv_transfer_params={"skills": [...], "seam": 0}`. No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from programmable_kv.errors import InvalidRequestError

SALT_PREFIX = "composed:"
"""prefix of the cache salt of every request with skills"""
SKILLS, SEAM = "skills", "seam"
_FORM = (
    'Write kv_transfer_params={"skills": [{"skill": "refunds", "start": 24}], "seam": 0}, with the skills in the order of '
    "the prompt. A skill without a start is located by its tokens."
)


@dataclass(frozen=True, slots=True)
class Mark:
    """One skill in a prompt: its key or name in the store, and the index of its first token (None: search for it)."""

    skill: str
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Marks:
    """All skills of a prompt, in the prompt's order. vLLM computes the first `seam` tokens of each."""

    marks: tuple[Mark, ...]
    seam: int = 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The marks as a request's `kv_transfer_params`."""
        listed = [{"skill": it.skill, **({} if it.start is None else {"start": it.start})} for it in self.marks]
        return {SKILLS: listed, SEAM: self.seam}


def parse_marks(parameters: Mapping[str, Any] | None) -> Marks | None:
    """Return the marks of a request; None if it has none.

    Raises:
        InvalidRequestError: the marks do not have the form shown in this module's docstring.
    """
    if not parameters or SKILLS not in parameters:
        return None
    listed, seam = parameters[SKILLS], parameters.get(SEAM, 0)
    if not isinstance(listed, list | tuple) or not listed:
        raise InvalidRequestError(
            f"the skills of a prompt must be a list with at least one entry, got {listed!r}. {_FORM}"
        )
    if not _is_count(seam):
        raise InvalidRequestError(f"a seam must be a number of tokens, 0 or more, got {seam!r}. {_FORM}")
    return Marks(tuple(map(_mark, listed)), seam)


def _mark(item: object) -> Mark:
    if isinstance(item, str):
        item = {"skill": item}
    if not isinstance(item, Mapping) or not {"skill"} <= item.keys() <= {"skill", "start"}:
        raise InvalidRequestError(f"a skill's mark has 'skill' and optionally 'start', got {item!r}. {_FORM}")
    skill, start = item["skill"], item.get("start")
    if not isinstance(skill, str) or not skill:
        raise InvalidRequestError(f"'skill' must be a skill's key or name, got {skill!r}. {_FORM}")
    if start is not None and not _is_count(start):
        raise InvalidRequestError(f"'start' must be the index of a token in the prompt, got {start!r}. {_FORM}")
    return Mark(skill, start)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
