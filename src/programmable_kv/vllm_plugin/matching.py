"""Which tokens of a prompt can be loaded: bookkeeping over token ids, blocks and spans. No tensors here.

vLLM asks one question of a connector: how many tokens can be loaded *right behind* the blocks that it has cached already. So
what is loaded is one run of tokens. It may go through several skills, and ends at the first token that no skill holds. The last
token of a prompt is never loaded, because its logits are needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored skill that stands in a prompt, token for token."""

    key: str
    tokens: Span
    """in the prompt"""
    seam: int = 0
    """how many of its first tokens are left to vLLM"""

    @property
    def loadable(self) -> Span:
        """What of it may be loaded."""
        return Span(min(self.tokens.start + self.seam, self.tokens.stop), self.tokens.stop)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of a skill, and the first one's place in the prompt."""

    key: str
    tokens: Span
    """of the skill"""
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


def place(key: str, ids: Sequence[int], prompt: Sequence[int], start: int | None, *, after: int = 0) -> Span:
    """Where a skill stands in a prompt, every token compared.

    Args:
        ids: the skill's tokens.
        start: where it must stand; None to find its first place.
        after: where the skill before it ends.

    Raises:
        InvalidRequestError: it does not stand there.
    """
    if start is None:
        start = _find(ids, prompt, after)
        if start is None:
            raise InvalidRequestError(
                f"the {len(ids)} tokens of skill {key} do not stand in the prompt behind token {after}. Text tokenised as a "
                "whole may merge tokens at the skill's ends: send token ids, or end the skill and the text before it with "
                "line breaks."
            )
    if start < after:
        raise InvalidRequestError(
            f"skill {key} starts at token {start}, and the one before it ends at {after}. List skills in the order of the "
            "prompt."
        )
    span = Span(start, start + len(ids))
    there = tuple(prompt[span.start : span.stop])
    if there != tuple(ids):
        same = next((n for n, (one, other) in enumerate(zip(there, ids, strict=False)) if one != other), len(there))
        raise InvalidRequestError(
            f"the prompt's tokens from {start} on are not those of skill {key}: token {same} of {len(ids)} differs. Compile "
            "the skill from the text as it is sent, or mark the token where it starts."
        )
    return span


def loadable(placed: Sequence[Placed], computed: int, length: int) -> tuple[Piece, ...]:
    """What can be loaded behind the first `computed` tokens of a prompt of `length` tokens.

    `placed` ascend and do not overlap.
    """
    pieces: list[Piece] = []
    reached = computed
    for each in placed:
        if each.tokens.stop <= reached:
            continue
        stop = min(each.tokens.stop, length - 1)
        if reached < each.loadable.start or stop <= reached:
            break  # text that no skill holds, a seam, or the prompt's last token
        pieces.append(Piece(each.key, Span(reached, stop).shifted(-each.tokens.start), reached))
        reached = stop
    return tuple(pieces)


def stages(placed: Sequence[Placed], length: int, block_size: int) -> tuple[int, ...]:
    """The lengths of the prompts to send, ascending, so that every skill is loaded: the last one is the whole prompt.

    Each of the others ends at the first block boundary at which the text before a skill, and its seam, are computed and
    cached. Sent one after the other under one salt, each computes only what no skill holds (and the rest of a block).
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
    """The blocks that hold some tokens of a prompt."""
    return list(block_ids[tokens.start // block_size : -(-tokens.stop // block_size)])


def slots_of(block_ids: Sequence[int], tokens: Span, block_size: int) -> list[int]:
    """Each token's slot: its block's number times the block's size, and its place in the block."""
    return [block_ids[token // block_size] * block_size + token % block_size for token in tokens.range]


def _find(ids: Sequence[int], prompt: Sequence[int], after: int) -> int | None:
    needle, hay = array("I", ids), array("I", prompt)
    width = hay.itemsize
    wanted, text = needle.tobytes(), hay.tobytes()
    found = text.find(wanted, after * width)
    while found != -1 and found % width:  # a match that begins inside of a token is none
        found = text.find(wanted, found + 1)
    return None if found == -1 else found // width
