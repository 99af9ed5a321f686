"""A ledger as saved in a manifest: its runs, and the versions that they read, each saved once.

A version's content is a digest. If it equals the digest of the tokens that precede the run now, the content is rebuilt
from these tokens, so that the run can be split after loading. Otherwise (in stale runs) a part that is split off later
counts as stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from programmable_kv.cache.span import Span
from programmable_kv.errors import CorruptFileError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin, Run
from programmable_kv.ledger.version import Content, Version
from programmable_kv.prompt.context import Context

Count = Annotated[int, Field(ge=0)]
ContentDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


ANOTHER = "\ue00f"
"""Stands for a value that was edited away, which is not saved anywhere; no value equals it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SavedContent(_Strict):
    digest: ContentDigest | None
    length: Count

    @classmethod
    def of(cls, content: Content) -> SavedContent:
        return cls(digest=None if content.digest is None else content.digest.hex(), length=content.length)

    def content(self) -> Content:
        return Content.saved(None if self.digest is None else bytes.fromhex(self.digest), self.length)


class SavedVersion(_Strict):
    content: SavedContent
    exact: bool
    seen: dict[str, tuple[str, ...]]
    preface: bool

    @classmethod
    def of(cls, version: Version, written: Mapping[str, frozenset[str]]) -> SavedVersion:
        """`written`: the values of each field in the saved text. Other values are saved as `ANOTHER`."""
        seen = {
            name: tuple(sorted(value if value in written.get(name, ()) else ANOTHER for value in values))
            for name, values in version.seen.items()
        }
        return cls(content=SavedContent.of(version.content), exact=version.exact, seen=seen, preface=version.preface)


class SavedRun(_Strict):
    length: Annotated[int, Field(gt=0)]
    version: Count
    """index into the ledger's versions"""
    statements: tuple[tuple[int, str, str], ...]
    origin: Origin
    skill: SavedContent | None


class SavedLedger(_Strict):
    """The runs of a context in slot order."""

    versions: tuple[SavedVersion, ...]
    runs: tuple[SavedRun, ...]

    @classmethod
    def of(cls, ledger: Ledger) -> SavedLedger:
        written = ledger.written_before(len(ledger))
        numbers: dict[int, int] = {}
        versions: list[SavedVersion] = []
        runs = []
        for run in ledger.runs:
            if id(run.version) not in numbers:
                numbers[id(run.version)] = len(versions)
                versions.append(SavedVersion.of(run.version, written))
            skill = None if run.skill is None else SavedContent.of(run.skill)
            number = numbers[id(run.version)]
            runs.append(
                SavedRun(length=len(run), version=number, statements=run.statements, origin=run.origin, skill=skill)
            )
        return cls(versions=tuple(versions), runs=tuple(runs))

    def check(self, tokens: int, where: str) -> None:
        """
        Raises:
            CorruptFileError: the runs do not have `tokens` tokens in total, or a run is not valid.
        """
        found = sum(run.length for run in self.runs)
        if found != tokens:
            raise CorruptFileError(f"{where}: the ledger has {found} tokens, but the context has {tokens}")
        for run in self.runs:
            if run.version >= len(self.versions) or run.origin is Origin.PENDING:
                raise CorruptFileError(f"{where}: the record of what a run of {run.length} tokens has read is missing")
            offsets = [offset for offset, _, _ in run.statements]
            if offsets != sorted(offsets) or not all(0 <= offset < run.length for offset in offsets):
                raise CorruptFileError(f"{where}: a value in a run of {run.length} tokens is outside the run")

    def ledger(self, context: Context) -> Ledger:
        """The ledger of a context, which must have as many tokens (see `check`)."""
        standing = Content.of()
        made: dict[tuple[int, bool], Version] = {}
        runs: list[Run] = []
        start = 0
        for saved in self.runs:
            tokens = context.packed(Span(start, start + saved.length))
            version = self.versions[saved.version]
            content = version.content.content()
            here = content.same(standing)
            key = (saved.version, here)
            if key not in made:
                seen = {name: frozenset(values) for name, values in version.seen.items()}
                made[key] = Version(standing if here else content, version.exact, seen, version.preface)
            skill = None
            if saved.skill is not None:
                skill = saved.skill.content()
                if skill.length <= start:
                    before = Content.of(context.packed(Span(start - skill.length, start)))
                    skill = before if skill.same(before) else skill
            runs.append(Run(tokens, made[key], saved.statements, saved.origin, skill))
            standing = standing.extended(tokens)
            start += saved.length
        return Ledger(runs)
