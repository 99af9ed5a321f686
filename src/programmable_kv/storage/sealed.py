"""Sealed manifests: validated data that is written with a seal and read back only if the seal is intact."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from programmable_kv.errors import CorruptFileError
from programmable_kv.storage.seal import opened, seal


class Sealed(BaseModel):
    """A manifest that is written with its digest and accepted only if it is unchanged."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    FORMAT: ClassVar[int]
    """number of the format; increased when versions must not read each other's manifests"""
    AGAIN: ClassVar[str]
    """advice for error messages: what to do about a manifest that cannot be used"""

    format: int

    def sealed(self) -> bytes:
        return seal(self.model_dump_json().encode())

    @classmethod
    def read(cls, sealed: bytes, where: str) -> Self:
        """
        Raises:
            CorruptFileError: a byte has changed, the format is another one, or it is another kind of manifest.
        """
        body = opened(sealed)
        try:
            if body is not None:
                return cls.model_validate_json(body)
            reason = "was damaged or changed by hand"
        except (ValidationError, ValueError, RecursionError) as error:
            reason = f"is not a valid manifest ({' '.join(str(error).split())[:160]})"
        found = _format(sealed)
        if found is not None and found != cls.FORMAT:
            reason = f"has format {found}, but this version reads and writes format {cls.FORMAT}"
        raise CorruptFileError(f"{where} {reason}: {cls.AGAIN}")


def _format(document: bytes) -> int | None:
    """The format number of a manifest, sealed or not, of this version or an older one; None if it has no number."""
    try:
        content: Any = json.loads(document)
    except (ValueError, RecursionError):
        return None
    for inner in ("manifest", "notebook"):  # in format 1 a notebook used "notebook", and a skill had no seal
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    found = content.get("format") if isinstance(content, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None
