"""An author's declarations under `visibility="design"`: the words for a field, and who may read a field or a skill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from programmable_kv.prompt.readers import declared_words

Words = Mapping[str, tuple[str, ...]]
"""Field -> other words by which lines mention it (`Notebook.mentions`)."""


class ReadBy(StrEnum):
    """Who may read a field's values, or a skill. Turns always may."""

    MENTIONS = "mentions"
    """the lines that mention or contain the field; the default for a field"""
    ALL = "all"
    """all text after it"""
    TURNS = "turns"
    """only turns; the default for a skill"""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declarations of a context. Two are equal if they declare the same."""

    words: Words = field(default_factory=dict)
    read_by: Mapping[str, ReadBy] = field(default_factory=dict)
    """field or skill -> who may read it, if not the default"""

    def with_words(self, words: Words) -> Declared:
        """A copy with more words for some fields."""
        joined = {name: tuple(dict.fromkeys((*self.words.get(name, ()), *said))) for name, said in words.items()}
        return replace(self, words={**self.words, **joined}) if joined else self

    def words_of(self, name: str) -> tuple[str, ...]:
        """The words by which lines mention a field: its name, and the words declared for it."""
        return (name, *declared_words(self.words, name))

    def readers_of(self, name: str) -> ReadBy:
        """Who may read a field."""
        return self.read_by.get(name, ReadBy.MENTIONS)

    def opens(self, skill: str) -> bool:
        """Whether text after a skill reads it."""
        return self.read_by.get(skill) is ReadBy.ALL
