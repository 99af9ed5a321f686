"""What the plugin writes into a paged cache equals the library's own splice of the same skills at the same places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plugged import BLOCK, HEAD, REFUNDS, model_folder, plugged, with_theta

from programmable_kv import Notebook, SeamRepair, Skill, SkillStore, load_model
from programmable_kv.cache.span import Span
from programmable_kv.errors import (
    CorruptFileError,
    FingerprintMismatchError,
    InvalidArgumentError,
    ModelUnavailableError,
    UnsupportedModelError,
    UnverifiedError,
)
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.certificate import certificate_of, certificates
from programmable_kv.vllm_plugin.layout import SplitLayer
from programmable_kv.vllm_plugin.loading import HeadShare, StoredSkills
from programmable_kv.vllm_plugin.matching import Piece, slots_of
from programmable_kv.vllm_plugin.prepare import certify, compile_opening, export
from programmable_kv.vllm_plugin.scheduling import Request

BLOCKS = [7, 2, 9, 0, 5, 11, 3, 8, 1, 4]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugged")


def composed(root: Path, skills: dict[str, Skill], *order: str, dtype: str = "float32") -> Notebook:
    """The library's own splice: text, followed by skills."""
    notebook = Notebook(load_model(model_folder(root), dtype=dtype)).text(HEAD)
    for name in order:
        notebook.skill(skills[name])
    notebook.text("\nThe tier is gold.")
    notebook.prefill(repair=SeamRepair(0))
    return notebook


def request(notebook: Notebook, name: str = "1", **parameters: Any) -> Request:
    marked = [{"skill": part.name, "start": part.span.start} for part in notebook.parts if part.name]
    return Request(name, notebook.ids, "composed:a", {"skills": marked, **parameters})


@pytest.mark.parametrize("order", [("refunds", "returns"), ("returns", "refunds"), ("refunds",)])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_written_is_the_librarys_own_splice(root: Path, order: tuple[str, ...], rank: int) -> None:
    """On one worker with all heads' halves: each has its own share."""
    plug, skills = plugged(root, HeadShare(rank, 2))
    notebook = composed(root, skills, *order)
    spans = [part.span for part in notebook.parts if part.name]
    computed = -(-spans[0].start // BLOCK) * BLOCK
    assert plug.load(request(notebook), computed, BLOCKS) == spans[-1].stop - computed
    loaded = Span(computed, spans[-1].stop)
    slots = slots_of(BLOCKS, loaded, BLOCK)
    rows = slice(loaded.start, loaded.stop)
    for layer in range(len(plug.certificate.layers)):
        mine = HeadShare(rank, 2).of(plug.certificate.layers[layer].heads)
        keys, values = plug.cached(layer, slots)
        assert torch.allclose(keys, notebook.cache.keys(layer)[:, mine, rows], atol=1e-5, rtol=0)
        assert torch.equal(values, notebook.cache.values(layer)[:, mine, rows])


def test_in_bfloat16_it_is_rounded_once_as_by_the_library(root: Path, tmp_path: Path) -> None:
    plug, skills = plugged(tmp_path, dtype="bfloat16")
    notebook = composed(tmp_path, skills, "refunds", dtype="bfloat16")
    span = notebook.part("refunds").span
    computed = -(-span.start // BLOCK) * BLOCK
    assert plug.load(request(notebook), computed, BLOCKS) == span.stop - computed
    for layer in range(len(plug.certificate.layers)):
        keys, values = plug.cached(layer, slots_of(BLOCKS, Span(computed, span.stop), BLOCK))
        assert keys.dtype == torch.bfloat16
        assert torch.equal(keys, notebook.cache.keys(layer)[:, :, computed : span.stop])
        assert torch.equal(values, notebook.cache.values(layer)[:, :, computed : span.stop])


def test_a_rotation_that_is_off_by_one_is_seen(root: Path, tmp_path: Path) -> None:
    """The same comparison on a store whose skill says that it was computed one position later."""
    plug, skills = plugged(root)
    notebook = composed(root, skills, "refunds")
    wrong = replace(
        skills["refunds"],
        segment=replace(skills["refunds"].segment, computed_at=torch.arange(1, len(skills["refunds"]) + 1)),
    )
    SkillStore(tmp_path).put(wrong)
    stored = StoredSkills(tmp_path, plug.certificate)
    plug.working._skills = stored
    span = notebook.part("refunds").span
    computed = -(-span.start // BLOCK) * BLOCK
    plug.load(request(notebook), computed, BLOCKS)
    keys, values = plug.cached(0, slots_of(BLOCKS, Span(computed, span.stop), BLOCK))
    rows = slice(computed, span.stop)
    assert float((keys - notebook.cache.keys(0)[:, :, rows]).abs().max()) > 1e-2
    assert torch.equal(values, notebook.cache.values(0)[:, :, rows])


def test_an_opening_is_loaded_from_the_first_token_and_is_exact(root: Path) -> None:
    plug, skills = plugged(root)
    model = load_model(model_folder(root))
    plug.store.put(compile_opening(model, [("system", HEAD)]))
    notebook = Notebook(model).message("system", HEAD + "{refunds}", refunds=skills["refunds"])
    notebook.prefill(repair=SeamRepair(0))
    part = notebook.part("refunds").span
    marked = {"skills": ["opening", "refunds"], "seam": 0}
    asked = Request("1", notebook.ids, "composed:a", marked)
    assert plug.load(asked, 0, BLOCKS) == part.stop
    rows = slice(0, part.stop)
    for layer in range(len(plug.certificate.layers)):
        keys, _ = plug.cached(layer, slots_of(BLOCKS, Span(0, part.stop), BLOCK))
        assert torch.allclose(keys, notebook.cache.keys(layer)[:, :, rows], atol=1e-5, rtol=0)


def test_an_opening_has_no_seam_and_a_skill_behind_its_preface_neither(root: Path) -> None:
    plug, skills = plugged(root)
    model = load_model(model_folder(root))
    opening = compile_opening(model, [("system", HEAD)])
    plug.store.put(opening)
    behind = plug.store.compile(model, REFUNDS, name="behind", preface=[("system", HEAD)])
    ids = [*opening.unit.ids, *behind.unit.ids, *skills["returns"].unit.ids, 7]
    asked = Request("1", ids, "composed:a", {"skills": ["opening", "behind", "returns"], "seam": 4})
    assert plug.scheduling.matched(asked, 0) == len(opening) + len(behind), "the seam of the last one is computed"
    plain = Request("2", ids, "composed:a", {"skills": ["opening", "refunds"], "seam": 4})
    assert plug.scheduling.matched(plain, 0) == len(opening), "without its preface a skill has a seam"


def test_a_skill_that_cannot_be_read_fails_its_blocks_and_those_behind(root: Path) -> None:
    plug, skills = plugged(root)
    notebook = composed(root, skills, "refunds", "returns")
    entry = plug.store.entry("returns")
    file = root / "store" / entry.tensors
    body = bytearray(file.read_bytes())
    body[-7] ^= 4
    file.write_bytes(bytes(body))
    try:
        spans = [part.span for part in notebook.parts if part.name]
        computed = -(-spans[0].start // BLOCK) * BLOCK
        plug.load(request(notebook), computed, BLOCKS)
        first, last = spans[1].start // BLOCK, -(-spans[1].stop // BLOCK)
        failed = plug.working.failed()
        assert failed == set(BLOCKS[first:last])
        assert plug.working.failed() == set(), "each failure is told once"
        plug.scheduling.failed(sorted(failed))
        told = plug.scheduling.finished("1")
        assert told is not None
        assert told["skills"]["tokens_loaded"] == 0
        assert "could not be read" in told["skills"]["why"]
    finally:
        plug.store.remove("returns")


def test_a_skill_with_room_between_its_tokens_is_computed_instead(root: Path, tmp_path: Path) -> None:
    plug, skills = plugged(root)
    notebook = composed(root, skills, "refunds")
    apart = torch.arange(len(skills["refunds"]))
    apart[5:] += 2
    SkillStore(tmp_path).put(replace(skills["refunds"], segment=replace(skills["refunds"].segment, computed_at=apart)))
    plug.working._skills = StoredSkills(tmp_path, plug.certificate)
    piece = Piece(plug.store.entry("refunds").key, Span(0, 4), 0)
    with pytest.raises(UnverifiedError, match="gaps between its positions"):
        plug.working._skills.relocated(piece, HeadShare(), torch.device("cpu"))
    computed = -(-notebook.part("refunds").span.start // BLOCK) * BLOCK
    plug.load(request(notebook), computed, BLOCKS)
    assert plug.working.failed(), "vLLM is told to compute its blocks"


def test_skills_leave_memory_and_are_read_again(root: Path) -> None:
    plug, skills = plugged(root)
    notebook = composed(root, skills, "refunds", "returns")
    plug.working._skills = StoredSkills(root / "store", plug.certificate, kept=1)
    first = notebook.part("refunds").span.start
    computed = -(-first // BLOCK) * BLOCK
    for name in ("1", "2"):
        assert plug.load(request(notebook, name), computed, BLOCKS)
    assert len(plug.working._skills._segments) == 1


def test_a_layer_that_the_certificate_does_not_have_is_refused(root: Path) -> None:
    plug, _ = plugged(root)
    layers: dict[int, Any] = {**plug.layers, 2: SplitLayer(torch.zeros(1, 2, BLOCK, 16))}
    with pytest.raises(UnsupportedModelError, match="layer 2"):
        plug.working.load((), layers)


# -- certificates ---------------------------------------------------------------------------------------------------


def test_a_certificate_holds_for_the_same_files_only(root: Path, tmp_path: Path) -> None:
    plug, _ = plugged(root)
    blobs = blobs_at(root / "store")
    folder = model_folder(root)
    assert certificate_of(blobs, folder, "float32") == plug.certificate
    with pytest.raises(FingerprintMismatchError, match="certified in float32"):
        certificate_of(blobs, folder, "bfloat16")
    with pytest.raises(FingerprintMismatchError, match="has no certificate"):
        certificate_of(blobs_at(tmp_path), folder, "float32")
    other = export(folder, tmp_path / "other", dtype="float32")
    with_theta(other, 5e5)
    with pytest.raises(FingerprintMismatchError, match=r"config\.json differ"):
        certificate_of(blobs, other, "float32")
    with pytest.raises(ModelUnavailableError, match=r"not a folder with config\.json"):
        certificate_of(blobs, tmp_path, "float32")


def test_a_damaged_certificate_is_not_read(root: Path, tmp_path: Path) -> None:
    plug, _ = plugged(root)
    name = plug.certificate.write(blobs_at(tmp_path))
    assert certificates(blobs_at(tmp_path)) == [plug.certificate]
    body = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(body.replace(b'"float32"', b'"float16"'))
    with pytest.raises(CorruptFileError):
        certificates(blobs_at(tmp_path))


def test_a_certificate_is_no_skill_of_its_store(root: Path) -> None:
    plug, _ = plugged(root)
    assert certificates(blobs_at(root / "store"))
    assert plug.store.damaged() == []


def test_a_skill_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    plug, skills = plugged(root)
    SkillStore(tmp_path).put(replace(skills["refunds"], fingerprint="0" * 32))
    with pytest.raises(FingerprintMismatchError, match="compile it again"):
        StoredSkills(tmp_path, plug.certificate).entry("refunds")


def test_only_what_is_proved_and_fits_is_certified(tmp_path: Path) -> None:
    from conftest import tiny, tokenizer

    folder = tmp_path / "learned"
    tiny("minicpm3").engine.model.save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="caches keys of"):
        certify(folder, blobs_at(tmp_path / "store"))
    with pytest.raises(InvalidArgumentError, match="is not empty"):
        export(folder, folder)


def test_heads_are_shared_among_workers() -> None:
    assert [HeadShare(rank, 2).of(6) for rank in range(2)] == [slice(0, 3), slice(3, 6)]
    assert [HeadShare(rank, 4).of(2) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
