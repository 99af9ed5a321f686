"""Tokenises text so that special tokens appear only where the author means them, and plain text everywhere else.

A tokenizer turns `<|endoftext|>` into a control token wherever it finds it, even in a README. In a value or a message
it is text. `encode` therefore tokenises such text with the same normaliser, pre-tokenizer and model, but without
looking for that special token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError
from programmable_kv.prompt.characters import without_byte_order_mark
from programmable_kv.prompt.parts import shielded

Offsets = NDArray[np.int32]
"""[n, 2]: the first character of each token, and the character after its last."""


def encode(
    tokenizer: Any, text: str, plain: Sequence[Span] = (), *, special: bool = False
) -> tuple[tuple[int, ...], Offsets]:
    """Token ids and offsets of a text.

    Args:
        plain: characters that are plain text even where they spell a special token, in any order. If the tokenizer
            finds no special token there, the result is the tokenizer's own.
        special: whether the tokenizer adds the special tokens that begin and end every text.

    Raises:
        InvalidValueError: the tokenizer's ordinary vocabulary also has a special token for text in `plain`, so the text
            cannot be written without that token.
    """
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    held = [span for span in plain if len(span)]
    if not held:
        return _as_arrays(ids, offsets)
    added = _added(tokenizer)
    if added.keys().isdisjoint(ids):
        return _as_arrays(ids, offsets)
    matched = [
        at for at, token in enumerate(ids) if token in added and _matches(added, token, text[slice(*offsets[at])])
    ]
    unmeant = {at for at in matched if _touches(offsets[at], held)}
    if not unmeant:
        return _as_arrays(ids, offsets)
    meant = [at for at in matched if at not in unmeant]
    tokens = [(ids[at], offsets[at]) for at in meant] + _without_added(tokenizer, text, [offsets[at] for at in meant])
    tokens.sort(key=lambda token: token[1][0])  # stable: the tokens of one character stay in order
    before, after = _around(ids, offsets, added) if special else (0, len(ids))
    found = [*ids[:before], *(token for token, _ in tokens), *ids[after:]]
    where = [*offsets[:before], *(span for _, span in tokens), *offsets[after:]]
    for token, span in zip(found, where, strict=True):
        if _matches(added, token, text[slice(*span)]) and _touches(span, held):
            raise InvalidValueError(
                f"this tokenizer also has {added[token]!r} in its vocabulary as a word, so the text {text[slice(*span)]!r} "
                "cannot be distinguished from that control token. Remove it, or write it differently."
            )
    return _as_arrays(found, where)


def _around(ids: Sequence[int], offsets: Sequence[tuple[int, int]], added: Collection[int]) -> tuple[int, int]:
    """The number of tokens that the tokenizer added before the text, and the index of the first one added after it."""
    own = [token in added and stop == start for token, (start, stop) in zip(ids, offsets, strict=True)]
    return own.index(False), len(own) - own[::-1].index(False)


def as_text(text: str, tokenizer: Any, what: str) -> str:
    """The text with every special token marked as plain text (see `shielded`), for what a person or a tool said.

    A byte order mark at the beginning is removed.

    Raises:
        InvalidValueError: the text is not a string, contains the private-use characters used as marks, or contains a
            special token that this tokenizer cannot write as text.
    """
    if not isinstance(text, str):
        raise InvalidValueError(f"{what} must be a string, got {type(text).__name__}")
    text = without_byte_order_mark(text)
    found = special_tokens_in(text, tokenizer)
    marked = shielded(text, found, what)
    if found:
        encode(tokenizer, text, found)
    return marked


def special_tokens_in(text: str, tokenizer: Any) -> list[Span]:
    """The characters of every special token that the tokenizer would find in a text, ascending.

    Some special tokens include the white space around them. It is left out of the spans, since a chat template may trim
    it.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    if not any(entry.normalized or entry.content in text for entry in added):
        return []  # searching is cheaper than tokenising; a normalised token may be spelled differently here
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if not encoded["input_ids"]:
        return []
    special = _added(tokenizer, special_only=True)
    special |= {token: content for token, content in _added(tokenizer).items() if token in tokenizer.all_special_ids}
    return [
        _trimmed(text, *span)
        for token, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if _matches(special, token, text[slice(*span)])
    ]


def _trimmed(text: str, start: int, stop: int) -> Span:
    piece = text[start:stop]
    return Span(start + len(piece) - len(piece.lstrip()), stop - len(piece) + len(piece.rstrip()))


def _added(tokenizer: Any, *, special_only: bool = False) -> dict[int, str]:
    """Added tokens (id -> text), which the tokenizer looks for first. White-space ones count as ordinary words."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {
        token: entry.content
        for token, entry in added.items()
        if entry.content.strip() and (entry.special or not special_only)
    }


def _matches(added: Mapping[int, str], token: int, text: str) -> bool:
    """Whether the tokenizer gave this token because it found an added token in the text.

    The tokens for an unknown character and for a byte (`<0x3A>`) also result from other text, which is shorter than
    they are.
    """
    return token in added and len(text) >= len(added[token].strip())


def _touches(span: tuple[int, int], plain: Collection[Span]) -> bool:
    return any(span[0] < held.stop and held.start < span[1] for held in plain)


def _without_added(tokenizer: Any, text: str, without: Sequence[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """(token, offsets) of the text between the spans `without`, tokenised without looking for added tokens."""
    from tokenizers import PreTokenizedString

    backend = tokenizer.backend_tokenizer
    pieces = PreTokenizedString(text)

    def between(_: int, whole: Any) -> list[Any]:
        kept, cursor = [], 0
        for start, stop in [*without, (len(text), len(text))]:
            if start > cursor:
                kept.append(whole[cursor:start])
            cursor = stop
        return kept

    pieces.split(between)
    if backend.normalizer is not None:
        pieces.normalize(backend.normalizer.normalize)
    if backend.pre_tokenizer is not None:
        backend.pre_tokenizer.pre_tokenize(pieces)
    pieces.tokenize(backend.model.tokenize)
    encoding = backend.post_process(pieces.to_encoding(), None, False)
    return list(zip(encoding.ids, encoding.offsets, strict=True))


def _as_arrays(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], Offsets]:
    return tuple(ids), np.array(offsets, dtype=np.int32).reshape(-1, 2)
