"""Compiled skills on disk, or at any fsspec URL: addressed by content, bounded, written atomically, checked when read.

An entry is two files: `KEY.safetensors` (keys and values) and `KEY.json` (the manifest, with the tensors' digest). The
manifest is written last and by renaming, so a process that dies while writing leaves no entry, and never half of one.
KEY is a digest of all that decides the content: the model's fingerprint, the token ids, the preface, and the format.
Two processes that write the same key write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from programmable_kv.account import Account
from programmable_kv.cache.segment import Segment
from programmable_kv.errors import CorruptFileError, InvalidValueError, UnknownSkillError
from programmable_kv.models.fetch import home
from programmable_kv.models.load import Model
from programmable_kv.skills.skill import Draft, Preface, Skill, check_fingerprint, compute_drafts
from programmable_kv.storage.notebooks import SavedUnit, saved_unit, unit_of
from programmable_kv.storage.quantised import dequantised, quantised

DEFAULT_LIMIT = 4 * 2**30
"""bytes"""
_ABANDONED_SECONDS = 24 * 3600


class Entry(BaseModel):
    """The manifest of a stored skill."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    key: str
    name: str
    model_name: str
    fingerprint: str
    precision: Literal["as computed", "int8"]
    nbytes: int
    tensors_sha256: str
    values: dict[str, str]
    preface: str = ""
    preface_ids: tuple[int, ...] = ()
    unit: SavedUnit


class SkillStore:
    """A folder (or fsspec URL) of compiled skills; when it exceeds `limit` bytes, the least recently used go."""

    def __init__(self, where: str | Path | None = None, *, limit: int = DEFAULT_LIMIT, int8: bool = False) -> None:
        """
        Args:
            where: a folder or any URL that fsspec knows; `skills` in the per-user cache folder when None.
            limit: bytes of tensors to keep.
            int8: store keys per channel and values per token in 8 bits.
        """
        import fsspec

        self.limit = limit
        self.int8 = int8
        self._files, self._root = fsspec.core.url_to_fs(str(where if where is not None else home() / "skills"))
        self._files.makedirs(self._root, exist_ok=True)
        self._local = "file" in self._files.protocol

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, skill: Skill, *, model_name: str = "") -> Entry:
        """Keep a skill; returns its entry. One that is there already is written anew.

        Raises:
            InvalidValueError: it was kept in 8 bits before, and this store keeps skills as they were computed.
        """
        entry = self._put(skill, model_name)
        self._evict(keep={entry.key})
        return entry

    def _put(self, skill: Skill, model_name: str) -> Entry:
        if skill.rounded and not self.int8:
            raise InvalidValueError(
                f"skill {skill.name!r} comes from a store of 8 bits, and this one keeps skills as they were computed. "
                "Compile it again, or keep it in a store with int8=True."
            )
        key = key_of(skill.fingerprint, skill.preface_ids, skill.unit.ids, self.int8)
        tensors: dict[str, torch.Tensor] = {"computed_at": skill.segment.computed_at}
        for index, (keys, values) in enumerate(zip(skill.segment.keys, skill.segment.values, strict=True)):
            if self.int8:
                tensors |= quantised(f"keys.{index}", keys, over="tokens")
                tensors |= quantised(f"values.{index}", values, over="channels")
            else:
                tensors |= {f"keys.{index}": keys, f"values.{index}": values}
        body = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        entry = Entry(
            key=key,
            name=skill.name,
            model_name=model_name,
            fingerprint=skill.fingerprint,
            precision="int8" if self.int8 else "as computed",
            nbytes=len(body),
            tensors_sha256=hashlib.sha256(body).hexdigest(),
            values=dict(skill.values),
            preface=skill.preface,
            preface_ids=skill.preface_ids,
            unit=saved_unit(skill.unit),
        )
        self._write(f"{key}.safetensors", body)
        self._write_manifest(entry)
        return entry

    def compile(
        self,
        model: Model,
        text: str,
        values: Mapping[str, str] | None = None,
        /,
        *,
        name: str | None = None,
        role: str | None = None,
        preface: Preface = "",
        **fields: str,
    ) -> Skill:
        """The skill from the store if it is there, else compiled and kept. Arguments and errors as `Skill.compile`.

        An entry of the same tokens takes the name that is given here.
        """
        draft = Draft.of(model, text, {**(values or {}), **fields}, name, role, preface)
        return self._compiled(model, [draft], named=name is not None)[0]

    def compile_together(
        self,
        model: Model,
        texts: Mapping[str, str],
        values: Mapping[str, str] | None = None,
        /,
        *,
        preface: Preface = "",
        between: str = "",
        **fields: str,
    ) -> list[Skill]:
        """The skills from the store if all of them are there, else compiled and kept, all of them, whatever the limit.

        Arguments and errors as `Skill.compile_together`. Kept in 8 bits, none of them is exact anywhere.
        """
        drafts = Draft.together(model, texts, {**(values or {}), **fields}, preface, between)
        return self._compiled(model, drafts, named=True)

    def _compiled(self, model: Model, drafts: Sequence[Draft], *, named: bool) -> list[Skill]:
        """Drafts, each behind the one before it; `named`: the caller gave their names."""
        keys = [key_of(model.fingerprint, draft.preface_ids, draft.unit.ids, self.int8) for draft in drafts]
        if all(self._files.exists(self._path(f"{key}.json")) for key in keys):
            return [self._kept(model, key, draft, named) for key, draft in zip(keys, drafts, strict=True)]
        skills = compute_drafts(model, drafts)
        for skill in skills:
            self._put(skill, model.name)
        self._evict(keep=set(keys))
        if self.int8:  # what 8 bits keep is what everybody gets, the one who compiled it too
            return [
                replace(self.get(model, key), account=skill.account) for key, skill in zip(keys, skills, strict=True)
            ]
        return skills

    def _kept(self, model: Model, key: str, draft: Draft, named: bool) -> Skill:
        """The tokens are those of the entry; name, fields and text are the caller's."""
        kept = self.get(model, key)
        if named and kept.name != draft.name:
            self._write_manifest(self._read_entry(key).model_copy(update={"name": draft.name}))
        return replace(kept, name=draft.name, unit=draft.unit, values=draft.values, preface=draft.preface)

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, model: Model, which: str, *, verify: bool = True) -> Skill:
        """A stored skill by its key or name. With `verify` the tensors' digest is checked, which reads all of them.

        Raises:
            UnknownSkillError: there is none, or several of that name for this model.
            FingerprintMismatchError: another model compiled it.
            CorruptFileError: a file is damaged.
        """
        entry = self.entry(which, model.fingerprint)
        check_fingerprint(entry.name, entry.fingerprint, model)
        segment = self._segment(entry, model, verify)
        skill = Skill(
            entry.name, unit_of(entry.unit), entry.values, segment, entry.fingerprint, Account(), entry.preface,
            entry.preface_ids, entry.precision == "int8",
        )  # fmt: skip
        if self._local:
            Path(self._path(f"{entry.key}.json")).touch()
        return skill

    def entries(self) -> list[Entry]:
        """Every entry whose manifest is intact, most recently used first."""
        return self.inventory()[0]

    def damaged(self) -> list[str]:
        """The keys of entries whose manifest is not: `remove` takes them."""
        return self.inventory()[1]

    def inventory(self) -> tuple[list[Entry], list[str]]:
        """`entries` and `damaged`, in one reading."""
        intact, damaged = [], []
        for name, _ in sorted(self._manifests(), key=lambda item: -item[1]):
            key = name.removesuffix(".json")
            try:
                intact.append(self._read_entry(key))
            except CorruptFileError:
                damaged.append(key)
        return intact, damaged

    def entry(self, which: str, fingerprint: str | None = None) -> Entry:
        """The manifest of a key or a name; of several models' skills of one name, the one with that fingerprint.

        Raises:
            UnknownSkillError: there is none, or more than one.
            CorruptFileError: its manifest is damaged.
        """
        if self._files.exists(self._path(f"{which}.json")):
            return self._read_entry(which)
        found = [entry for entry in self.entries() if entry.name == which or entry.key.startswith(which)]
        if len(found) > 1 and fingerprint is not None:
            found = [entry for entry in found if entry.fingerprint == fingerprint]
        if len(found) != 1:
            raise UnknownSkillError(
                f"there are {len(found)} skills called {which!r} in {self._root}. `pkv skills list` shows them with their keys."
            )
        return found[0]

    def verify(self, which: str) -> Entry:
        """Read an entry's tensors and compare their digest with the manifest's.

        Raises:
            CorruptFileError: they differ.
        """
        entry = self.entry(which)
        self._checked(entry)
        return entry

    def remove(self, which: str) -> str:
        """Forget an entry (a damaged one too, by its key) and return its key.

        The manifest goes first, so that nobody finds half of it.

        Raises:
            UnknownSkillError: there is none, or more than one.
        """
        key = which if self._files.exists(self._path(f"{which}.json")) else self.entry(which).key
        for suffix in ("json", "safetensors"):
            if self._files.exists(self._path(f"{key}.{suffix}")):
                self._files.rm_file(self._path(f"{key}.{suffix}"))
        return key

    # -- carrying ------------------------------------------------------------------------------------------------

    def export(self, which: str, file: Path) -> Entry:
        """Write an entry to one file, to be imported elsewhere."""
        entry = self.verify(which)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for suffix in ("safetensors", "json"):
                archive.writestr(f"skill.{suffix}", self._read(f"{entry.key}.{suffix}"))
        partial.replace(file)
        return entry

    def import_file(self, file: Path) -> Entry:
        """Take in what `export` wrote. Nothing is kept unless all of it is intact.

        Raises:
            CorruptFileError: it is no exported skill, or is damaged.
        """
        try:
            with zipfile.ZipFile(file) as archive:
                body, manifest = archive.read("skill.safetensors"), archive.read("skill.json")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise CorruptFileError(f"{file} is not an exported skill: {error}") from error
        entry = _parsed(manifest, str(file))
        if hashlib.sha256(body).hexdigest() != entry.tensors_sha256 or not _true_key(entry):
            raise CorruptFileError(f"{file} was damaged or changed: export the skill again")
        self._write(f"{entry.key}.safetensors", body)
        self._write(f"{entry.key}.json", manifest)
        self._evict(keep={entry.key})
        return entry

    # -- files ---------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, name: str) -> bytes:
        try:
            return self._files.cat_file(self._path(name))  # type: ignore[no-any-return]
        except FileNotFoundError:
            raise CorruptFileError(f"{self._path(name)} is missing: remove the entry and compile it again") from None

    def _write(self, name: str, body: bytes) -> None:
        """The whole file or none of it. (An object store's put is atomic by itself.)"""
        if not self._local:
            self._files.pipe_file(self._path(name), body)
            return
        partial = Path(self._path(f".{name}.{uuid.uuid4().hex}.partial"))
        try:
            partial.write_bytes(body)
            partial.replace(self._path(name))
        finally:
            partial.unlink(missing_ok=True)

    def _write_manifest(self, entry: Entry) -> None:
        self._write(f"{entry.key}.json", entry.model_dump_json(indent=1).encode())

    def _manifests(self) -> Iterator[tuple[str, float]]:
        """(file name, time of last use) of every manifest."""
        for info in self._files.ls(self._root, detail=True, refresh=True):
            name = str(info["name"]).rpartition("/")[2]
            if name.endswith(".json") and not name.startswith("."):
                moment = info.get("mtime") or info.get("created") or 0.0
                yield name, moment.timestamp() if hasattr(moment, "timestamp") else float(moment)

    def _read_entry(self, key: str) -> Entry:
        entry = _parsed(self._read(f"{key}.json"), self._path(f"{key}.json"))
        if entry.key != key or not _true_key(entry):
            raise CorruptFileError(f"{self._path(key)}.json does not describe the entry it is named after: remove it")
        return entry

    def _checked(self, entry: Entry) -> bytes:
        body = self._read(f"{entry.key}.safetensors")
        if hashlib.sha256(body).hexdigest() != entry.tensors_sha256:
            raise CorruptFileError(
                f"the tensors of skill {entry.name!r} ({entry.key}) are not those of its manifest. Remove it and compile it "
                "again."
            )
        return body

    def _segment(self, entry: Entry, model: Model, verify: bool) -> Segment:
        body = self._checked(entry) if verify or not self._local else None
        try:
            # A local file that need not be checked is mapped: what is never touched is never read.
            tensors = load(body) if body is not None else load_file(self._path(f"{entry.key}.safetensors"))
        except (SafetensorError, FileNotFoundError) as error:
            raise CorruptFileError(f"the tensors of skill {entry.name!r} cannot be read: {error}") from error
        device, dtype = model.engine.device, model.engine.dtype
        layers = len(model.engine.layout.layers)

        def read(name: str) -> torch.Tensor:
            tensor = dequantised(tensors, name, dtype) if entry.precision == "int8" else tensors[name]
            return tensor.to(device)

        return Segment(
            entry.unit.ids,
            tensors["computed_at"],
            tuple(read(f"keys.{index}") for index in range(layers)),
            tuple(read(f"values.{index}") for index in range(layers)),
        )

    def _evict(self, keep: set[str]) -> None:
        if self._local:  # what a killed process was writing, a day later
            for path in Path(self._root).glob(".*.partial"):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in reversed(entries):
            if total <= self.limit:
                break
            if entry.key not in keep:
                self.remove(entry.key)
                total -= entry.nbytes


def key_of(fingerprint: str, preface_ids: tuple[int, ...], ids: tuple[int, ...], int8: bool) -> str:
    """The address of a skill: a digest of all that decides its content."""
    content: dict[str, object] = {"format": 1, "fingerprint": fingerprint, "ids": ids, "int8": int8}
    if preface_ids:
        content["preface"] = preface_ids
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _true_key(entry: Entry) -> bool:
    return entry.key == key_of(entry.fingerprint, entry.preface_ids, entry.unit.ids, entry.precision == "int8")


def _parsed(manifest: bytes, where: str) -> Entry:
    try:
        return Entry.model_validate_json(manifest)
    except (ValidationError, ValueError) as error:
        raise CorruptFileError(
            f"{where} is damaged or of another format: {' '.join(str(error).split())[:160]}"
        ) from error
