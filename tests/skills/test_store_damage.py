"""Entries that are damaged, evicted or replaced while they are read, and read-only stores."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_store import TEXT, same

from backends import ReadOnlyBlobs
from conftest import tiny
from programmable_kv import Skill
from programmable_kv.errors import (
    CorruptFileError,
    StorageError,
    UnknownSkillError,
)
from programmable_kv.skills.store import Entry, SkillStore
from programmable_kv.storage.files import Blob
from programmable_kv.storage.local import LocalBlobs
from programmable_kv.storage.memory import MemoryBlobs
from programmable_kv.storage.seal import seal

DAMAGES = ("flip", "cut", "empty", "gone", "folder", "manifest", "emptied", "ids", "renamed", "replaced")


def damaged(folder: Path, entry: Entry, damage: str) -> str:
    """Damage an entry. Returns the key under which it is found."""
    tensors, manifest = folder / entry.tensors, folder / f"{entry.key}.json"
    body = bytearray(tensors.read_bytes())
    if damage == "flip":
        body[-7] ^= 4
        tensors.write_bytes(bytes(body))
    elif damage == "cut":
        tensors.write_bytes(bytes(body[:-9]))
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "gone":
        tensors.unlink()
    elif damage == "folder":
        for path in (tensors, manifest):
            path.unlink()
            path.mkdir()
            (path / "something").write_text("of somebody's")
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "emptied":
        manifest.write_bytes(b"")
    elif damage == "ids":
        manifest.write_text(manifest.read_text().replace('"ids":[', '"ids":[7,'))
    elif damage == "replaced":
        other = SkillStore(folder).put(Skill.compile(tiny(), "another text.", name="another"))
        manifest.write_bytes((folder / f"{other.key}.json").read_bytes())
    else:
        manifest.rename(folder / f"{'0' * 32}.json")
        return "0" * 32
    return entry.key


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_corrupt_is_served(tmp_path: Path, damage: str) -> None:
    store = SkillStore(tmp_path)
    key = damaged(tmp_path, store.put(Skill.compile(tiny(), TEXT, name="refunds", tier="gold")), damage)
    with pytest.raises(CorruptFileError):
        store.get(tiny(), key)
    with pytest.raises(CorruptFileError):
        store.verify(key)
    if damage not in ("flip", "cut", "empty"):  # listing does not read tensors
        assert key in store.damaged()
        assert "refunds" not in [entry.name for entry in store.entries()]
    with pytest.raises(CorruptFileError):
        store.export(key, tmp_path / "out.skill")
    assert not (tmp_path / "out.skill").exists()
    store.remove(key)
    with pytest.raises(UnknownSkillError):
        store.get(tiny(), key)
    assert not [path for path in tmp_path.glob(f"{key}*") if path.is_file()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_compiled_again(tmp_path: Path, damage: str) -> None:
    model, store = tiny(), SkillStore(tmp_path)
    texts = {"policy": TEXT, "dates": "dates come first.\n"}
    whole = store.compile_together(model, texts, tier="gold")
    damaged(tmp_path, store.entry("policy"), damage)
    for computes in (True, False):
        skills = store.compile_together(model, texts, tier="gold")
        assert [skill.account.tokens_computed > 0 for skill in skills] == [computes] * 2
        for one, two in zip(skills, whole, strict=True):
            same(one, two)
    damaged(tmp_path, store.entry("policy"), damage)
    assert store.compile(model, TEXT, tier="gold").account.tokens_computed > 0
    assert store.compile(model, TEXT, tier="gold").account.tokens_computed == 0


def test_no_flipped_bit_is_served(tmp_path: Path) -> None:
    """One bit of every byte of both files is flipped. Tensors too are refused when their digest is checked."""
    model, store = tiny(), SkillStore(tmp_path)
    entry = store.put(Skill.compile(model, "no.", name="short"))
    for path in (tmp_path / f"{entry.key}.json", tmp_path / entry.tensors):
        whole = path.read_bytes()
        for place in range(len(whole)):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            path.write_bytes(bytes(spoiled))
            with pytest.raises(CorruptFileError):
                store.get(model, entry.key)
        path.write_bytes(whole)
    assert store.get(model, entry.key).name == "short"


def test_an_older_format_is_told_apart_from_damage(tmp_path: Path) -> None:
    store = SkillStore(tmp_path)
    key = store.put(Skill.compile(tiny(), "one thing.", name="one")).key
    old = {"format": 1, "key": key, "name": "one", "fingerprint": "x", "preface_ids": [1, 2]}
    (tmp_path / f"{key}.json").write_text(json.dumps(old, indent=1))
    with pytest.raises(CorruptFileError, match=r"format 1, but this version reads and writes format 2.*compile"):
        store.get(tiny(), key)
    (tmp_path / f"{key}.json").write_bytes(seal(b'{"format": 3, "key": "of a later version"}'))
    with pytest.raises(CorruptFileError, match="format 3"):
        store.get(tiny(), key)
    store.put(Skill.compile(tiny(), "another thing.", name="two"))
    assert len(list(tmp_path.glob(f"{key}.*.safetensors"))) == 1, "the tensors of another version are not ours to clear"


def test_a_damaged_manifest_is_in_nobodys_way(tmp_path: Path) -> None:
    model, store = tiny(), SkillStore(tmp_path, limit=1)
    store.compile(model, "one thing.", name="one")
    key = store.entry("one").key
    (tmp_path / f"{key}.json").write_text("{}", encoding="utf-8")
    store.compile(model, "another thing.", name="two")
    assert [entry.name for entry in store.entries()] == ["two"]
    assert store.damaged() == [key]
    with pytest.raises(CorruptFileError):
        store.verify(key)
    assert store.remove(key) == key
    assert store.damaged() == []
    assert not list(tmp_path.glob(f"{key}*"))


class Interrupted(LocalBlobs):
    """A folder in which something happens directly after the tensors are read."""

    then: Any = None

    def _read(self, name: str) -> bytes:
        body = super()._read(name)
        if name.endswith(".safetensors") and self.then is not None:
            happen, self.then = self.then, None
            happen()
        return body


def test_an_entry_that_is_evicted_before_its_use_is_recorded_stays_evicted(tmp_path: Path) -> None:
    model, blobs = tiny(), Interrupted(tmp_path)
    store, other = SkillStore(blobs), SkillStore(tmp_path)
    store.compile(model, TEXT, name="refunds", tier="gold")
    blobs.then = lambda: other.remove("refunds")
    assert store.compile(model, TEXT, name="renamed", tier="gold").account.tokens_computed == 0
    assert list(tmp_path.iterdir()) == []
    assert store.compile(model, TEXT, name="refunds", tier="gold").account.tokens_computed > 0
    assert store.get(model, "refunds").name == "refunds"


@pytest.mark.parametrize("moment", ["found", "read"])
@pytest.mark.parametrize("verify", [True, False])
def test_an_entry_that_is_evicted_while_it_is_read_is_gone(tmp_path: Path, moment: str, verify: bool) -> None:
    """Another process evicts it after its key was found, or after its manifest was read."""
    model, other = tiny(), SkillStore(tmp_path)

    class Evicted(LocalBlobs):
        def _exists(self, name: str) -> bool:
            there = super()._exists(name)
            if moment == "found":
                other.remove(key)
            return there

        def _read(self, name: str) -> bytes:
            body = super()._read(name)
            if moment == "read":
                other.remove(key)
            return body

    key = other.put(Skill.compile(model, TEXT, name="refunds", tier="gold")).key
    store = SkillStore(Evicted(tmp_path))
    with pytest.raises(UnknownSkillError, match=r"just removed"):
        store.get(model, key, verify=verify)
    other.compile(model, TEXT, tier="gold")
    assert store.compile(model, TEXT, tier="gold").account.tokens_computed > 0


@pytest.mark.parametrize("verify", [True, False])
def test_an_entry_that_is_replaced_while_it_is_read(tmp_path: Path, verify: bool) -> None:
    """Another process rewrites the entry after its manifest was read: the reader gets the new entry."""
    model = tiny()
    skill = Skill.compile(model, TEXT, name="refunds", tier="gold")

    class Slow(LocalBlobs):
        def _read(self, name: str) -> bytes:
            body = super()._read(name)
            if name.endswith(".json") and not seen:
                seen.append(name)
                SkillStore(tmp_path).put(skill)
            return body

    seen: list[str] = ["not yet"]
    store = SkillStore(Slow(tmp_path))
    key = store.put(skill).key
    seen.clear()
    same(store.get(model, key, verify=verify), skill)
    assert seen


def test_a_store_that_may_only_be_read_serves(tmp_path: Path) -> None:
    model, full = tiny(), MemoryBlobs()
    skill = SkillStore(full).compile(model, TEXT, name="refunds", tier="gold")
    backend = ReadOnlyBlobs(full.contents)
    before = dict(full.contents)
    store = SkillStore(backend)
    same(store.get(model, "refunds"), skill)
    hit = store.compile(model, TEXT, name="other", tier="gold")
    assert (hit.name, hit.account.tokens_computed) == ("other", 0)
    assert backend.contents == before
    with pytest.raises(StorageError, match="Permission denied"):
        store.compile(model, "something else.")
    with pytest.raises(StorageError, match="Permission denied"):
        store.remove("refunds")


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """A folder that this process may read but not write, even if it runs as root."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_only_be_read_serves(nobodys_folder: Path) -> None:
    model, store = tiny(), SkillStore(nobodys_folder)
    skill = store.compile(model, TEXT, name="refunds", tier="gold")
    before = {path.name: (path.stat().st_mtime, path.read_bytes()) for path in nobodys_folder.iterdir()}
    nobodys_folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    same(store.get(model, "refunds"), skill)
    hit = store.compile(model, TEXT, name="other", tier="gold")
    assert (hit.name, hit.account.tokens_computed) == ("other", 0)
    with pytest.raises(StorageError, match="permissions"):
        store.put(skill)
    assert {path.name: (path.stat().st_mtime, path.read_bytes()) for path in nobodys_folder.iterdir()} == before


def test_an_entry_that_is_replaced_while_it_is_listed_is_not_damaged(tmp_path: Path) -> None:
    skill = Skill.compile(tiny(), TEXT, name="refunds", tier="gold")
    other = SkillStore(tmp_path)

    class Busy(LocalBlobs):
        """Another process rewrites the entry after the listing, and again after the manifest is read."""

        def _list(self) -> Iterator[Blob]:
            found = list(super()._list())
            other.put(skill)
            return iter(found)

        def _exists(self, name: str) -> bool:
            if name.endswith(".safetensors") and not seen:
                seen.append(name)
                other.put(skill)
            return super()._exists(name)

    seen: list[str] = []
    other.put(skill)
    entries, damaged = SkillStore(Busy(tmp_path)).inventory()
    assert ([entry.name for entry in entries], damaged, len(seen)) == (["refunds"], [], 1)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "folder", "manifest", "ids"])
def test_without_verify_too(tmp_path: Path, damage: str) -> None:
    store = SkillStore(tmp_path)
    key = damaged(tmp_path, store.put(Skill.compile(tiny(), TEXT, name="refunds", tier="gold")), damage)
    with pytest.raises(CorruptFileError):
        store.get(tiny(), key, verify=False)
