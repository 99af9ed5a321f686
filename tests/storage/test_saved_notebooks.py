"""Saved notebooks: a load gives exactly what was saved, on any backend, or it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from backends import ReadOnlyBlobs
from conftest import tiny
from programmable_kv import Notebook, Skill
from programmable_kv.errors import CorruptFileError, FingerprintMismatchError, StorageError
from programmable_kv.storage.files import blobs_at
from programmable_kv.storage.memory import MemoryBlobs
from programmable_kv.storage.notebooks import MANIFEST
from programmable_kv.storage.seal import opened, seal

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
forks = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def build(status: str = "shipped", model: Any = None) -> Notebook:
    notebook = Notebook(model or tiny())
    notebook.message("system", "status: {status}\ntier: {tier}\nreply only.", status=status, tier="gold")
    notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    return notebook


def assert_same(one: Notebook, two: Notebook) -> None:
    assert (one.ids, one.fields, one.states, one.rendered_text) == (two.ids, two.fields, two.states, two.rendered_text)
    for layer in range(len(one.cache)):
        assert torch.equal(one.cache.keys(layer), two.cache.keys(layer))
        assert torch.equal(one.cache.values(layer), two.cache.values(layer))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["folder", "home", "memory", "file"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str | Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return {
        "folder": tmp_path / "saved",
        "home": "~/saved",
        "memory": f"memory://{tmp_path.name}/saved",
        "file": f"file://{tmp_path}/saved",
    }[request.param]  # type: ignore[no-any-return]


def test_what_is_loaded_is_what_was_saved(where: str | Path, tmp_path: Path) -> None:
    notebook = build()
    notebook.edit(status="cancelled by the customer", mode="selective", k=3)
    notebook.add("user", "and now?")
    notebook.splice(Skill.compile(notebook.model, "dates come first.", name="dates"))
    notebook.edit(tier="a silver one", mode="suffix")
    place = notebook.save(where)
    assert_same(Notebook.load(where, tiny()), notebook)
    assert_same(Notebook.load(place, tiny()), notebook)
    for each in (notebook, loaded := Notebook.load(where, tiny())):
        each.edit(status="x")
    assert_same(loaded, notebook)
    loaded.save(where)
    assert_same(Notebook.load(where, tiny()), notebook)
    blobs = blobs_at(where)
    assert len(list(blobs.list())) == 2, "the save before is not left behind"
    assert files(tmp_path) in (["saved"], []), "and nothing lies beside it"


@pytest.mark.parametrize("model_type", ["minicpm3", "gemma3_text", "mistral"])
def test_other_shapes_of_caches_fit(tmp_path: Path, model_type: str) -> None:
    notebook = Notebook(tiny(model_type)).text("status: {status}, so much is known.", status="shipped")
    notebook.prefill()
    notebook.edit(status="cancelled by the customer", mode="in_place")
    notebook.save(tmp_path / "saved")
    assert_same(Notebook.load(tmp_path / "saved", notebook.model), notebook)


def test_a_backend_of_ones_own(tmp_path: Path) -> None:
    backend, notebook = MemoryBlobs(), build()
    notebook.save(backend)
    notebook.edit(status="pending")
    notebook.save(backend)
    assert len(backend.contents) == 2
    assert_same(Notebook.load(backend, tiny()), notebook)
    read_only = ReadOnlyBlobs(backend.contents)
    assert_same(Notebook.load(read_only, tiny()), notebook)
    with pytest.raises(StorageError, match="Permission denied"):
        notebook.save(read_only)
    assert read_only.contents == backend.contents


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    notebook = Notebook(tiny()).text("a {b} c", b="d")
    notebook.prefill()
    notebook.save(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            path.write_bytes(bytes(spoiled))
            with pytest.raises(CorruptFileError):
                Notebook.load(tmp_path, notebook.model)
        path.write_bytes(whole)
    assert_same(Notebook.load(tmp_path, notebook.model), notebook)


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "folder", "no manifest", "manifest folder", "old"])
def test_damaged_files_are_refused_and_replaced(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "saved"
    build().save(folder)
    tensors, manifest = next(folder.glob("cache-*.safetensors")), folder / MANIFEST
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "old":
        content = {"sha256": "0" * 64, "notebook": {"format": 1, "model_name": "x"}}
        manifest.write_text(json.dumps(content, indent=1))
        tensors.rename(folder / "cache.safetensors")
    else:
        path = tensors if damage == "folder" else manifest
        path.unlink()
        path.mkdir()
    with pytest.raises(CorruptFileError, match="format 1.*save the notebook again" if damage == "old" else None):
        Notebook.load(folder, tiny())
    notebook = build("pending")
    notebook.save(folder)
    assert_same(Notebook.load(folder, tiny()), notebook)
    assert len(files(folder)) == 2


def test_another_model_is_refused(tmp_path: Path) -> None:
    build().save(tmp_path / "saved")
    with pytest.raises(FingerprintMismatchError, match="tiny llama"):
        Notebook.load(tmp_path / "saved", tiny("qwen2"))


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    for name in ("thesis.txt", "my thesis.txt", "chapter"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("three years of work")
        with pytest.raises(CorruptFileError, match="not a saved notebook"):
            build().save(folder)
        assert files(folder) == [name]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        build().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_reader_never_mixes_two_saves(tmp_path: Path) -> None:
    """If both files are replaced after the manifest was read, the newer save is loaded whole."""
    one, two = build("shipped"), build("cancelled by the customer")

    class Slow(MemoryBlobs):
        then: Callable[[], object] | None = None

        def _read(self, name: str) -> bytes:
            body = super()._read(name)
            if name == MANIFEST and self.then is not None:
                happen, self.then = self.then, None
                happen()
            return body

    backend = Slow()
    one.save(backend)
    backend.then = lambda: two.save(backend)
    assert_same(Notebook.load(backend, tiny()), two)


def test_a_file_that_is_replaced_between_its_header_and_its_mapping_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors opens a file for its header, and torch opens it again to map it; another save may come between."""
    one, two = build("shipped"), build("cancelled by the customer")
    one.save(tmp_path / "saved")
    map_file, mapped = torch.UntypedStorage.from_file, []

    def from_file(*arguments: Any, **options: Any) -> Any:
        mapped.append(arguments)
        if len(mapped) == 1:
            two.save(tmp_path / "saved")
        return map_file(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", from_file)
    assert_same(Notebook.load(tmp_path / "saved", tiny()), two)
    assert len(mapped) == 2


def child(run: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@forks
def test_processes_that_save_to_one_folder_at_once(tmp_path: Path) -> None:
    """Every save succeeds, a reader always gets one of them, and one remains in the end."""
    folder = tmp_path / "saved"
    notebooks = [build(status) for status in ("shipped", "pending", "cancelled by the customer")]

    def save_often(notebook: Notebook) -> None:
        for _ in range(15):
            notebook.save(folder)

    writers = [child(lambda it=it: save_often(it)) for it in notebooks]  # type: ignore[misc]
    writing = True
    while writing:
        writing = any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in writers)
        if (folder / MANIFEST).exists():
            loaded = Notebook.load(folder, tiny())
            assert loaded.ids == next(it for it in notebooks if it.fields == loaded.fields).ids
    assert [ended(pid) for pid in writers] == [0, 0, 0]
    assert len(files(folder)) == 2
    assert files(tmp_path) == ["saved"]


@forks
@pytest.mark.parametrize("replaces", [False, True])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path, replaces: bool) -> None:
    """A limit on the file size acts as a full disk: the write really fails halfway."""
    folder, old, new = tmp_path / "saved", build(), build("pending")
    if replaces:
        old.save(folder)

    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(StorageError, match="make room"):
            new.save(folder)

    assert ended(child(fail)) == 0
    assert files(tmp_path) == (["saved"] if replaces else [])
    if replaces:
        assert len(files(folder)) == 2
        assert_same(Notebook.load(folder, tiny()), old)


@forks
def test_a_save_that_is_killed_at_any_step_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    folder, old, new = tmp_path / "saved", build(), build("pending")
    steps = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"})

    def killed_at(step: int) -> None:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in steps:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        new.save(folder)

    found = set()
    for step in range(200):
        old.save(folder)
        assert len(files(folder)) == 2, "what the killed one left is cleared up"
        done = ended(child(lambda step=step: killed_at(step)))  # type: ignore[misc]
        loaded = Notebook.load(folder, tiny())
        assert_same(loaded, old if loaded.fields == old.fields else new)
        found.add(loaded.fields["status"])
        if done == 0:
            break
        assert done == -signal.SIGKILL
    assert step > 5
    assert found == {"shipped", "pending"}


# -- what is sealed and does not fit -----------------------------------------------------------------------------


def resealed(folder: Path, change: Change) -> None:
    """Rewrite a saved notebook with a change and correct digests."""
    manifest = folder / MANIFEST
    content: dict[str, Any] = json.loads(opened(manifest.read_bytes()) or b"")
    tensors = folder / content["tensors"]
    named = dict(load(tensors.read_bytes()))
    change(content, named)
    body = save({name: tensor.contiguous() for name, tensor in named.items()})
    content["tensors_sha256"] = hashlib.sha256(body).hexdigest()
    tensors.write_bytes(body)
    manifest.write_bytes(seal(json.dumps(content).encode()))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda _, named: named.update({name: change(named[name])})


def at_end(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(of: torch.Tensor) -> torch.Tensor:
        changed = of.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def unit(**changes: Any) -> Change:
    return lambda content, _: content["context"]["units"][0].update(changes)


def run(**changes: Any) -> Change:
    return lambda content, _: content["ledger"]["runs"][0].update(changes)


def top(**changes: Any) -> Change:
    return lambda content, _: content.update(changes)


CHANGES: dict[str, Change] = {
    "positions are missing": lambda _, named: named.pop("positions"),
    "positions of another type": tensor("positions", lambda it: it.double()),
    "positions of another shape": tensor("positions", lambda it: it[None]),
    "a negative position": tensor("positions", lambda it: it - 1),
    "a position beyond the model's": tensor("positions", at_end(1024)),
    "positions that repeat": tensor("positions", torch.zeros_like),
    "a layer is missing": lambda _, named: (named.pop("keys.1"), named.pop("values.1")),
    "a layer too many": lambda _, named: named.update({"keys.2": named["keys.1"].clone()}),
    "one head, which would be broadcast": tensor("keys.0", lambda it: it[:, :1]),
    "one token, which would be broadcast": tensor("values.0", lambda it: it[:, :, :1]),
    "a token less": tensor("values.1", lambda it: it[:, :, 1:]),
    "narrower heads": tensor("values.1", lambda it: it[..., :1]),
    "another dtype": tensor("keys.0", lambda it: it.half()),
    "NaN": tensor("values.1", at_end(float("nan"))),
    "origins are missing": lambda _, named: named.pop("origins"),
    "origins beyond the model's": tensor("origins", at_end(5000)),
    "origins of another shape": tensor("origins", lambda it: it[:-1]),
    "an origin's keys are missing": lambda _, named: named.pop("origin_keys.1"),
    "an origin's keys are of one head": tensor("origin_keys.1", lambda it: it[:, :1]),
    "an origin's keys are infinite": tensor("origin_keys.1", at_end(float("inf"))),
    "no units": lambda content, _: content["context"].update(units=[]),
    "a unit less": lambda content, _: content["context"]["units"].pop(),
    "an id beyond the vocabulary": lambda content, _: content["context"]["units"][0]["ids"].__setitem__(0, 512),
    "a negative id": lambda content, _: content["context"]["units"][0]["ids"].__setitem__(0, -1),
    "an offset is missing": lambda content, _: content["context"]["units"][0]["offsets"].pop(),
    "an offset beyond the text": lambda content, _: content["context"]["units"][0]["offsets"].__setitem__(3, [0, 9999]),
    "no text": unit(text=""),
    "an unknown kind": unit(kind="odd"),
    "a run less": lambda content, _: content["ledger"]["runs"].pop(),
    "an empty run": run(length=0),
    "a longer run": run(length=10_000),
    "a run of no version": run(version=99),
    "a run that was never computed": run(origin="pending"),
    "a run of another origin": run(origin="odd"),
    "a value outside of its run": run(statements=[[9999, "status", "x"]]),
    "a version of half a digest": lambda content, _: content["ledger"]["versions"][0]["content"].update(digest="ab"),
    "no places": unit(places=[]),
    "a place beyond the tokens": lambda content, _: content["context"]["units"][0]["places"][0].update(
        tokens=[900, 901]
    ),
    "a place in other tokens": lambda content, _: content["context"]["units"][0]["places"][0].update(tokens=[0, 1]),
    "a place in no field": lambda content, _: content["context"]["units"][0]["places"][0].update(name="other"),
    "a field is missing": lambda content, _: content["context"]["fields"].pop("tier"),
    "a field too many": lambda content, _: content["context"]["fields"].update(more={"current": "x", "written": "x"}),
    "a field's value has a line break": lambda content, _: content["context"]["fields"]["tier"].update(current="a\nb"),
    "a field's value has a role marker": lambda content, _: content["context"]["fields"]["tier"].update(
        current="<|im_start|>"
    ),
    "a placeholder is missing": lambda content, _: content["placeholders"].pop("status"),
    "a role of two words": lambda content, _: content["messages"][0].update(role="sys tem"),
    "an erratum without a value": top(erratum_template="nothing"),
    "an erratum with a line break": top(erratum_template="{name}\n{value}"),
    "tensors elsewhere": top(tensors="../other.safetensors"),
    "tensors under an odd name": top(tensors="notebook.json"),
    "something more": top(more=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_resealed_notebook_that_does_not_fit_is_refused(tmp_path: Path, change: Change) -> None:
    notebook = build()
    notebook.edit(status="cancelled by the customer", mode="in_place")  # the tail is relocated, so there are origins
    notebook.save(tmp_path)
    resealed(tmp_path, change)
    with pytest.raises(CorruptFileError):
        Notebook.load(tmp_path, notebook.model)


def test_a_notebook_that_is_resealed_as_it_was_is_loaded(tmp_path: Path) -> None:
    notebook = build()
    notebook.edit(status="cancelled by the customer", mode="in_place")
    notebook.save(tmp_path)
    resealed(tmp_path, lambda content, named: None)
    assert_same(Notebook.load(tmp_path, notebook.model), notebook)
