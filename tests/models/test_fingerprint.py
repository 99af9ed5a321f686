"""Fingerprints: what they distinguish, and when a remembered one is used instead of a new computation."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv import UnsupportedModelError, load_model, wrap_model
from programmable_kv.cache.transformers_api import GROUPED_SDPA, register_attention
from programmable_kv.models import fingerprint as module
from programmable_kv.models import load
from programmable_kv.models.fingerprint import fingerprint
from programmable_kv.models.home import HOME_VARIABLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a model."""
    tiny_model("llama").save_pretrained(tmp_path / "m")
    tokenizer("byte-level").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place where fingerprints are remembered, for files of any age."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(module, "_SETTLED_NS", 0)
    return tmp_path / "home" / "fingerprints"


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr(load, "fingerprint", refuse)


def computed(monkeypatch: pytest.MonkeyPatch, folder: Path, **arguments: Any) -> bool:
    """Whether a load computes the fingerprint."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(load, "fingerprint", lambda *given: calls.append(1) or fingerprint(*given))
        load_model(folder, **arguments)
    return bool(calls)


def test_dtype_weights_and_attention_are_told_apart(folder: Path) -> None:
    one, two = load_model(folder, dtype="float64"), load_model(folder, dtype=torch.float64, attention="eager")
    assert one.fingerprint != two.fingerprint, "eager attention sums in another order"
    assert load_model(folder).fingerprint != one.fingerprint, "another dtype caches other bits"
    assert load_model(folder, dtype="float64", attention="sdpa").fingerprint == one.fingerprint
    before = fingerprint(two.engine.model, two.tokenizer)
    with torch.no_grad():
        two.engine.model.model.layers[1].mlp.up_proj.weight[0, 1] += 1e-6
    assert fingerprint(two.engine.model, two.tokenizer) != before


def test_sdpa_with_groups_folded_is_sdpa() -> None:
    register_attention()
    model = copy.deepcopy(tiny_model("llama"))
    found = set()
    for attention in ("sdpa", GROUPED_SDPA):
        model.set_attn_implementation(attention)
        found.add(fingerprint(model, tokenizer("byte-level")))
    assert len(found) == 1


def test_padding_and_truncation_of_earlier_calls_do_not_count() -> None:
    used = copy.deepcopy(tokenizer("byte-level"))
    used.pad_token = used.unk_token
    before = fingerprint(tiny_model("llama"), used)
    used(["a", "the order status"], padding=True, truncation=True, max_length=3)
    assert used.backend_tokenizer.padding is not None
    assert fingerprint(tiny_model("llama"), used) == before
    assert used.backend_tokenizer.padding is not None, "the caller's tokenizer is left alone"
    used.chat_template = "other"
    assert fingerprint(tiny_model("llama"), used) != before


def test_a_second_load_reads_no_weight_for_it(folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_model(folder)
    assert len(list(notes.glob("*.json"))) == 1
    forbid_hashing(monkeypatch)
    assert load_model(folder).fingerprint == first.fingerprint
    assert load_model(str(folder)).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="read again"):
        load_model(folder, dtype="float64")
    with pytest.raises(AssertionError, match="read again"):
        load_model(folder, attention="eager")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_noticed(folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """This includes a file of the same size whose time was set back: its inode's change time shows it."""
    load_model(folder)
    path = folder / name
    stat = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert computed(monkeypatch, folder)
    assert not computed(monkeypatch, folder)


def test_a_file_that_has_only_just_been_written_is_not_trusted(
    folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_NS", 3600 * 10**9)
    load_model(folder)
    assert not notes.exists()
    assert computed(monkeypatch, folder)


def test_files_that_change_during_the_load_are_not_remembered(
    folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*given: Any) -> str:
        (folder / "config.json").touch()
        return fingerprint(*given)

    monkeypatch.setattr(load, "fingerprint", meanwhile)
    load_model(folder)
    assert not notes.exists()


def test_an_adapters_folder_leads_to_weights_elsewhere(folder: Path) -> None:
    from programmable_kv.models.fingerprint import FileIdentity
    from programmable_kv.models.source import Source

    (folder / "adapter_config.json").write_text("{}")
    assert FileIdentity.of(Source(str(folder), folder), dtype="float32", attention="None") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: note.write_text("{"),
        lambda note: note.write_bytes(b"\xff\xfe"),
        lambda note: note.write_text("[]"),
        lambda note: note.write_text(json.dumps({**json.loads(note.read_text()), "fingerprint": "short"})),
        lambda note: note.write_text(json.dumps({**json.loads(note.read_text()), "identity": {}})),
        lambda note: (note.unlink(), note.mkdir()),
    ],
    ids=["cut off", "not text", "not a note", "no fingerprint", "of other files", "a folder"],
)  # fmt: skip
def test_a_damaged_note_is_ignored(folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    first = load_model(folder).fingerprint
    [note] = notes.glob("*.json")
    damage(note)
    assert computed(monkeypatch, folder)
    assert load_model(folder).fingerprint == first
    assert not list(notes.glob("partial-*"))


def test_a_home_that_cannot_be_written_is_ignored(folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes.parent.write_text("a file where the folder should be")
    assert load_model(folder).fingerprint == load_model(folder).fingerprint


def test_eight_bit_weights_work_and_are_told_apart() -> None:
    """Linear layers in int8 pack their weights outside `parameters()`; a fingerprint must read them too."""
    plain, changed = (copy.deepcopy(tiny_model("llama", dtype=torch.float32)) for _ in range(2))
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1.0
    one, same, other = (
        wrap_model(_eight_bits(model), tokenizer("byte-level")) for model in (plain, copy.deepcopy(plain), changed)
    )
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint != fingerprint(plain, tokenizer("byte-level"))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled.model.layers[0].mlp.up_proj.weight.mul_(2)
    halves, whole = (_eight_bits(model).model.layers[0].mlp.up_proj.weight() for model in (plain, scaled))
    assert torch.equal(halves.int_repr(), whole.int_repr()), "only the scale differs"
    assert wrap_model(_eight_bits(scaled), tokenizer("byte-level")).fingerprint != one.fingerprint
    assert one.engine.relocation.exact
    before = one.engine.append(one.engine.new_buffer(), [5, 6, 7])
    full = wrap_model(plain, tokenizer("byte-level")).engine
    cosine = torch.nn.functional.cosine_similarity(before, full.append(full.new_buffer(), [5, 6, 7]))
    assert 0.99 < float(cosine) < 1


def test_weights_that_cannot_be_read_are_refused() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.register_module("packed", _Opaque())
    with pytest.raises(UnsupportedModelError, match="packed"):
        fingerprint(model, tokenizer("byte-level"))


class _Opaque(torch.nn.Module):
    """A module that keeps its weights in its own format, as some quantisations do."""

    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        del state


def _eight_bits(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
