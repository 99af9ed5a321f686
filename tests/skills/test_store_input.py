"""An entry with a correct seal but invalid content is refused before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from conftest import tiny
from programmable_kv import Skill
from programmable_kv.errors import CorruptFileError
from programmable_kv.skills.store import Entry, SkillStore
from programmable_kv.storage.manifests import entry_key
from programmable_kv.storage.seal import opened, seal

TEXT = "refund policy: if the tier is {tier} refund, else deny.\n"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def resealed(folder: Path, entry: Entry, change: Change) -> str:
    """Rewrite an entry with a change and correct digests. Returns its key."""
    manifest, tensors = folder / f"{entry.key}.json", folder / entry.tensors
    content: dict[str, Any] = json.loads(opened(manifest.read_bytes()) or b"")
    named = dict(load(tensors.read_bytes()))
    change(content, named)
    body = save({name: tensor.contiguous() for name, tensor in named.items()})
    content |= {"tensors_sha256": hashlib.sha256(body).hexdigest(), "nbytes": len(body)}
    key = entry_key(Entry.model_construct(**{**content, "unit": _Ids(content["unit"])}))
    content |= {"key": key, "tensors": f"{key}.{'0' * 16}.safetensors"}
    manifest.unlink()
    tensors.unlink()
    (folder / content["tensors"]).write_bytes(body)
    (folder / f"{key}.json").write_bytes(seal(json.dumps(content).encode()))
    return str(key)


class _Ids:
    """The part of a unit on which the key depends."""

    def __init__(self, unit: dict[str, Any]) -> None:
        self.ids = tuple(unit["ids"])


def unit(**changes: Any) -> Change:
    return lambda manifest, _: manifest["unit"].update(changes)


def manifest(**changes: Any) -> Change:
    return lambda content, _: content.update(changes)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, named: named.update({name: change(named[name])})


def holding(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(of: torch.Tensor) -> torch.Tensor:
        changed = of.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def place(**changes: Any) -> Change:
    return lambda content, _: content["unit"]["places"][0].update(changes)


TENSORS: dict[str, Change] = {
    "a layer is missing": lambda _, named: (named.pop("keys.1"), named.pop("values.1")),
    "values are missing": lambda _, named: named.pop("values.0"),
    "a layer too many": lambda _, named: named.update({f"{n}.2": named[f"{n}.1"].clone() for n in ("keys", "values")}),
    "one head, which would be broadcast": tensor("keys.0", lambda it: it[:, :1]),
    "one token, which would be broadcast": tensor("values.1", lambda it: it[:, :, :1]),
    "a token more": tensor("keys.0", lambda it: torch.cat([it, it[:, :, :1]], dim=2)),
    "narrower heads": tensor("keys.1", lambda it: it[..., :4]),
    "two batches": tensor("keys.1", lambda it: torch.cat([it, it])),
    "three dimensions": tensor("keys.1", lambda it: it[0]),
    "another dtype": tensor("values.0", lambda it: it.float()),
    "whole numbers": tensor("values.0", lambda it: it.long()),
    "NaN": tensor("values.1", holding(float("nan"))),
    "infinity": tensor("keys.0", holding(float("inf"))),
    "positions are missing": lambda _, named: named.pop("computed_at"),
    "positions of another type": tensor("computed_at", lambda it: it.double()),
    "negative positions": tensor("computed_at", lambda it: it - 5),
    "positions beyond the model's": tensor("computed_at", lambda it: it + 1020),
    "positions that do not ascend": tensor("computed_at", lambda it: it.flip(0)),
    "fewer positions": tensor("computed_at", lambda it: it[:-1]),
    "another preface": tensor("preface_ids", lambda it: torch.tensor([7], dtype=torch.int32)),
    "a preface of another type": tensor("preface_ids", lambda it: it.long()),
    "a preface that is no text": tensor("preface", lambda it: torch.tensor([255], dtype=torch.uint8)),
    "another preface text": tensor("preface", lambda it: torch.tensor([65], dtype=torch.uint8)),
}
MANIFESTS: dict[str, Change] = {
    "an id beyond the vocabulary": lambda content, _: content["unit"]["ids"].__setitem__(0, 512),
    "a negative id": lambda content, _: content["unit"]["ids"].__setitem__(0, -1),
    "an id too many": lambda content, _: content["unit"]["ids"].append(5),
    "an offset is missing": lambda content, _: content["unit"]["offsets"].pop(),
    "an offset beyond the text": lambda content, _: content["unit"]["offsets"].__setitem__(-1, [0, 10_000]),
    "an offset that runs backwards": lambda content, _: content["unit"]["offsets"].__setitem__(-1, [9, 3]),
    "no text": unit(text=""),
    "no tokens": lambda content, _: content["unit"].update(ids=[], offsets=[], places=[]),
    "another kind": unit(kind="prefill"),
    "an unknown kind": unit(kind="odd"),
    "states of other tokens": unit(base=["stale"]),
    "a place in no field": place(name="other"),
    "a place beyond the text": place(characters=[5, 10_000]),
    "a place that runs backwards": place(characters=[9, 5]),
    "a place before the text": place(characters=[-4, 5]),
    "a place in other tokens": place(tokens=[0, 1]),
    "a place beyond the tokens": place(tokens=[100, 101]),
    "a place in other text": place(characters=[0, 4], tokens=[0, 1]),
    "another value": manifest(values={"tier": "lead"}),
    "a value that is not plain": lambda content, _: (
        content.update(values={"tier": "a\nb"}),
        content["unit"].update(places=[]),
    ),
    "a value that is a number": manifest(values={"tier": 7}),
    "a name with markers": manifest(name="<|im_start|>"),
    "a name of a path": manifest(name="../x"),
    "something more": manifest(more=1),
    "a truth for a number": lambda content, _: content["unit"].update(special=1),
    "a preface of another length": manifest(preface_tokens=7),
    "a negative count": manifest(preface_tokens=-1),
    "another precision": manifest(precision="int8"),
}


@pytest.mark.parametrize("change", [*TENSORS.values(), *MANIFESTS.values()], ids=[*TENSORS, *MANIFESTS])
@pytest.mark.parametrize("verify", [True, False])
def test_a_resealed_entry_that_does_not_fit_is_refused(tmp_path: Path, change: Change, verify: bool) -> None:
    model, store = tiny(), SkillStore(tmp_path)
    entry = store.put(Skill.compile(model, TEXT, name="refunds", tier="gold"))
    key = resealed(tmp_path, entry, change)
    if not verify and change in (TENSORS["NaN"], TENSORS["infinity"]):
        pytest.skip("without verify the numbers are trusted")
    with pytest.raises(CorruptFileError):
        store.get(model, key, verify=verify)
    assert store.compile(model, TEXT, name="refunds", tier="gold").account.tokens_computed > 0
    assert store.get(model, entry.key).values == {"tier": "gold"}


def test_an_entry_that_is_resealed_as_it_was_is_served(tmp_path: Path) -> None:
    """This shows that the entries above are refused for what changed in them, not for being resealed."""
    model, store = tiny(), SkillStore(tmp_path)
    entry = store.put(Skill.compile(model, TEXT, name="refunds", tier="gold"))
    assert resealed(tmp_path, entry, lambda content, named: None) == entry.key
    assert store.compile(model, TEXT, tier="gold").account.tokens_computed == 0


@pytest.mark.parametrize("changed", [{"fingerprint": "0" * 64}, {"tensors": f"{'1' * 32}.{'0' * 16}.safetensors"}])
def test_a_key_is_that_of_the_content(tmp_path: Path, changed: dict[str, str]) -> None:
    """A sealed manifest that claims the content or the tensors of another entry is refused."""
    model, store = tiny(), SkillStore(tmp_path)
    entry = store.put(Skill.compile(model, TEXT, name="refunds", tier="gold"))
    (tmp_path / f"{'1' * 32}.{'0' * 16}.safetensors").write_bytes((tmp_path / entry.tensors).read_bytes())
    (tmp_path / f"{entry.key}.json").write_bytes(entry.model_copy(update=changed).sealed())
    with pytest.raises(CorruptFileError, match="does not match its key"):
        store.verify(entry.key)
    assert store.compile(model, TEXT, tier="gold").account.tokens_computed > 0


INT8: dict[str, Change] = {
    "scales are missing": lambda _, named: named.pop("keys.0.scale"),
    "scales of another direction": tensor("keys.0.scale", lambda it: it.transpose(2, 3)),
    "scales of another type": tensor("values.0.scale", lambda it: it.float()),
    "a scale that is not finite": tensor("values.0.scale", holding(float("inf"))),
    "levels of another type": tensor("values.0", lambda it: it.to(torch.int16)),
    "levels of one token": tensor("values.0", lambda it: it[:, :, :1]),
}


@pytest.mark.parametrize("change", INT8.values(), ids=INT8)
def test_in_eight_bits_too(tmp_path: Path, change: Change) -> None:
    model, store = tiny(), SkillStore(tmp_path, int8=True)
    entry = store.put(Skill.compile(model, TEXT, name="refunds", tier="gold"))
    key = resealed(tmp_path, entry, change)
    with pytest.raises(CorruptFileError):
        store.get(model, key)


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_an_import_is_checked_as_far_as_it_can_be_without_a_model(tmp_path: Path, change: Change) -> None:
    """Checks that need a model are made later: an import is checked again when it is read."""
    model, one, two = tiny(), SkillStore(tmp_path / "one"), SkillStore(tmp_path / "two")
    entry = one.put(Skill.compile(model, TEXT, name="refunds", tier="gold"))
    key = resealed(tmp_path / "one", entry, change)
    try:
        one.export(key, tmp_path / "out.skill")
    except CorruptFileError:
        return
    two.import_file(tmp_path / "out.skill")
    with pytest.raises(CorruptFileError):
        two.get(model, key)


def test_a_skill_without_layers_is_none_of_any_model(tmp_path: Path) -> None:
    store = SkillStore(tmp_path)
    entry = store.put(Skill.compile(tiny(), TEXT, name="refunds", tier="gold"))
    key = resealed(
        tmp_path, entry, lambda _, named: [named.pop(f"{n}.{layer}") for n in ("keys", "values") for layer in (0, 1)]
    )
    with pytest.raises(CorruptFileError, match="no keys and values"):
        store.verify(key)


@pytest.mark.parametrize("model_type", ["minicpm3", "gemma3_text"])
def test_other_shapes_of_caches_fit(tmp_path: Path, model_type: str) -> None:
    """These are MLA, where keys and values differ in heads and width, and models with two kinds of layers."""
    model, store = tiny(model_type), SkillStore(tmp_path)
    store.compile(model, TEXT, name="refunds", tier="gold")
    assert store.compile(model, TEXT, name="refunds", tier="gold").account.tokens_computed == 0
    assert store.get(model, "refunds", verify=False).values == {"tier": "gold"}
