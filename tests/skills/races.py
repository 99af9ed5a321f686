"""The scenarios of `test_store_races.py`, run in their own process: one model, and children forked from it.

    python races.py FOLDER

Prints a line of JSON for each scenario: what happened, or the traceback of the assertion that failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest

from conftest import tiny
from programmable_kv import Skill
from programmable_kv.errors import StorageError
from programmable_kv.skills.store import SkillStore

MODEL = tiny()
STEPS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.utime", "os.listdir", "os.scandir", "fcntl.flock"})
"""the audit events with which the interpreter reports operations on files"""


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


def killed_at(step: int, run: Callable[[], object]) -> int:
    """Run in a child that is killed with SIGKILL at that step. Returns its exit code."""

    def die_there() -> None:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        run()

    return ended(child(die_there))


def killed_after(nbytes: int, run: Callable[[], object]) -> int:
    """Run in a child that is killed within the first write beyond that many bytes. Returns its exit code."""

    def die_there() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        run()

    return ended(child(die_there))


def check_whole(folder: Path, skill: Skill, *, there: bool | None) -> None:
    """Assert that the entry can be read whole or does not exist, and that the next write removes leftovers."""
    store = SkillStore(folder)
    assert store.damaged() == []
    held = [entry.name for entry in store.entries()]
    assert held == ["short"] if there else held in ([], ["short"]), held
    if held:
        assert store.get(MODEL, "short").unit.ids == skill.unit.ids
    store.put(skill)
    entry = store.entry("short")
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{entry.key}.json", entry.tensors])


def killed_writers(folder: Path) -> str:
    skill = Skill.compile(MODEL, "short.", name="short")
    steps = 0
    for there in (False, True):
        for step in range(1000):
            store = SkillStore(folder)
            if not there:
                for key in (entry.key for entry in store.entries()):
                    store.remove(key)
            done = killed_at(step, lambda store=store: store.put(skill))  # type: ignore[misc]
            check_whole(folder, skill, there=there or None)
            if done == 0:
                break
            assert done == -signal.SIGKILL, done
            steps += 1
        largest = max(path.stat().st_size for path in folder.iterdir())
        for nbytes in (0, 1, 700, largest - 1):
            done = killed_after(nbytes, lambda: SkillStore(folder).put(skill))
            assert done == -signal.SIGXFSZ, done
            check_whole(folder, skill, there=True)
    assert steps > 10
    return f"killed at {steps} steps"


def evicting(folder: Path) -> str:
    """Three processes compile six texts into a store with room for two, and each evicts the others' entries."""
    texts = [f"text number {number} says so." for number in range(6)]
    limit = 2 * SkillStore(folder / "size").put(Skill.compile(MODEL, texts[0], name="size")).nbytes
    shared = folder / "shared"
    until = time.monotonic() + 3

    def use(seed: int) -> None:
        store, turn = SkillStore(shared, limit=limit), seed
        while time.monotonic() < until:
            turn = (5 * turn + 7) % 9
            text = texts[turn % 6]
            skill = store.compile(MODEL, text, name=f"n{turn % 2}")
            assert skill.text == text

    assert [ended(pid) for pid in [child(lambda seed=seed: use(seed)) for seed in range(3)]] == [0, 0, 0]  # type: ignore[misc]
    store = SkillStore(shared, limit=10 * limit)
    assert store.damaged() == []
    for computes in (None, False):  # every key can be used again
        for number, text in enumerate(texts):
            skill = store.compile(MODEL, text, name=f"t{number}")
            assert computes is None or skill.account.tokens_computed == 0
            assert store.verify(skill.name).nbytes
    names = {name for entry in store.entries() for name in (f"{entry.key}.json", entry.tensors)}
    assert {path.name for path in shared.iterdir()} == names
    return "no key was lost"


def two_writers(folder: Path) -> str:
    """One key, two contents (another thread count rounds differently): a reader gets one of them, never a mixture."""
    one = Skill.compile(MODEL, "short.", name="short")
    other = replace(one, segment=replace(one.segment, values=tuple(values + 1 for values in one.segment.values)))

    def write(skill: Skill) -> None:
        for _ in range(60):
            SkillStore(folder).put(skill)

    SkillStore(folder).put(one)
    writers = [child(lambda skill=skill: write(skill)) for skill in (one, other)]  # type: ignore[misc]
    seen = {0: 0, 1: 0}
    reader = SkillStore(folder)
    while any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in writers):
        got = reader.get(MODEL, "short")
        seen[int(bool((got.segment.values[0] != one.segment.values[0]).all()))] += 1
    assert [ended(pid) for pid in writers] == [0, 0]
    assert min(seen.values()) > 0
    assert len(list(folder.iterdir())) == 2, sorted(folder.iterdir())
    return f"read {seen}"


def stopped_writer(folder: Path) -> str:
    """A process that is stopped during a write blocks no other process, and its unfinished file is not removed."""
    skill, other = (Skill.compile(MODEL, f"{name}.", name=name) for name in ("short", "other"))

    def stop_before_the_manifest() -> None:
        renamed = []

        def count(event: str, _: object) -> None:
            if event == "os.rename":
                renamed.append(event)
                if len(renamed) == 2:
                    os.kill(os.getpid(), signal.SIGSTOP)

        sys.addaudithook(count)
        SkillStore(folder).put(skill)

    pid = child(stop_before_the_manifest)
    os.waitpid(pid, os.WUNTRACED)
    store = SkillStore(folder)
    store.put(other)
    assert [entry.name for entry in store.entries()] == ["other"]
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    assert store.verify("short").name == "short"
    return "it went on"


def full_disk(folder: Path) -> str:
    """A limit on the file size acts as a full disk: the write really fails halfway, and raises a typed error."""
    skill = Skill.compile(MODEL, "short.", name="short")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(StorageError, match="make room"):
            SkillStore(folder).put(skill)
        assert list(folder.iterdir()) == []

    assert ended(child(write)) == 0
    return "told"


SCENARIOS = (killed_writers, evicting, two_writers, stopped_writer, full_disk)

if __name__ == "__main__":
    for scenario in SCENARIOS:
        folder = Path(sys.argv[1]) / scenario.__name__
        folder.mkdir()
        try:
            told, error = scenario(folder), ""
        except Exception:
            told, error = "", traceback.format_exc()
        print(json.dumps({"scenario": scenario.__name__, "told": told, "error": error}), flush=True)
