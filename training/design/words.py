"""The words of a tokenizer's vocabulary, of which training makes names.

An answer repeats a name from the context, often in other tokens: " weigh", inside a rule, is one token, but "weigh", at
the beginning of an answer, is two. A model that was trained on the names of two thousand words misspelled others. The
vocabulary has about ten times as many.
"""

from __future__ import annotations

import re
from typing import Any

from programmable_kv.scenarios.vocabulary import held_out_words
from training.design.tool_words import held_out_tool_words

_WORD = re.compile(r"[Ġ▁]([a-z]{3,12})")
"""a token that is a space and a lower-case word, as byte-level BPE and SentencePiece write it"""
_FEWEST = 1000
"""a vocabulary with fewer words is not used"""


def vocabulary_words(tokenizer: Any) -> tuple[str, ...] | None:
    """Return the words that are one token after a space, without held-out ones. None: there are hardly any."""
    matches = (_WORD.fullmatch(token) for token in tokenizer.get_vocab())
    found = {match[1] for match in matches if match} - held_out_words() - held_out_tool_words()
    return tuple(sorted(found)) if len(found) >= _FEWEST else None
