"""The plugin in vLLM's scheduler: chooses the skills and blocks of each request, and reports to it what was loaded.

This module does not import vLLM: `connector.py` passes it what it needs to know about a request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidRequestError, ProgrammableKVError
from programmable_kv.storage.manifests import preface_digest
from programmable_kv.vllm_plugin.loading import StoredSkills
from programmable_kv.vllm_plugin.marks import SALT_PREFIX, Marks, parse_marks
from programmable_kv.vllm_plugin.matching import Piece, Placed, blocks_of, loadable, place

log = logging.getLogger("vllm.programmable_kv")  # a child of vLLM's logger, so that its lines appear among vLLM's


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a vLLM request that matter for skills."""

    name: str
    """vLLM's id of the request"""
    prompt: Sequence[int] | None
    """token ids; None if the prompt was not given as tokens"""
    salt: str | None
    parameters: dict[str, Any] | None
    other: str = ""
    """what else determines the request's keys and values: an adapter, images or sound"""


@dataclass(frozen=True, slots=True)
class Load:
    """Skills to write into the blocks of a request before the next forward."""

    request: str
    pieces: tuple[Piece, ...]
    block_ids: tuple[int, ...]
    """all blocks of the request, from its first token on"""


@dataclass(slots=True)
class _Known:
    """A marked request, until it is finished."""

    placed: tuple[Placed, ...]
    why: str = ""
    """why no skill of it is loaded"""
    loaded: int = 0
    """tokens loaded"""
    blocks: frozenset[int] = field(default_factory=frozenset)
    """the blocks into which its skills are written"""


class Scheduling:
    """Bookkeeping of the requests with skills. Calling `matched` again for a request returns the same count."""

    def __init__(self, skills: StoredSkills, block_size: int, *, salt_prefix: str = SALT_PREFIX) -> None:
        self._skills = skills
        self._block_size = block_size
        self._salt_prefix = salt_prefix
        self._known: dict[str, _Known] = {}
        self._loads: list[Load] = []

    def matched(self, request: Request, computed: int) -> int:
        """Return how many tokens directly after the first `computed` ones can be loaded from skills."""
        known = self._look_up(request)
        if known is None or request.prompt is None:
            return 0
        pieces = loadable(known.placed, computed, len(request.prompt))
        if known.placed:
            known.why = "" if pieces else _blocked(known.placed, computed)
        return pieces[-1].stop - computed if pieces else 0

    def allocated(self, request: Request, computed: int, count: int, block_ids: Sequence[int]) -> None:
        """Note that `count` tokens after the first `computed` ones are to be loaded into the request's blocks."""
        known = self._look_up(request)
        if known is None or request.prompt is None or not count:
            return
        pieces = _until(loadable(known.placed, computed, len(request.prompt)), computed + count)
        self._loads.append(Load(request.name, pieces, tuple(block_ids)))
        known.loaded = count
        known.blocks = frozenset(blocks_of(block_ids, Span(computed, computed + count), self._block_size))

    def drain(self) -> tuple[Load, ...]:
        """Return the loads for the next forward. Each load is returned once."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def failed(self, block_ids: Sequence[int]) -> None:
        """Note that these blocks could not be written, so that vLLM computes their tokens."""
        for known in self._known.values():
            if not known.blocks.isdisjoint(block_ids):
                known.loaded, known.blocks = 0, frozenset()
                known.why = "the skills could not be read, so their tokens were computed; vLLM's log says why"

    def finished(self, name: str) -> dict[str, Any] | None:
        """Forget a finished request and return the report on its skills for its response; None if it had no skills."""
        known = self._known.pop(name, None)
        return None if known is None else {"skills": {"tokens_loaded": known.loaded, "why": known.why}}

    # -- parts -----------------------------------------------------------------------------------------------------

    def _look_up(self, request: Request) -> _Known | None:
        if request.name in self._known:
            return self._known[request.name]
        if not request.parameters or "skills" not in request.parameters:
            if request.salt is not None and request.salt.startswith(self._salt_prefix):
                log.warning(
                    "request %s has no skills, but uses the salt of requests with skills, so it may read blocks that contain "
                    "skills. Give it another salt.", request.name,
                )  # fmt: skip
            return None
        try:
            known = _Known(self._placed(request))
        except ProgrammableKVError as error:
            known = _Known((), f"{type(error).__name__}: {error}")
            log.warning("nothing is loaded for request %s: %s", request.name, error)
        self._known[request.name] = known
        return known

    def _placed(self, request: Request) -> tuple[Placed, ...]:
        """
        Raises:
            InvalidRequestError: the skills are not in the prompt as marked, the salt lacks the prefix, or the prompt
                has no tokens or uses an adapter, images or sound.
            StorageError: a skill is not in the store, or does not fit the model.
        """
        marks = parse_marks(request.parameters)
        assert marks is not None
        if request.salt is None or not request.salt.startswith(self._salt_prefix):
            raise InvalidRequestError(
                f"a prompt with skills needs a cache_salt that begins with '{self._salt_prefix}', got {request.salt!r}. "
                "Without it, later requests would read the skills' blocks from the prefix cache as if they had been computed."
            )
        if request.prompt is None or request.other:
            raise InvalidRequestError(
                f"skills can be loaded only into text prompts without an adapter; this one has {request.other or 'no tokens'}"
            )
        return self._each_placed(marks, request.prompt)

    def _each_placed(self, marks: Marks, prompt: Sequence[int]) -> tuple[Placed, ...]:
        placed: list[Placed] = []
        for mark in marks.marks:
            entry = self._skills.entry(mark.skill)
            after = placed[-1].tokens.stop if placed else 0
            span = place(entry.key, entry.unit.ids, prompt, mark.start, after=after)
            # A skill directly behind exactly the tokens of its preface is exact, so it needs no seam repair.
            before = prompt[: span.start] if span.start == entry.preface_tokens else None
            exact = before is not None and preface_digest(tuple(before)) == entry.preface_sha256
            placed.append(Placed(entry.key, span, 0 if exact else marks.seam))
        return tuple(placed)


def _blocked(placed: Sequence[Placed], computed: int) -> str:
    """Return why no skill can be loaded directly after the cached tokens; empty if all skills are cached."""
    ahead = next((each for each in placed if each.tokens.stop > computed), None)
    if ahead is None or computed >= ahead.loadable.start:
        return ""
    return (
        f"{computed} tokens are cached, and skill {ahead.key} can be loaded from token {ahead.loadable.start} on: send the "
        "text before it first, under the same salt, as Composition.requests does"
    )


def _until(pieces: Sequence[Piece], stop: int) -> tuple[Piece, ...]:
    """Return the pieces cut off at token `stop`. (vLLM may accept fewer tokens than it was offered.)"""
    kept = [piece for piece in pieces if piece.start < stop]
    if kept and kept[-1].stop > stop:
        last = kept.pop()
        kept.append(replace(last, tokens=Span(last.tokens.start, last.tokens.start + stop - last.start)))
    return tuple(kept)
