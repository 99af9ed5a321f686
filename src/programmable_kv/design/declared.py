"""What an author declares under `visibility="design"`: by what words lines speak of a field, and who else may read a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from programmable_kv.prompt.readers import declared_words

Words = Mapping[str, tuple[str, ...]]
"""field -> what else a line says when it speaks of it (`Notebook.mentions`)"""


class ReadBy(StrEnum):
    """Who may read a field's values, or a skill. Turns always may."""

    MENTIONS = "mentions"
    """of a field, the lines that mention or hold it: the default"""
    ALL = "all"
    """all text behind it"""
    TURNS = "turns"
    """nobody but turns: the default for a skill"""


@dataclass(frozen=True, slots=True)
class Declared:
    """What was declared for a context. Two of them are equal if the same was declared."""

    words: Words = field(default_factory=dict)
    read_by: Mapping[str, ReadBy] = field(default_factory=dict)
    """field or skill -> who may read it, where that is not the default"""

    def with_words(self, words: Words) -> Declared:
        """With more words of some fields."""
        joined = {name: tuple(dict.fromkeys((*self.words.get(name, ()), *said))) for name, said in words.items()}
        return replace(self, words={**self.words, **joined}) if joined else self

    def words_of(self, name: str) -> tuple[str, ...]:
        """What lines say when they speak of a field: its name, and all that was declared for it."""
        return (name, *declared_words(self.words, name))

    def readers_of(self, name: str) -> ReadBy:
        """Who may read a field."""
        return self.read_by.get(name, ReadBy.MENTIONS)

    def opens(self, skill: str) -> bool:
        """Whether text behind a skill reads it."""
        return self.read_by.get(skill) is ReadBy.ALL
