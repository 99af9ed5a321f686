"""Skills of a store as a gateway needs them: names, texts and token ids. Needs neither a model nor tensors."""

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
"""of the manifests that are read here (`storage.manifests.Entry.FORMAT`; a test holds the two together)"""


@dataclass(frozen=True, slots=True)
class StoredText:
    """One compiled skill."""

    key: str
    name: str
    text: str = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)


class StoredTexts:
    """The skills of a store. A manifest's name is a digest of its content, so that each is read once."""

    def __init__(self, where: str | Path | Blobs, tenants: Collection[str] = ()) -> None:
        """
        Args:
            tenants: all there are. A skill whose name begins with one of them and a dot is that tenant's alone; the others are
                published.

        Raises:
            StorageError: a URL's driver is not installed or cannot connect.
        """
        self._blobs = blobs_at(where)
        self._tenants = sorted(tenants, key=len, reverse=True)
        self._read: dict[str, StoredText] = {}

    def find(self, which: str, tenant: str) -> StoredText:
        """A skill by its key or its name, for a tenant.

        Raises:
            UnknownSkillError: there is none that the tenant may name, or more than one.
            CorruptFileError: its manifest is damaged.
            StorageError: the store cannot be read.
        """
        keys = self._keys()
        found = [self.of_key(which)] if which in keys else self.named(which)
        found = [each for each in found if self._owner(each.name) in (None, tenant)]
        if len(found) != 1:
            raise UnknownSkillError(
                f"there are {len(found)} skills called {which!r:.80} in the gateway's store: give a name that is there once, "
                "or a key. `pkv skills list` shows them."
            )
        return found[0]

    def named(self, name: str) -> list[StoredText]:
        """All intact skills of a name.

        Raises:
            StorageError: the store cannot be read.
        """
        return [each for each in map(self._intact, self._keys()) if each is not None and each.name == name]

    def of_key(self, key: str) -> StoredText:
        """A skill by its key.

        Raises:
            UnknownSkillError: there is none.
            CorruptFileError: its manifest is damaged.
            StorageError: the store cannot be read.
        """
        if key not in self._read:
            body = self._blobs.read(f"{key}.json")
            if body is None:
                raise UnknownSkillError(f"skill {key} is not in the gateway's store any more: compile it again")
            self._read[key] = _text_of(body, key)
        return self._read[key]

    def _owner(self, name: str) -> str | None:
        """Whose alone a skill is."""
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
        raise CorruptFileError(f"the manifest of skill {key} was damaged: compile the skill again") from error
    if form != _FORMAT:
        raise CorruptFileError(f"the manifest of skill {key} is of format {form}, and this version reads {_FORMAT}")
    return found
