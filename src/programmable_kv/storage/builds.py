"""A build as saved in a manifest: what the slots of a context under `visibility="design"` contain, with its keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from programmable_kv.design.build import Build, Built
from programmable_kv.design.declared import Declared
from programmable_kv.errors import CorruptFileError

_SCHEME = 2
BuildKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class SavedBuilt(BaseModel):
    """Slots that were built together."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens: Annotated[int, Field(gt=0)]
    key: BuildKey | None
    rounded: bool = False


class SavedBuild(BaseModel):
    """What a context's slots contain, in order. The declarations are saved in the notebook's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    built: tuple[SavedBuilt, ...]
    scheme: int = 1
    """version of the scheme by which the keys were made"""

    @classmethod
    def of(cls, build: Build) -> SavedBuild:
        return cls(
            built=tuple(
                SavedBuilt(tokens=one.tokens, key=None if one.key is None else one.key.hex(), rounded=one.rounded)
                for one in build.built
            ),
            scheme=_SCHEME,
        )

    def check(self, tokens: int, where: str) -> None:
        """
        Raises:
            CorruptFileError: the keys have another scheme, or the slots are not `tokens` in number.
        """
        if self.scheme != _SCHEME:
            raise CorruptFileError(
                f"{where}: an earlier version saved it with incompatible build keys (scheme {self.scheme}; this "
                f"version uses {_SCHEME}): prefill the notebook again"
            )
        found = sum(one.tokens for one in self.built)
        if found != tokens:
            raise CorruptFileError(f"{where}: the build has {found} tokens, but the context has {tokens}")

    def build(self, declared: Declared) -> Build:
        return Build(
            tuple(
                Built(one.tokens, None if one.key is None else bytes.fromhex(one.key), one.rounded)
                for one in self.built
            ),
            declared,
        )
