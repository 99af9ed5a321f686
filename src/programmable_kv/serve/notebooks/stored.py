"""Reads the names, texts and token ids of a store's skills. This needs neither a model nor tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programmable_kv.errors import CorruptFileError, UnknownSkillError
from programmable_kv.storage.files import Blobs, blobs_at
from programmable_kv.storage.seal import opened

_MANIFEST = re.compile(r"([0-9a-f]{32})\.json")
_FORMAT = 2
"""The format of the manifests that this module reads. A test compares it with `storage.manifests.Entry.FORMAT`."""


@dataclass(frozen=True, slots=True)
class StoredText:
    """One compiled skill."""

    key: str
    name: str
    text: str = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)


class StoredTexts:
    """The skills of a store. A manifest's name is a digest of its content, so each manifest is read only once."""

    def __init__(self, where: str | Path | Blobs, tenants: Collection[str] = ()) -> None:
        """
        Args:
            tenants: all tenants. A skill whose name begins with a tenant's name and a dot is for this tenant alone. All
                other skills are for every tenant.

        Raises:
            StorageError: a URL's driver is not installed or cannot connect.
        """
        self._blobs = blobs_at(where)
        self._tenants = sorted(tenants, key=len, reverse=True)
        self._read: dict[str, StoredText] = {}

    def find(self, which: str, tenant: str) -> StoredText:
        """Return a skill by its key or its name, for a tenant.

        Raises:
            UnknownSkillError: the tenant may name no such skill, or more than one.
            CorruptFileError: the skill's manifest is damaged.
            StorageError: the store cannot be read.
        """
        keys = self._keys()
        found = [self.of_key(which)] if which in keys else self.named(which)
        found = [each for each in found if self._owner(each.name) in (None, tenant)]
        if len(found) != 1:
            raise UnknownSkillError(
                f"there are {len(found)} skills called {which!r:.80} in the gateway's store: give a unique name, "
                "or a key. `pkv skills list` shows them."
            )
        return found[0]

    def named(self, name: str) -> list[StoredText]:
        """Return all skills of a name whose manifests are intact.

        Raises:
            StorageError: the store cannot be read.
        """
        return [each for each in map(self._intact, self._keys()) if each is not None and each.name == name]

    def of_key(self, key: str) -> StoredText:
        """Return a skill by its key.

        Raises:
            UnknownSkillError: the store has no such skill.
            CorruptFileError: the skill's manifest is damaged.
            StorageError: the store cannot be read.
        """
        if key not in self._read:
            body = self._blobs.read(f"{key}.json")
            if body is None:
                raise UnknownSkillError(f"skill {key} is no longer in the gateway's store: compile it again")
            self._read[key] = _text_of(body, key)
        return self._read[key]

    def _owner(self, name: str) -> str | None:
        """The only tenant that may name a skill; None if every tenant may."""
        return next((tenant for tenant in self._tenants if name.startswith(f"{tenant}.")), None)

    def _keys(self) -> list[str]:
        matches = (_MANIFEST.fullmatch(blob.name) for blob in self._blobs.list())
        return [match[1] for match in matches if match is not None]

    def _intact(self, key: str) -> StoredText | None:
        try:
            return self.of_key(key)
        except (CorruptFileError, UnknownSkillError):
            return None


def _text_of(sealed: bytes, key: str) -> StoredText:
    body = opened(sealed)
    try:
        manifest: Any = json.loads(body) if body is not None else {}
        unit, name, form = manifest["unit"], manifest["name"], manifest["format"]
        found = StoredText(key, str(name), str(unit["text"]), tuple(map(int, unit["ids"])))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"the manifest of skill {key} is damaged: compile the skill again") from error
    if form != _FORMAT:
        raise CorruptFileError(f"the manifest of skill {key} has format {form}, but this version reads {_FORMAT}")
    return found
