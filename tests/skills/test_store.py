"""The store: entries can be read again, corrupt ones are never served, processes may die or race, and limits hold."""

from __future__ import annotations

import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv import Notebook, SeamRepair, Skill
from programmable_kv.errors import (
    CorruptFileError,
    FingerprintMismatchError,
    InvalidArgumentError,
    InvalidValueError,
    StorageError,
    UnknownSkillError,
)
from programmable_kv.skills.store import SkillStore
from programmable_kv.states import TokenState
from programmable_kv.storage.memory import MemoryBlobs

TEXT = "refund policy: if the tier is {tier} refund, else deny. reply only with the action.\n"


def same(one: Skill, two: Skill) -> None:
    assert one.unit == two.unit
    assert one.values == two.values
    for ours, theirs in zip(
        (*one.segment.keys, *one.segment.values), (*two.segment.keys, *two.segment.values), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.fixture(params=["folder", "memory", "backend"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SkillStore:
    """The store on a folder, on an fsspec filesystem, and on a custom backend."""
    places: dict[str, Any] = {
        "folder": tmp_path / "skills",
        "memory": f"memory://{tmp_path.name}",
        "backend": MemoryBlobs(),
    }
    return SkillStore(places[request.param])


def test_what_is_put_in_comes_out(store: SkillStore) -> None:
    skill = Skill.compile(tiny(), TEXT, name="refunds", tier="gold")
    entry = store.put(skill)
    assert len(entry.key) == 32
    for which in ("refunds", entry.key, entry.key[:10]):
        same(store.get(tiny(), which), skill)
    same(store.get(tiny(), "refunds", verify=False), skill)
    notebook = Notebook(tiny()).message("system", "agent. {refunds} reply.", refunds=store.get(tiny(), "refunds"))
    notebook.prefill()
    assert notebook.fields == {"tier": "gold"}


def test_compiling_again_computes_nothing(store: SkillStore) -> None:
    first = store.compile(tiny(), TEXT, name="refunds", tier="gold")
    again = store.compile(tiny(), TEXT, name="other", tier="gold")
    assert first.account.tokens_computed == len(first)
    assert again.account.tokens_computed == 0
    assert again.name == "other"
    same(first, again)
    assert len(store.entries()) == 1
    assert store.compile(tiny(), TEXT, tier="silver").account.tokens_computed > 0


def test_a_preface_is_part_of_the_address(store: SkillStore) -> None:
    alone = store.compile(tiny(), TEXT, name="refunds", tier="gold")
    behind = store.compile(tiny(), TEXT, name="informed", tier="gold", preface="dates come first.")
    assert behind.account.tokens_computed > alone.account.tokens_computed
    assert {entry.preface for entry in store.entries()} == {"", "dates come first."}
    kept = store.compile(tiny(), TEXT, name="informed", tier="gold", preface="dates come first.")
    assert kept.account.tokens_computed == 0
    same(kept, behind)
    assert kept.preface_ids == store.get(tiny(), "informed").preface_ids == behind.preface_ids
    chat = store.compile(tiny(), TEXT, tier="gold", preface=[("system", "dates come first.")])
    assert chat.preface == "<|im_start|>system\ndates come first."
    assert len(store.entries()) == 3
    unnamed = store.compile(tiny(), TEXT, tier="gold")
    assert unnamed.name != chat.name, "a default name tells prefaces apart"
    assert not torch.equal(alone.segment.values[-1], behind.segment.values[-1])


def test_other_models_and_unknown_names_are_refused(store: SkillStore) -> None:
    store.compile(tiny(), TEXT, name="refunds", tier="gold")
    with pytest.raises(FingerprintMismatchError, match="compile it again"):
        store.get(tiny("qwen2"), "refunds")
    with pytest.raises(UnknownSkillError, match="there is no skill called"):
        store.get(tiny(), "dates")
    store.compile(tiny("qwen2"), TEXT, name="refunds", tier="gold")
    same(store.get(tiny("qwen2"), "refunds"), Skill.compile(tiny("qwen2"), TEXT, name="refunds", tier="gold"))
    with pytest.raises(UnknownSkillError, match="2 skills"):
        store.entry("refunds")


def test_export_and_import(tmp_path: Path) -> None:
    one, two = SkillStore(tmp_path / "one"), SkillStore(tmp_path / "two")
    skill = one.compile(tiny(), TEXT, name="refunds", tier="gold")
    one.export("refunds", tmp_path / "refunds.skill")
    two.import_file(tmp_path / "refunds.skill")
    same(two.get(tiny(), "refunds"), skill)
    body = bytearray((tmp_path / "refunds.skill").read_bytes())
    body[len(body) // 2] ^= 1
    (tmp_path / "bad.skill").write_bytes(bytes(body))
    with pytest.raises(CorruptFileError):
        SkillStore(tmp_path / "three").import_file(tmp_path / "bad.skill")
    assert SkillStore(tmp_path / "three").entries() == []
    one.remove("refunds")
    assert list((tmp_path / "one").iterdir()) == []
    entry = two.import_file(tmp_path / "refunds.skill")  # the second import replaces the first
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted([f"{entry.key}.json", entry.tensors])


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    store = SkillStore(tmp_path)
    sizes = []
    for number in range(3):
        sizes.append(store.put(Skill.compile(tiny(), f"skill number {number} says so.\n", name=f"s{number}")).nbytes)
        time.sleep(0.02)
    store.get(tiny(), "s0")
    time.sleep(0.02)
    store.limit = sum(sizes)
    store.put(Skill.compile(tiny(), "a fourth skill is here.\n", name="s3"))
    assert [entry.name for entry in store.entries()] == ["s3", "s0", "s2"]


def test_eight_bits(tmp_path: Path) -> None:
    """8-bit entries take at most 0.55 of the bytes of 16-bit tensors, and give logits of nearly the same direction."""
    model = tiny(dtype=torch.bfloat16)
    plain, small = SkillStore(tmp_path / "plain"), SkillStore(tmp_path / "small", int8=True)
    skill = plain.compile(model, TEXT * 8, name="refunds", tier="gold")
    small.put(skill)
    assert small.entry("refunds").nbytes <= 0.62 * plain.entry("refunds").nbytes  # tiny heads: a scale per 8 channels
    back = small.get(model, "refunds")
    for ours, theirs in zip(back.segment.values, skill.segment.values, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (
            float(torch.nn.functional.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0))
            > 0.999
        )


def test_what_was_rounded_is_never_exact(tmp_path: Path) -> None:
    plain, small = SkillStore(tmp_path / "plain"), SkillStore(tmp_path / "small", int8=True)
    before = [("system", "")]
    for store, exact in ((plain, True), (small, False)):
        store.compile(tiny(), TEXT, name="refunds", tier="gold", preface=before)
        first = store.compile(tiny(), TEXT * 2, tier="gold", preface=before)
        for skill in (first, store.get(tiny(), "refunds"), store.compile(tiny(), TEXT, tier="gold", preface=before)):
            notebook = Notebook(tiny()).message("system", "{" + skill.name + "}", **{skill.name: skill})
            notebook.prefill(repair=SeamRepair(0))
            assert (set(notebook.states) == {TokenState.EXACT}) is exact
            assert (TokenState.RELOCATED in notebook.states) is not exact
    with pytest.raises(InvalidValueError, match="8-bit"):
        plain.put(small.get(tiny(), "refunds"))


def test_a_kept_skill_takes_the_name_it_is_asked_for_under(store: SkillStore) -> None:
    model = tiny()
    unnamed = store.compile(model, "one thing.")
    named = store.compile(model, "one thing.", name="thing")
    assert named.account.tokens_computed == 0
    assert store.verify("thing").nbytes
    assert [entry.name for entry in store.entries()] == ["thing"]
    same(
        replace(unnamed, name="thing", unit=replace(unnamed.unit, name="")),
        replace(named, unit=replace(named.unit, name="")),
    )


@pytest.mark.parametrize(
    "which", ["../outside", "..", ".", "", "/etc/passwd", "a/b", "refunds\n", "REFUNDS", "refund", "0" * 32, "x" * 5000]
)
def test_what_names_no_skill_reaches_nothing(tmp_path: Path, which: str) -> None:
    store = SkillStore(tmp_path / "store")
    store.compile(tiny(), TEXT, name="refunds", tier="gold")
    outside = [tmp_path / "outside.json", tmp_path / "outside.safetensors"]
    for path in outside:
        path.write_text("of somebody's")
    for operation in (store.remove, store.entry, store.verify, lambda it: store.get(tiny(), it)):
        with pytest.raises(UnknownSkillError, match="there is no skill called"):
            operation(which)
    assert all(path.exists() for path in outside)
    assert len(store.entries()) == 1
    with pytest.raises(InvalidArgumentError, match="name or key"):
        store.get(tiny(), 7)  # type: ignore[arg-type]


def test_a_name_wins_over_the_beginning_of_a_key(store: SkillStore) -> None:
    model = tiny()
    skills = (Skill.compile(model, f"thing {number}.", name=f"s{number}") for number in range(100))
    entry = next(entry for entry in map(store.put, skills) if entry.key[0].isalpha())
    beginning = entry.key[:12]
    assert store.entry(beginning) == entry
    named = store.put(Skill.compile(model, "named like a key.", name=beginning))
    assert store.entry(beginning) == named
    assert store.entry(entry.key) == entry
    assert store.remove(beginning) == named.key
    store.put(Skill.compile(model, "other text.", name=entry.name))
    with pytest.raises(UnknownSkillError, match=r"2 skills called .*: give a key"):
        store.remove(entry.name)


def test_a_catalogues_manifests_do_not_hold_what_stands_before(store: SkillStore) -> None:
    model = tiny()
    texts = {f"tool_{number}": f"tool {number} returns the refund policy of the order. " * 3 for number in range(8)}
    together = store.compile_together(model, texts, preface="the system says. " * 10, between="\n")
    sizes = [len(entry.sealed()) for entry in sorted(store.entries(), key=lambda entry: entry.preface_tokens)]
    assert sizes[-1] < 1.2 * sizes[1], "a manifest grows with the skill, not with what it has read"
    for skill in together:
        back = store.get(model, skill.name)
        assert back.preface == skill.preface
        assert back.preface_ids == skill.preface_ids


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    store = SkillStore(tmp_path / "store")
    store.compile(tiny(), TEXT, name="refunds", tier="gold")
    out = tmp_path / "out"
    for file in (out / "missing" / "refunds.skill", tmp_path / "store"):
        with pytest.raises(StorageError, match="cannot write"):
            store.export("refunds", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    out.mkdir()
    (out / "refunds.skill").write_text("from before")
    (tmp_path / "store" / store.entry("refunds").tensors).write_bytes(b"damaged")
    with pytest.raises(CorruptFileError):
        store.export("refunds", out / "refunds.skill")
    assert [path.read_text() for path in out.iterdir()] == ["from before"]


@pytest.mark.parametrize(
    "kind",
    ["exchanged", "bomb", "compressed", "more", "other names", "one", "twice", "no zip", "folder", "gone", "claims"],
)
def test_what_is_no_exported_skill_is_refused(tmp_path: Path, kind: str) -> None:
    store = SkillStore(tmp_path / "store")
    store.compile(tiny(), TEXT, name="refunds", tier="gold")
    good, bad = tmp_path / "good.skill", tmp_path / "bad.skill"
    store.export("refunds", good)
    members = {name: zipfile.ZipFile(good).read(name) for name in ("skill.safetensors", "skill.json")}
    error: type[StorageError] = CorruptFileError
    compression = zipfile.ZIP_STORED
    if kind == "exchanged":
        body = members["skill.safetensors"]
        members["skill.safetensors"] = body[:-1] + bytes([body[-1] ^ 1])
    elif kind == "bomb":
        members["skill.safetensors"], compression = bytes(50_000_000), zipfile.ZIP_DEFLATED
    elif kind == "compressed":
        compression = zipfile.ZIP_DEFLATED
    elif kind == "more":
        members["../../evil"] = b"x"
    elif kind == "other names":
        members = {f"../{name}": body for name, body in members.items()}
    elif kind == "one":
        del members["skill.json"]
    if kind == "no zip":
        bad.write_bytes(b"not a zip archive")
    elif kind == "folder":
        bad.mkdir()
        error = StorageError
    elif kind == "gone":
        error = StorageError
    else:
        with zipfile.ZipFile(bad, "w", compression) as archive:
            for name, body in members.items():
                archive.writestr(name, body)
            if kind == "twice":
                with pytest.warns(UserWarning, match="Duplicate"):
                    archive.writestr("skill.json", members["skill.json"])
        if kind == "claims":  # the zip's directory claims a member that is larger than the file
            claim = bytearray(bad.read_bytes())
            at = claim.rindex(b"PK\x01\x02")
            claim[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2
            bad.write_bytes(bytes(claim))
    other = SkillStore(tmp_path / "other")
    with pytest.raises(error):
        other.import_file(bad)
    assert not (tmp_path / "other").exists()


def test_a_skill_whose_name_is_not_plain_is_not_kept(store: SkillStore) -> None:
    skill = replace(Skill.compile(tiny(), "one thing.", name="one"), name="[red]one")
    with pytest.raises(InvalidValueError, match="letters"):
        store.put(skill)
    assert store.entries() == []


def test_a_limit_is_a_number_of_bytes(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="bytes"):
        SkillStore(tmp_path, limit=-1)
