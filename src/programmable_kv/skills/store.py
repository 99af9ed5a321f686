"""The skill store: compiled skills in a folder or at any fsspec URL, by content, of bounded size, checked when read.

An entry is a sealed manifest and the tensors that it names (`entries.py`). Its key is a digest of everything that
determines the content: the model's fingerprint, the token ids, the preface, and the format. Several processes may
write, read and evict an entry at the same time, and be killed at any step: a reader gets a whole entry or none. Entries
that are damaged in another way are detected by their digests and compiled again.

The store only needs named blobs from its backend. Another backend (Redis, for example) is one new file: a subclass of
`storage.files.Blobs`, an instance of which is passed to `SkillStore(backend)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save

from programmable_kv.account import Account
from programmable_kv.design.declared import Words
from programmable_kv.design.visibility import Visibility
from programmable_kv.engine import Engine
from programmable_kv.errors import CorruptFileError, InvalidArgumentError, InvalidValueError, UnknownSkillError
from programmable_kv.models.home import home
from programmable_kv.models.load import Model
from programmable_kv.prompt.fields import TEXT, Value
from programmable_kv.prompt.values import check_name
from programmable_kv.skills.draft import Draft, Preface
from programmable_kv.skills.entries import Entries, check_key, new_name
from programmable_kv.skills.packing import check_packed, packed, shapes_in, unpacked
from programmable_kv.skills.skill import Skill, check_fingerprint, compute_drafts
from programmable_kv.storage.archive import read_archive, write_archive
from programmable_kv.storage.files import Blobs, blobs_at, sha256_of
from programmable_kv.storage.manifests import Entry, SavedType, SavedUnit, key_of, preface_digest, shortened
from programmable_kv.storage.tensors import LayerShape, cached_shapes, read_tensors

__all__ = ["DEFAULT_LIMIT", "Entry", "SkillStore"]

DEFAULT_LIMIT = 4 * 2**30
"""The default limit of a store, in bytes."""
_CARRIED = ("skill.safetensors", "skill.json")


class SkillStore:
    """A store of compiled skills; if it exceeds `limit` bytes, the least recently used ones are removed."""

    def __init__(
        self, where: str | Path | Blobs | None = None, *, limit: int = DEFAULT_LIMIT, int8: bool = False
    ) -> None:
        """
        Args:
            where: a folder (`~` is expanded), any URL that fsspec knows, or a backend; None means `skills` in the
                per-user cache folder. It is created on the first write. A read-only place can be read from.
            limit: the number of bytes of tensors to keep.
            int8: store in 8 bits, with one scale per channel for keys and one per token for values.

        Raises:
            InvalidArgumentError: the limit is negative, or `where` is not a folder, a known URL or a backend.
            StorageError: a URL's driver is not installed or cannot connect.
        """
        if limit < 0:
            raise InvalidArgumentError(f"a store's limit must be a number of bytes, at least 0; got {limit}")
        self.limit = limit
        self.int8 = int8
        self._entries = Entries(blobs_at(where if where is not None else home() / "skills"))
        self._shapes: WeakKeyDictionary[Engine, tuple[LayerShape, ...]] = WeakKeyDictionary()

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, skill: Skill, *, model_name: str = "") -> Entry:
        """Store a skill; returns its entry. An existing entry is replaced.

        Raises:
            InvalidValueError: the skill comes from a store of 8 bits, and this one has full precision; or its name is
                not plain.
            StorageError: the skill cannot be written; the store is unchanged.
        """
        entry = self._put(skill, model_name)
        self._entries.evict(self.limit, keep={entry.key})
        return entry

    def _put(self, skill: Skill, model_name: str) -> Entry:
        if skill.rounded and not self.int8:
            raise InvalidValueError(
                f"skill {skill.name!r} comes from an 8-bit store, but this store keeps full precision. Compile it "
                "again, or put it in a store with int8=True."
            )
        check_name(skill.name)
        key = key_of(skill.fingerprint, skill.preface_ids, skill.unit.ids, self.int8, skill.pieces, skill.mentions)
        body = save(packed(skill, int8=self.int8))
        entry = Entry(
            key=key,
            name=skill.name,
            model_name=model_name,
            fingerprint=skill.fingerprint,
            precision="int8" if self.int8 else "as computed",
            nbytes=len(body),
            tensors=new_name(key),
            tensors_sha256=sha256_of(body),
            values=dict(skill.values),
            types={name: SavedType.of(kind) for name, kind in skill.types.items() if kind != TEXT},
            preface=shortened(skill.preface),
            preface_tokens=len(skill.preface_ids),
            preface_sha256=preface_digest(skill.preface_ids),
            unit=SavedUnit.of(skill.unit),
            pieces=tuple(SavedUnit.of(piece) for piece in skill.pieces),
            mentions={name: tuple(words) for name, words in skill.mentions.items()},
        )
        self._entries.write(entry, body)
        return entry

    def compile(
        self,
        model: Model,
        text: str,
        values: Mapping[str, Value] | None = None,
        /,
        *,
        name: str | None = None,
        role: str | None = None,
        preface: Preface = "",
        visibility: str | Visibility = Visibility.CAUSAL,
        mentions: Words | None = None,
        **fields: Value,
    ) -> Skill:
        """Load a skill from the store if it is there and intact; else compile and store it.

        Arguments and errors are those of `Skill.compile`. An entry with the same tokens gets the name that is given
        here.

        Raises:
            StorageError: the store cannot be read; or the skill is not there and cannot be written.
        """
        draft = Draft.of(model, text, {**(values or {}), **fields}, name, role, preface, visibility, mentions)
        return self._compiled(model, [draft], named=name is not None)[0]

    def compile_together(
        self,
        model: Model,
        texts: Mapping[str, str],
        values: Mapping[str, Value] | None = None,
        /,
        *,
        preface: Preface = "",
        between: str = "",
        **fields: Value,
    ) -> list[Skill]:
        """Load skills from the store if all are there and intact; else compile and store them, regardless of the limit.

        Arguments and errors are those of `Skill.compile_together` and `compile`. Stored in 8 bits, none is ever exact.
        """
        drafts = Draft.together(model, texts, {**(values or {}), **fields}, preface, between)
        return self._compiled(model, drafts, named=True)

    def _compiled(self, model: Model, drafts: Sequence[Draft], *, named: bool) -> list[Skill]:
        """The skills of drafts, each behind the one before it; `named`: the caller gave their names."""
        kept = self._all_kept(model, drafts, named)
        if kept is not None:
            return kept
        skills = compute_drafts(model, drafts)
        entries = [self._put(skill, model.name) for skill in skills]
        self._entries.evict(self.limit, keep={entry.key for entry in entries})
        if self.int8:  # the first caller also gets the rounded skill that later callers will get
            return [self._rounded(model, skill, entry) for skill, entry in zip(skills, entries, strict=True)]
        return skills

    def _all_kept(self, model: Model, drafts: Sequence[Draft], named: bool) -> list[Skill] | None:
        """The drafts' skills if the store has all of them; None if one is missing, damaged or was just evicted."""
        keys = [
            key_of(model.fingerprint, draft.preface_ids, draft.unit.ids, self.int8, draft.pieces, draft.mentions)
            for draft in drafts
        ]
        if not all(self._entries.holds(key) for key in keys):
            return None
        skills = []
        for key, draft in zip(keys, drafts, strict=True):
            try:
                kept = self.get(model, key)
            except (CorruptFileError, UnknownSkillError):
                return None
            if kept.unit.ids != draft.unit.ids or kept.preface_ids != draft.preface_ids:
                return None  # the key matches but the tokens do not, so the entry cannot be trusted
            if named and kept.name != draft.name:
                self._entries.rename(key, draft.name)
            # The tokens equal the entry's; name, fields and text are taken from the caller.
            skills.append(
                replace(
                    kept,
                    name=draft.name,
                    unit=draft.unit,
                    values=draft.values,
                    preface=draft.preface,
                    types=draft.types,
                    pieces=draft.pieces,
                    mentions=draft.mentions,
                )
            )
        return skills

    def _rounded(self, model: Model, skill: Skill, entry: Entry) -> Skill:
        shapes = self._shapes_of(model)
        content = unpacked(packed(skill, int8=True), entry, shapes, entry.tensors, model.engine.device)
        return replace(skill, segment=content.segment, rounded=True)

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, model: Model, which: str, *, verify: bool = True) -> Skill:
        """Load a skill by its key or name. Without `verify`, its tensors' numbers are not checked and not all read.

        Raises:
            UnknownSkillError: there is no such skill, or several of that name for this model; or it was just evicted.
            FingerprintMismatchError: the skill was compiled by another model, tokenizer or dtype.
            CorruptFileError: a file is damaged, missing, of another format, or does not fit the model.
            StorageError: the store cannot be read.
        """
        entry = self.entry(which, model.fingerprint)
        check_fingerprint(entry.name, entry.fingerprint, model)
        entry, tensors, where = self._tensors(entry, verify=verify)
        entry.check(model, where)
        shapes = self._shapes_of(model)
        check_packed(tensors, entry, shapes, where, limit=model.position_limit, finite=verify)
        content = unpacked(tensors, entry, shapes, where, model.engine.device)
        self._entries.touch(entry.key)
        return Skill(
            entry.name,
            entry.unit.unit(),
            entry.values,
            content.segment,
            entry.fingerprint,
            Account(),
            content.preface,
            content.preface_ids,
            entry.precision == "int8",
            {name: kind.type(where) for name, kind in entry.types.items()},
            tuple(piece.unit() for piece in entry.pieces),
            dict(entry.mentions),
        )

    def entries(self) -> list[Entry]:
        """Every intact entry, most recently used first (most recently written, if the backend does not record uses)."""
        return self.inventory()[0]

    def damaged(self) -> list[str]:
        """The keys of entries that are damaged, of another format, or without tensors. `remove` accepts them."""
        return self.inventory()[1]

    def inventory(self) -> tuple[list[Entry], list[str]]:
        """`entries` and `damaged` in one listing. It checks that tensors exist; `verify` reads them."""
        return self._entries.inventory()

    def entry(self, which: str, fingerprint: str | None = None) -> Entry:
        """The manifest of an entry, looked up by key, by name, and by the beginning of a key, in this order.

        If several models have a skill of that name, `fingerprint` selects the model.

        Raises:
            UnknownSkillError: no entry matches, or more than one.
            CorruptFileError: the manifest is damaged.
        """
        return self._entries.entry(which, fingerprint)

    def verify(self, which: str) -> Entry:
        """Read an entry's tensors and compare them with the manifest: their digest and their content.

        Raises:
            UnknownSkillError: no entry matches, or more than one.
            CorruptFileError: the tensors do not match the manifest.
        """
        return self._verified(which)[0]

    def remove(self, which: str) -> str:
        """Remove an entry (also a damaged one) and return its key.

        The manifest is removed first, so that no reader finds half an entry.

        Raises:
            UnknownSkillError: no entry matches, or more than one.
            StorageError: the entry cannot be removed.
        """
        key = self._entries.find(which)
        self._entries.remove(key)
        return key

    # -- carrying ------------------------------------------------------------------------------------------------

    def export(self, which: str, file: str | Path) -> Entry:
        """Write an entry to one file, to be imported elsewhere. The file is written whole or not at all.

        Raises:
            UnknownSkillError, CorruptFileError: as in `verify`.
            StorageError: the file cannot be written.
        """
        entry, body = self._verified(which)
        write_archive(Path(file).expanduser(), dict(zip(_CARRIED, (body, entry.sealed()), strict=True)))
        return entry

    def import_file(self, file: str | Path) -> Entry:
        """Import a file that `export` wrote. Nothing is stored unless all of it is intact.

        Raises:
            CorruptFileError: the file is not an exported skill, or is damaged.
            StorageError: the file cannot be read, or the store cannot be written.
        """
        path = Path(file).expanduser()
        body, manifest = read_archive(path, _CARRIED)
        entry = Entry.read(manifest, str(path))
        check_key(entry, str(path))
        if len(body) != entry.nbytes or sha256_of(body) != entry.tensors_sha256:
            raise CorruptFileError(f"{path} is damaged or was changed: export the skill again")
        _check_content(entry, body, str(path))
        entry = entry.model_copy(update={"tensors": new_name(entry.key)})
        self._entries.write(entry, body)
        self._entries.evict(self.limit, keep={entry.key})
        return entry

    # -- parts -----------------------------------------------------------------------------------------------------

    def _tensors(self, entry: Entry, *, verify: bool) -> tuple[Entry, dict[str, torch.Tensor], str]:
        """The entry that the tensors belong to, the tensors, and their place for messages."""
        while True:
            entry, source = self._entries.tensors(entry, verify=verify)
            where = self._entries.place(entry.tensors)
            # A local file that need not be checked is memory-mapped: pages that are not used are not read.
            with suppress(FileNotFoundError):  # replaced or evicted before it was mapped: try again
                return entry, read_tensors(source, where), where

    def _verified(self, which: str) -> tuple[Entry, bytes]:
        entry, body = self._entries.tensors(self.entry(which))
        assert isinstance(body, bytes)
        _check_content(entry, body, self._entries.place(entry.tensors))
        return entry, body

    def _shapes_of(self, model: Model) -> tuple[LayerShape, ...]:
        """The shapes that this model caches; found by computing one token, once for each model."""
        if model.engine not in self._shapes:
            self._shapes[model.engine] = cached_shapes(model.engine)
        return self._shapes[model.engine]


def _check_content(entry: Entry, body: bytes, where: str) -> None:
    """
    Raises:
        CorruptFileError: the tensors cannot be a skill's of any model.
    """
    tensors = read_tensors(body, where)
    check_packed(tensors, entry, shapes_in(tensors, where), where)
