"""The entries of a skill store: finds, lists, writes, replaces and evicts them as bytes, without a model or tensors.

An entry is two blobs: `KEY.json`, the sealed manifest, and `KEY.GENERATION.safetensors`, the tensors that it names.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Container
from contextlib import suppress
from pathlib import Path

from programmable_kv.errors import CorruptFileError, InvalidArgumentError, StorageError, UnknownSkillError
from programmable_kv.storage.files import Blobs, sha256_of
from programmable_kv.storage.manifests import Entry, entry_key
from programmable_kv.storage.pairs import clear_unused, write_pair

_KEY = re.compile(r"[0-9a-f]{32}\Z")
_MANIFEST = re.compile(r"([0-9a-f]{32})\.json\Z")
_TENSORS = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.safetensors\Z")


def new_name(key: str) -> str:
    """A name for the tensors of an entry that is unique to this write."""
    return f"{key}.{uuid.uuid4().hex[:16]}.safetensors"


def manifest_of(key: str) -> str:
    return f"{key}.json"


def check_key(entry: Entry, where: str) -> None:
    """
    Raises:
        CorruptFileError: the entry's key does not match its content, or the name of its tensors does not match its key.
    """
    if entry.key != entry_key(entry) or not entry.tensors.startswith(f"{entry.key}."):
        raise CorruptFileError(f"{where} does not match its key: {Entry.AGAIN}")


class Entries:
    """The entries under one root."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs

    def place(self, name: str) -> str:
        """A blob's name and root, for messages."""
        return f"{name} in {self.blobs.where}"

    # -- reading -------------------------------------------------------------------------------------------------

    def holds(self, key: str) -> bool:
        return self.blobs.exists(manifest_of(key))

    def read(self, key: str) -> Entry | None:
        """The manifest of a key; None if there is none.

        Raises:
            CorruptFileError: the manifest is damaged, or describes another entry.
        """
        body = self.blobs.read(manifest_of(key))
        if body is None:
            return None
        where = self.place(manifest_of(key))
        entry = Entry.read(body, where)
        check_key(entry, where)
        if entry.key != key:
            raise CorruptFileError(f"{where} is the manifest of another entry, {entry.key}: {Entry.AGAIN}")
        return entry

    def inventory(self) -> tuple[list[Entry], list[str]]:
        """The entries with an intact manifest and existing tensors, most recently used first; and all other keys."""
        listed = {blob.name: blob for blob in self.blobs.list()}
        manifests = [(blob, match.group(1)) for blob in listed.values() if (match := _MANIFEST.match(blob.name))]
        intact, damaged = [], []
        for _, key in sorted(manifests, key=lambda item: -item[0].used_at):
            try:
                entry = self._complete(key, listed)
            except CorruptFileError:
                damaged.append(key)
                continue
            if entry is not None:  # None: it was evicted after the listing
                intact.append(entry)
        return intact, damaged

    def _complete(self, key: str, listed: Container[str]) -> Entry | None:
        """The manifest of a key, whose tensors exist too; None if there is no manifest.

        Raises:
            CorruptFileError: the manifest is damaged, or its tensors are missing.
        """
        missing = ""
        while True:
            entry = self.read(key)
            if entry is None or entry.tensors in listed or self.blobs.exists(entry.tensors):
                return entry
            if entry.tensors == missing:
                break
            missing = entry.tensors  # the entry may just have been replaced: read it again
        raise CorruptFileError(f"the tensors {self.place(missing)} are missing: {Entry.AGAIN}")

    def find(self, which: str, fingerprint: str | None = None) -> str:
        """The key of an entry, looked up by key, by name, and by the beginning of a key, in this order.

        Damaged entries are found by their key. If several models have a skill of that name, `fingerprint` selects the
        model.

        Raises:
            InvalidArgumentError: `which` is not a string.
            UnknownSkillError: no entry matches, or more than one.
        """
        if not isinstance(which, str):
            raise InvalidArgumentError(f"a stored skill's name or key must be a string; got {which!r}")
        if _KEY.match(which) and self.holds(which):
            return which
        entries, damaged = self.inventory()
        named = [entry for entry in entries if entry.name == which]
        if len(named) > 1 and fingerprint is not None:
            named = [entry for entry in named if entry.fingerprint == fingerprint] or named
        found = [entry.key for entry in named]
        if not found and which:
            found = [key for key in (*(entry.key for entry in entries), *damaged) if key.startswith(which)]
        if len(found) != 1:
            known = f"are {len(found)} skills" if found else "is no skill"
            keys = f" ({', '.join(found[:4])}{', ...' if len(found) > 4 else ''}): give a key" if found else ""
            raise UnknownSkillError(
                f"there {known} called {which!r} in {self.blobs.where}{keys}. It was looked up as a key, as "
                "a name, and as the beginning of a key. `pkv skills list` shows all of them."
            )
        return found[0]

    def entry(self, which: str, fingerprint: str | None = None) -> Entry:
        """The manifest of the entry that `find` finds.

        Raises:
            UnknownSkillError: no entry matches, or more than one.
            CorruptFileError: the manifest is damaged.
        """
        entry = self.read(self.find(which, fingerprint))
        if entry is None:
            raise UnknownSkillError(f"skill {which!r} was just removed from {self.blobs.where}: compile it again")
        return entry

    def tensors(self, entry: Entry, *, verify: bool = True) -> tuple[Entry, bytes | Path]:
        """The tensors of an entry: bytes whose digest was checked; or without `verify` a local file, if there is one.

        Returned with the entry that they belong to, which is a newer one if the entry was replaced in the meantime.

        Raises:
            UnknownSkillError: the entry was removed in the meantime.
            CorruptFileError: the tensors are missing, or do not match the manifest.
        """
        while True:
            path = None if verify else self.blobs.local_path(entry.tensors)
            if path is not None:
                return entry, path
            body = self.blobs.read(entry.tensors)
            if body is not None:
                if len(body) != entry.nbytes or sha256_of(body) != entry.tensors_sha256:
                    raise CorruptFileError(
                        f"the tensors of skill {entry.name!r} ({self.place(entry.tensors)}) do not match its manifest: "
                        f"{Entry.AGAIN}"
                    )
                return entry, body
            newer = self.read(entry.key)
            if newer is None:
                raise UnknownSkillError(
                    f"skill {entry.name!r} was just removed from {self.blobs.where}: compile it again"
                )
            if newer.tensors == entry.tensors:
                break
            entry = newer
        raise CorruptFileError(
            f"the tensors of skill {entry.name!r} ({self.place(entry.tensors)}) are missing: {Entry.AGAIN}"
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, entry: Entry, body: bytes) -> None:
        """Write an entry; it replaces one with the same key.

        Raises:
            StorageError: the entry cannot be written; the store is unchanged.
        """

        def save() -> bytes:
            self.blobs.write(entry.tensors, body)
            return entry.sealed()

        write_pair(self.blobs, entry.tensors, manifest_of(entry.key), save, lambda: self._named_by(entry.key))

    def rename(self, key: str, name: str) -> None:
        """Give an entry another name. If the store is read-only or the entry is gone, nothing happens."""
        with suppress(StorageError):
            entry = self.read(key)
            if entry is None:
                return
            self.blobs.write(manifest_of(key), entry.model_copy(update={"name": name}).sealed())
            if not self.blobs.exists(entry.tensors):  # evicted in the meantime: do not leave half an entry
                self.blobs.remove(manifest_of(key))

    def touch(self, key: str) -> None:
        """Record a use, if the backend can."""
        self.blobs.touch(manifest_of(key))

    def remove(self, key: str) -> None:
        """Remove an entry; its manifest first, so that no reader finds half of it.

        Raises:
            StorageError: the entry cannot be removed.
        """
        self.blobs.remove(manifest_of(key))
        for blob in self.blobs.list():
            if blob.name.startswith(f"{key}."):
                self.blobs.remove(blob.name)

    def evict(self, limit: int, keep: Collection[str]) -> None:
        """Remove the least recently used entries, except those in `keep`, until the rest is at most `limit` bytes.

        Also removes what killed writers left behind. Blobs that cannot be removed stay.
        """
        entries, _ = self.inventory()
        total = sum(entry.nbytes for entry in entries)
        for entry in reversed(entries):
            if total <= limit:
                break
            if entry.key not in keep:
                with suppress(StorageError):
                    self.blobs.remove(manifest_of(entry.key))
                    self.blobs.remove(entry.tensors)
                    total -= entry.nbytes
        clear_unused(self.blobs, lambda name: bool(_TENSORS.match(name)), self._named)

    def _named_by(self, key: str) -> set[str] | None:
        """The names of the tensors in a key's manifest; None if it cannot be read."""
        try:
            entry = self.read(key)
        except StorageError:
            return None
        return set() if entry is None else {entry.tensors}

    def _named(self) -> set[str]:
        """The names of all tensors in use; if a manifest cannot be read (of a newer version), all with its key."""
        names = [blob.name for blob in self.blobs.list()]
        used: set[str] = set()
        for match in filter(None, map(_MANIFEST.match, names)):
            named = self._named_by(match.group(1))
            used |= {name for name in names if name.startswith(f"{match.group(1)}.")} if named is None else named
        return used
