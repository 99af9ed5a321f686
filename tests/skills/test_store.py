"""The store: what is put in comes out, nothing corrupt is served, processes may die or race, and the limit holds."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv import Notebook, SeamRepair, Skill
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, InvalidValueError, UnknownSkillError
from programmable_kv.states import TokenState
from programmable_kv.skills.store import SkillStore

TEXT = "refund policy: if the tier is {tier} refund, else deny. reply only with the action.\n"


def same(one: Skill, two: Skill) -> None:
    assert one.unit == two.unit
    assert one.values == two.values
    for ours, theirs in zip(
        (*one.segment.keys, *one.segment.values), (*two.segment.keys, *two.segment.values), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SkillStore:
    where: Any = tmp_path / "skills" if request.param == "folder" else f"memory://{tmp_path.name}"
    return SkillStore(where)


def test_what_is_put_in_comes_out(store: SkillStore) -> None:
    skill = Skill.compile(tiny(), TEXT, name="refunds", tier="gold")
    entry = store.put(skill)
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
    with pytest.raises(UnknownSkillError, match="0 skills"):
        store.get(tiny(), "dates")
    store.compile(tiny("qwen2"), TEXT, name="refunds", tier="gold")
    same(store.get(tiny("qwen2"), "refunds"), Skill.compile(tiny("qwen2"), TEXT, name="refunds", tier="gold"))
    with pytest.raises(UnknownSkillError, match="2 skills"):
        store.entry("refunds")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "ids", "renamed"])
def test_nothing_corrupt_is_served(tmp_path: Path, damage: str) -> None:
    store = SkillStore(tmp_path)
    key = store.put(Skill.compile(tiny(), TEXT, name="refunds", tier="gold")).key
    tensors, manifest = tmp_path / f"{key}.safetensors", tmp_path / f"{key}.json"
    body = bytearray(tensors.read_bytes())
    if damage == "flip":
        body[-7] ^= 4
        tensors.write_bytes(bytes(body))
    elif damage == "cut":
        tensors.write_bytes(bytes(body[:-9]))
    elif damage == "gone":
        tensors.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "ids":
        manifest.write_text(manifest.read_text().replace('"ids": [', '"ids": [7, '))
    else:
        key = "0" * 32
        manifest.rename(tmp_path / f"{key}.json")
    with pytest.raises(CorruptFileError):
        store.get(tiny(), key)


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
    """At most 0.55 of the bytes of 16-bit tensors, and logits that point the same way."""
    model = tiny(dtype=torch.bfloat16)
    plain, small = SkillStore(tmp_path / "plain"), SkillStore(tmp_path / "small", int8=True)
    skill = plain.compile(model, TEXT * 8, name="refunds", tier="gold")
    small.put(skill)
    assert small.entry("refunds").nbytes <= 0.62 * plain.entry("refunds").nbytes  # tiny heads: a scale for 8 channels
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
    with pytest.raises(InvalidValueError, match="8 bits"):
        plain.put(small.get(tiny(), "refunds"))


_WRITER = """
import sys
sys.path.insert(0, {tests!r})
from conftest import tiny
from programmable_kv import Skill
from programmable_kv.skills.store import SkillStore
store = SkillStore({folder!r})
skill = Skill.compile(tiny(), "a skill that many write at once, over and over. " * 20, name="shared")
print("ready", flush=True)
for _ in range({times}):
    store.put(skill)
"""


def test_killed_or_racing_writers_lose_nothing(tmp_path: Path) -> None:
    """Two processes write one key again and again; one is killed in the middle. A reader never sees half an entry."""
    tests = str(Path(__file__).parent.parent)

    def start(times: int) -> subprocess.Popen[str]:
        code = _WRITER.format(tests=tests, folder=str(tmp_path), times=times)
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    victim, other = start(100_000), start(60)
    for process in (victim, other):
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
    store = SkillStore(tmp_path)
    reads = 0
    while other.poll() is None:
        if reads == 5:
            victim.kill()
        if any(path.suffix == ".json" and not path.name.startswith(".") for path in tmp_path.iterdir()):
            assert store.get(tiny(), "shared").name == "shared"
            reads += 1
    victim.kill()
    victim.wait()
    assert reads > 5
    assert store.get(tiny(), "shared").name == "shared"
    assert [entry.name for entry in store.entries()] == ["shared"]


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
