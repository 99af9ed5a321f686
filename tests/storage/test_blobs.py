"""Blobs: one interface and several backends; none of them reaches outside its root or leaves half a blob."""

from __future__ import annotations

from pathlib import Path

import pytest

from programmable_kv.errors import CorruptFileError, InvalidArgumentError, StorageError
from programmable_kv.storage.files import Blobs, blobs_at
from programmable_kv.storage.local import LocalBlobs
from programmable_kv.storage.memory import MemoryBlobs


@pytest.fixture(params=["folder", "memory", "backend"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "backend":
        return MemoryBlobs()
    return blobs_at(tmp_path / "root" if request.param == "folder" else f"memory://{tmp_path.name}/root")


def test_a_blob_is_written_read_listed_and_removed(blobs: Blobs, tmp_path: Path) -> None:
    assert list(blobs.list()) == []
    assert blobs.read("a.json") is None
    assert not blobs.exists("a.json")
    blobs.write("a.json", b"one")
    blobs.write("a.json", b"three")
    digest = blobs.write_from("b.bin", lambda path: path.write_bytes(b"two"))
    assert digest == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    assert blobs.read("a.json") == b"three"
    assert {blob.name: blob.nbytes for blob in blobs.list()} == {"a.json": 5, "b.bin": 3}
    blobs.remove("a.json")
    blobs.remove("a.json")
    assert [blob.name for blob in blobs.list()] == ["b.bin"]


def test_touching_never_creates(blobs: Blobs) -> None:
    blobs.touch("gone.json")
    assert not blobs.exists("gone.json")
    assert list(blobs.list()) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "a/../b",
        "x..y",
        ".hidden",
        "a\n",
        "a\0b",
        "é",
        "x" * 200,
        7,
    ],
)
def test_a_name_that_is_not_flat_is_refused(blobs: Blobs, name: str) -> None:
    for operation in (
        lambda: blobs.read(name),
        lambda: blobs.write(name, b""),
        lambda: blobs.write_from(name, lambda path: path.write_bytes(b"")),
        lambda: blobs.exists(name),
        lambda: blobs.touch(name),
        lambda: blobs.remove(name),
    ):
        with pytest.raises(InvalidArgumentError, match="without a folder"):
            operation()


def test_a_url_never_writes_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blobs_at("memory://here/it").write("a", b"x")
    for refused in (Path("memory://here/it"), "memory:/here/it", Path("s3://bucket/it")):
        with pytest.raises(InvalidArgumentError, match="one slash"):
            blobs_at(refused)
    with pytest.raises(InvalidArgumentError, match="nonsense"):
        blobs_at("nonsense://here/it")
    assert list(tmp_path.iterdir()) == []
    blobs_at(f"file://{tmp_path}/local").write("a", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


@pytest.mark.parametrize("where", ["", 7, None])
def test_what_is_no_place_is_refused(where: object) -> None:
    with pytest.raises(InvalidArgumentError, match="a storage location"):
        blobs_at(where)  # type: ignore[arg-type]


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    blobs_at("~/kept").write("a", b"x")
    assert (tmp_path / "kept" / "a").read_bytes() == b"x"


def test_nothing_is_made_before_something_is_written(tmp_path: Path) -> None:
    blobs = blobs_at(tmp_path / "root")
    assert list(blobs.list()) == []
    blobs.remove("a")
    blobs.touch("a")
    with blobs.alone() as alone:
        assert not alone
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_blob_and_nothing_else(tmp_path: Path) -> None:
    blobs = blobs_at(tmp_path)
    blobs.write("a", b"old")

    def half(path: Path) -> None:
        path.write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="make room"):
        blobs.write_from("a", half)
    assert blobs.read("a") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_a_blobs_place(tmp_path: Path) -> None:
    """Reading it raises CorruptFileError. Writing moves it aside, with its content, which belongs to somebody."""
    blobs = blobs_at(tmp_path)
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
        if name == "full":
            (tmp_path / name / "thesis.txt").write_text("three years")
        with pytest.raises(CorruptFileError, match="folder"):
            blobs.read(name)
        blobs.write(name, b"x")
        assert blobs.read(name) == b"x"
    [aside] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (aside / "thesis.txt").read_text() == "three years"
    assert [blob.name for blob in blobs.list() if blob.name not in ("empty", "full")] == []


def test_a_file_in_the_roots_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("x")
    blobs = blobs_at(tmp_path / "root")
    for operation in (lambda: blobs.write("a", b""), lambda: blobs.read("a"), lambda: list(blobs.list())):
        with pytest.raises(StorageError, match="root"):
            operation()


def test_a_backends_own_errors_become_ours() -> None:
    class Broken(MemoryBlobs):
        def _read(self, name: str) -> bytes:
            raise LookupError("the server said no")

    with pytest.raises(StorageError, match="the server said no"):
        Broken().read("a")


def test_clearing_up_waits_for_nobody_and_knows_when_somebody_writes(tmp_path: Path) -> None:
    one, two = LocalBlobs(tmp_path), LocalBlobs(tmp_path)
    with one.writing(), two.writing(), two.alone() as alone:
        assert not alone
    with one.alone() as alone, two.alone() as other:
        assert alone
        assert not other


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    for name in (f".a.{'0' * 32}.partial", f".a.{'0' * 32}.aside", ".a.partial", "a.partial"):
        (tmp_path / name).write_bytes(b"half")
    blobs.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a.{'0' * 32}.aside", ".a.partial", "a.partial"]


def test_a_password_in_a_url_is_in_no_message(tmp_path: Path) -> None:
    blobs = blobs_at(f"memory://user:secret@host/{tmp_path.name}")
    assert "secret" not in blobs.where
    with pytest.raises(InvalidArgumentError, match="nonsense") as told:
        blobs_at("nonsense://user:secret@host/x")
    assert "secret" not in str(told.value)
