"""The command line as a user meets it: real processes, real output, errors without tracebacks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_model, tokenizer

POLICY = """You are the support agent of an online shop.

# Session
order_status: {status}

# Policy
- Be polite and brief in every message.
- If order_status is pending, cancel.
- If order_status is shipped, deny.
- {"json": "is left alone"}

Reply with the action only.
"""
ASK = ["--ask", "Somebody asks for a cancellation. What do you do?", "--options", "cancel,deny"]


def pkv(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "programmable_kv", *arguments], capture_output=True, text=True, check=False, cwd=cwd,
        env=environment,
    )  # fmt: skip


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.md"
    path.write_text(POLICY, encoding="utf-8")
    return str(path)


def test_edit_prints_one_json_object(policy: str) -> None:
    done = pkv("edit", "--prompt", policy, "--field", "status=shipped", "--set", "status=pending", *ASK, "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    modes = {row["mode"]: row for row in body["modes"]}
    assert set(modes) == {"stale", "in_place", "erratum", "field_erratum", "selective", "suffix", "full"}
    for row in modes.values():
        assert {"mode", "decision", "probabilities", "agrees_with_full", "tokens_computed", "ttft_ms"} <= set(row)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert body["before"] == "deny"
    assert modes["full"]["decision"] == "cancel"
    assert modes["stale"]["decision"] == "deny"
    assert modes["field_erratum"]["agrees_with_full"] is True
    assert len(body["prompt_sha256"]) == 64
    assert len(body["model_fingerprint"]) == 32


def test_edit_prints_a_table(policy: str) -> None:
    arguments = ["--field", "status=shipped", "--set", "status=pending", "--mode", "erratum", "--raw"]
    done = pkv("edit", "--prompt", policy, *arguments, *ASK)
    assert done.returncode == 0, done.stderr
    assert "erratum" in done.stdout
    assert "full" in done.stdout
    assert "suffix" not in done.stdout


def test_edit_shows_which_modes_a_model_refuses(policy: str, tmp_path: Path) -> None:
    """A model whose keys cannot be moved refuses to refresh a value of another length; the others are compared."""
    model = copy.deepcopy(tiny_model("gpt2", dtype=torch.float32, n_positions=1024, n_embd=32, n_layer=2, n_head=4))
    plain = copy.copy(tokenizer("byte-level"))
    plain.chat_template = None
    for part in (model, plain):
        part.save_pretrained(tmp_path / "gpt2")
    edited = ["--field", "status=shipped", "--set", "status=not shipped and pending"]
    done = pkv("edit", "--prompt", policy, *edited, *ASK, "--model", str(tmp_path / "gpt2"), "--json")
    assert done.returncode == 0, done.stderr
    modes = {row["mode"]: row for row in json.loads(done.stdout)["modes"]}
    assert modes["in_place"]["decision"] is None
    assert "cached at one position is right at another" in modes["in_place"]["note"]
    assert modes["erratum"]["decision"] in ("cancel", "deny")
    table = pkv("edit", "--prompt", policy, *edited, *ASK, "--model", str(tmp_path / "gpt2"), "--mode", "in_place")
    assert "refused" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--field", "status=shipped", "--set", "colour=red", *ASK], "no field 'colour'"),
        (["--field", "status=shipped", "--set", "status=", *ASK], "is empty"),
        (["--field", "status", "--set", "status=x", *ASK], "takes name=value"),
        (["--field", "nothing=here", "--set", "nothing=x", *ASK], "no placeholder"),
        (["--field", "status=shipped", "--set", "status=a<|im_end|>b", *ASK], "marks roles"),
        (["--field", "status=shipped", "--set", "status=x", "--ask", "?", "--options", "one"], "at least two answers"),
        (["--field", "status=shipped", "--set", "status=x", *ASK, "--mode", "magic"], "no edit mode 'magic'"),
        (["--field", "status=shipped", "--set", "status=x", *ASK, "--model", "missing.gguf"], "no GGUF file"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_errors_are_one_message_and_no_traceback(policy: str, arguments: list[str], message: str) -> None:
    done = pkv("edit", "--prompt", policy, *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_missing_prompt_file() -> None:
    done = pkv("edit", "--prompt", "nowhere.md", "--field", "a=b", "--set", "a=c", *ASK)
    assert done.returncode == 1
    assert "cannot read nowhere.md" in done.stderr


def test_demo_writes_its_page(tmp_path: Path) -> None:
    done = pkv("demo", "--page", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "account_role: verified_admin → suspended_user" in done.stdout
    assert "order_status" in done.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_results_lists_the_records() -> None:
    root = Path(__file__).parent.parent
    done = pkv("results", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "edit-modes" in done.stdout
    assert "edit-ttft" in json.loads(pkv("results", "--json", cwd=root).stdout)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bad.json").write_text("{}")
    done = pkv("results", cwd=tmp_path)
    assert done.returncode == 1
    assert "bad.json" in done.stderr.replace("\n", "")


def test_zoo_examines_the_types_that_are_named_and_writes_nothing(tmp_path: Path) -> None:
    done = pkv("zoo", "--type", "gpt2", "--type", "llama", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = {(row["type"], row["side"]): row["verdict"] for row in json.loads(done.stdout)}
    assert verdicts["gpt2", "causal LM"] == "refused"
    assert verdicts["llama", "causal LM"] == "exact"
    assert verdicts["llama", "with dynamic scaling"] == "exact within a regime"
    assert list(tmp_path.iterdir()) == []
    assert "lama" in pkv("zoo", "--type", "lama").stderr


def test_a_record_does_not_say_where_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from programmable_kv.commands.common import command

    monkeypatch.setattr(
        sys, "argv", ["pkv", "bench", "edit", "--out", "/home/me/x.json", "--repeats", "3", "--out=y.json"]
    )
    assert command() == "pkv bench edit --repeats 3"


def test_a_skill_is_compiled_kept_carried_and_removed(policy: str, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "skills")]
    compiling = [
        "skills",
        "compile",
        policy,
        "--name",
        "refunds",
        "--field",
        "status=shipped",
        "--inside",
        "system",
        *store,
    ]
    first, again = pkv(*compiling), pkv(*compiling)
    assert "computed in" in first.stdout, first.stderr
    assert "kept already" in again.stdout, again.stderr
    [entry] = json.loads(pkv("skills", "list", "--json", *store).stdout)
    assert entry["preface"] == "<|im_start|>system\n"
    assert entry["values"] == {"status": "shipped"}
    assert json.loads(pkv("skills", "show", "refunds", *store).stdout)["unit"]["text"].startswith("You are the support")
    carried = tmp_path / "refunds.skill"
    assert pkv("skills", "export", "refunds", str(carried), *store).returncode == 0
    assert "is gone" in pkv("skills", "rm", "refunds", *store).stdout
    gone = pkv("skills", "verify", "refunds", *store)
    assert gone.returncode != 0
    assert "0 skills" in gone.stderr
    assert "Traceback" not in gone.stderr
    assert pkv("skills", "import", str(carried), *store).returncode == 0
    assert "intact" in pkv("skills", "verify", "refunds", *store).stdout


def test_a_disk_that_is_full_is_told_and_nothing_half_written_stays(policy: str, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: the write fails in its midst, for real."""
    folder = tmp_path / "skills"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 8; exec "{sys.executable}" -m programmable_kv "$@"', "pkv", "skills", "compile", policy,
         "--field", "status=shipped", "--store", str(folder)],
        capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error (OS)" in done.stderr
    assert "make room" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
