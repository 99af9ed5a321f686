"""`pkv skills` on a tiny model in a folder: every command, its JSON, its errors, and stores at URLs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import tiny
from programmable_kv import Skill
from programmable_kv.commands.skills import app
from programmable_kv.errors import CorruptFileError, InvalidArgumentError, StorageError, UnknownSkillError
from programmable_kv.skills.store import SkillStore


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    made = tiny()
    made.engine.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.md"
    path.write_text("refund policy: if the tier is {tier} refund, else deny.")
    return str(path)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["--store", str(tmp_path / "skills") if request.param == "folder" else f"memory://{tmp_path.name}"]


def pkv(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def pkv_json(*arguments: str) -> Any:
    return json.loads(pkv(*arguments, "--json"))


def test_from_compiling_to_removing(model: str, policy: str, store: list[str], tmp_path: Path) -> None:
    compiling = ["compile", policy, "--name", "refunds", "--field", "tier=gold", "--model", model, *store]
    [first], [again] = pkv_json(*compiling), pkv_json(*compiling)
    assert first["tokens_computed"] == first["tokens"] > 0
    assert again["tokens_computed"] == 0
    assert "kept already" in pkv(*compiling)
    [entry] = pkv_json("list", *store)
    assert entry["values"] == {"tier": "gold"}
    assert pkv_json("verify", "refunds", *store)["key"] == entry["key"]
    assert "intact" in pkv("verify", entry["key"][:8], *store)
    assert json.loads(pkv("show", "refunds", *store))["unit"]["text"].startswith("refund policy")
    carried = tmp_path / "refunds.skill"
    assert pkv_json("export", "refunds", str(carried), *store)["name"] == "refunds"
    assert pkv_json("rm", "refunds", *store) == {"removed": entry["key"]}
    assert pkv_json("import", str(carried), *store)["key"] == entry["key"]
    with pytest.raises(StorageError, match="cannot write"):
        pkv("export", "refunds", str(tmp_path / "missing" / "x.skill"), *store)
    with pytest.raises(CorruptFileError, match="not an exported skill"):
        pkv("import", policy, *store)
    for command in ("verify", "rm", "show"):
        with pytest.raises(UnknownSkillError, match="there is no skill called"):
            pkv(command, "../refunds", *store)


def test_several_texts_are_compiled_together(model: str, policy: str, store: list[str], tmp_path: Path) -> None:
    dates = tmp_path / "dates.md"
    dates.write_text("dates come first.")
    texts = [f"policy={policy}", f"dates={dates}"]
    options = ["--field", "tier=gold", "--inside", "system", "--between", r"\n\n", "--model", model, *store]
    first = pkv_json("compile-together", *texts, *options)
    assert [row["name"] for row in first] == ["policy", "dates"]
    assert all(row["tokens_computed"] for row in first)
    assert pkv("compile-together", *texts, *options).count("kept already") == 2
    shown = json.loads(pkv("show", "dates", *store))
    assert shown["preface"].startswith("<|im_start|>system\nrefund policy: if the tier is gold")
    assert shown["preface"].endswith("deny.\n\n")
    for wrong, message in (("dates.md", "name=path"), ("=x", "name=path"), (f"policy={dates}", "two texts")):
        with pytest.raises(InvalidArgumentError, match=message):
            pkv("compile-together", texts[0], wrong, *options)


def test_the_list_fits_eighty_columns(model: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ["--store", str(tmp_path / "skills")]
    name = "a_name_that_is_as_long_as_names_may_be".ljust(64, "x")
    pkv("compile", policy, "--name", name, "--field", "tier=gold", "--model", model, *store)
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run(
        [sys.executable, "-m", "programmable_kv", "skills", "list", *store], capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "size" in done.stdout
    folded = "".join(re.findall(r"^[│┃] (\S+)", done.stdout, re.MULTILINE))
    assert name in folded, "a long name is folded, not cut off"


def test_what_cannot_be_used_is_named_and_can_be_removed(model: str, policy: str, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "skills")]
    pkv("compile", policy, "--name", "refunds", "--field", "tier=gold", "--model", model, *store)
    key = SkillStore(tmp_path / "skills").entry("refunds").key
    (tmp_path / "skills" / f"{key}.json").write_text('{"format": 1}')
    done = CliRunner().invoke(app, ["list", "--json", *store])
    assert json.loads(done.stdout) == []
    assert key in done.stderr.replace("\n", "")
    pkv("rm", key[:8], *store)
    assert list((tmp_path / "skills").iterdir()) == []


def test_an_imported_manifest_does_not_steer_the_terminal(tmp_path: Path) -> None:
    store = SkillStore(tmp_path)
    store.put(Skill.compile(tiny(), "one thing.", name="one"), model_name="\x1b[2J[red]evil")
    shown = pkv("list", "--store", str(tmp_path))
    assert "\x1b[2J" not in shown
    assert "[red]evil" in shown.replace("\n", "").replace(" ", "").replace("│", "")


def test_these_commands_import_nothing_heavy_before_they_run() -> None:
    """They import nothing but the standard library and what the options shared by all commands import."""
    code = (
        "import sys, programmable_kv.commands.common; before = set(sys.modules); import programmable_kv.commands.skills; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'programmable_kv'}"
    code = code.replace(
        "print(", "print([name for name in set(sys.modules) - before if name.startswith('programmable_kv')], "
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['programmable_kv.commands.skills'] ")


def test_words_by_which_lines_speak_of_a_field(model: str, store: list[str], tmp_path: Path) -> None:
    text = tmp_path / "tiers.md"
    text.write_text("The tier is {tier}.\nFor gold, refund.\nBe brief.\n")
    compiling = ["compile", str(text), "--field", "tier=gold", "--visibility", "design", "--model", model, *store]
    pkv(*compiling, "--name", "plain")
    pkv(*compiling, "--name", "declared", "--mentions", "tier=gold", "--mentions", "tier=silver")
    kept = SkillStore(store[1])
    shown = {name: kept.entry(name) for name in ("plain", "declared")}
    assert shown["plain"].key != shown["declared"].key
    assert [shown[name].mentions for name in shown] == [{}, {"tier": ("gold", "silver")}]
    with pytest.raises(InvalidArgumentError, match="field=words"):
        pkv(*compiling, "--mentions", "tier")
