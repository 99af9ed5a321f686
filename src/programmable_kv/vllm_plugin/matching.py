"""Finds which tokens of a prompt can be loaded, from token ids, blocks and spans. No tensors here.

vLLM asks a connector one question: how many tokens can be loaded *directly after* the blocks that are cached already?
So the loaded tokens are one run. It may cover several skills, and it ends at the first token that is in no skill. The
last token of a prompt is never loaded, because its logits are needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored skill whose tokens are in a prompt, all of them and in order."""

    key: str
    tokens: Span
    """span in the prompt"""
    seam: int = 0
    """how many of the skill's first tokens vLLM computes"""

    @property
    def loadable(self) -> Span:
        """The span of the prompt that may be loaded: the skill without its seam."""
        return Span(min(self.tokens.start + self.seam, self.tokens.stop), self.tokens.stop)


@dataclass(frozen=True, slots=True)
class Piece:
    """A span of a skill, and the index of its first token in the prompt."""

    key: str
    tokens: Span
    """span in the skill"""
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


def place(key: str, ids: Sequence[int], prompt: Sequence[int], start: int | None, *, after: int = 0) -> Span:
    """Return a skill's span in a prompt. Every token is compared.

    Args:
        ids: the skill's tokens.
        start: index where the skill must start; None to search for its first occurrence.
        after: index where the previous skill ends.

    Raises:
        InvalidRequestError: the skill's tokens are not at `start`, or nowhere behind `after`, or overlap the previous
            skill.
    """
    if start is None:
        start = _find(ids, prompt, after)
        if start is None:
            raise InvalidRequestError(
                f"the {len(ids)} tokens of skill {key} are not in the prompt from token {after} on. If the whole text is "
                "tokenised at once, tokens may merge at the skill's ends: send token ids, or end the skill and the text "
                "before it with line breaks."
            )
    if start < after:
        raise InvalidRequestError(
            f"skill {key} starts at token {start}, but the previous one ends at {after}. List skills in the order of the "
            "prompt."
        )
    span = Span(start, start + len(ids))
    there = tuple(prompt[span.start : span.stop])
    if there != tuple(ids):
        same = next((n for n, (one, other) in enumerate(zip(there, ids, strict=False)) if one != other), len(there))
        raise InvalidRequestError(
            f"the prompt's tokens from {start} on are not those of skill {key}: token {same} of {len(ids)} differs. Compile "
            "the skill from exactly the text that is sent, or mark the token where it starts."
        )
    return span


def loadable(placed: Sequence[Placed], computed: int, length: int) -> tuple[Piece, ...]:
    """Return the pieces that can be loaded directly after the first `computed` tokens of a prompt of `length` tokens.

    The skills in `placed` are in ascending order and do not overlap.
    """
    pieces: list[Piece] = []
    reached = computed
    for each in placed:
        if each.tokens.stop <= reached:
            continue
        stop = min(each.tokens.stop, length - 1)
        if reached < each.loadable.start or stop <= reached:
            break  # at text outside of skills, at a seam, or at the prompt's last token
        pieces.append(Piece(each.key, Span(reached, stop).shifted(-each.tokens.start), reached))
        reached = stop
    return tuple(pieces)


def stages(placed: Sequence[Placed], length: int, block_size: int) -> tuple[int, ...]:
    """Return the lengths of the prompts to send so that every skill is loaded, ascending. The last is the whole prompt.

    Each shorter prompt ends at the first block boundary behind the text before a skill and the skill's seam, which are
    then cached. Sent one after the other under one salt, each prompt computes only tokens that are in no skill, the
    seams, and the tokens up to the end of a block.
    """
    sent: list[int] = []
    reached = 0
    while True:
        pieces = loadable(placed, reached, length)
        reached = pieces[-1].stop if pieces else reached
        behind = [each.loadable.start for each in placed if reached < each.loadable.start < each.tokens.stop]
        if not behind:
            break
        reached = -(-behind[0] // block_size) * block_size
        if reached >= length - 1:
            break
        if any(each.loadable.start <= reached < each.tokens.stop for each in placed):
            sent.append(reached)
    return (*sent, length)


def blocks_of(block_ids: Sequence[int], tokens: Span, block_size: int) -> list[int]:
    """Return the blocks that contain a span of a prompt."""
    return list(block_ids[tokens.start // block_size : -(-tokens.stop // block_size)])


def slots_of(block_ids: Sequence[int], tokens: Span, block_size: int) -> list[int]:
    """Return each token's slot: its block number times the block size, plus its offset in the block."""
    return [block_ids[token // block_size] * block_size + token % block_size for token in tokens.range]


def _find(ids: Sequence[int], prompt: Sequence[int], after: int) -> int | None:
    needle, hay = array("I", ids), array("I", prompt)
    width = hay.itemsize
    wanted, text = needle.tobytes(), hay.tobytes()
    found = text.find(wanted, after * width)
    while found != -1 and found % width:  # skip matches that begin in the middle of a token
        found = text.find(wanted, found + 1)
    return None if found == -1 else found // width
