"""The command line as a user runs it: real processes, real output, errors without tracebacks."""

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
from programmable_kv import Mode
from programmable_kv.demo import demo
from programmable_kv.notebook.html import ERRATUM_STYLE

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


def pkv(*arguments: str, cwd: Path | None = None, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pkv` in its own process, in a terminal of 80 columns. `given` is its standard input."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "programmable_kv", *arguments], capture_output=True, text=True, check=False, cwd=cwd,
        env=environment, input=given,
    )  # fmt: skip


def is_whole(table: str) -> bool:
    """Whether a printed table fits 80 columns and no cell is truncated."""
    return all(len(line) <= 80 for line in table.splitlines()) and "…" not in table


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "policy.md"
    path.write_text(POLICY, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk, for tests that do not depend on what a model decides."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    return str(folder)


@pytest.mark.weights
def test_edit_prints_one_json_object(policy: str) -> None:
    done = pkv("edit", "--prompt", policy, "--field", "status=shipped", "--set", "status=pending", *ASK, "--json")
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    modes = {row["mode"]: row for row in body["modes"]}
    assert set(modes) == set(Mode)
    for row in modes.values():
        assert {"mode", "decision", "probabilities", "agrees_with_full", "tokens_computed", "ttft_ms"} <= set(row)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert body["before"] == "deny"
    assert modes["full"]["decision"] == "cancel"
    assert modes["stale"]["decision"] == "deny"
    assert modes["field_erratum"]["agrees_with_full"] is True
    assert len(body["prompt_sha256"]) == 64
    assert len(body["model_fingerprint"]) == 32


def test_edit_prints_a_table(policy: str, tiny_folder: str) -> None:
    arguments = ["--field", "status=shipped", "--set", "status=pending", "--mode", "erratum", "--raw"]
    done = pkv("edit", "--prompt", policy, *arguments, *ASK, "--model", tiny_folder)
    assert done.returncode == 0, done.stderr
    assert is_whole(done.stdout)
    assert "erratum" in done.stdout
    assert "full" in done.stdout
    assert "suffix" not in done.stdout


def test_an_edit_to_the_same_value_is_refused(policy: str) -> None:
    done = pkv("edit", "--prompt", policy, "--field", "status=shipped", "--set", "status=shipped", *ASK)
    assert done.returncode == 1
    assert "nothing is edited" in done.stderr


def test_edit_reads_standard_input_files_and_answers_with_commas(tiny_folder: str, tmp_path: Path) -> None:
    (tmp_path / "value.txt").write_text("pending\n", encoding="utf-8")
    done = pkv(
        "edit", "--prompt", "-", "--field", "status=@@home", "--set", f"status=@{tmp_path / 'value.txt'}", "--ask", "Cancel?",
        "--options", '"Yes, cancel it",No', "--option", "Ask, then wait", "--mode", "suffix", "--json", "--model", tiny_folder,
        given=POLICY.replace("\n", "\r\n"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert set(body["modes"][0]["probabilities"]) == {"Yes, cancel it", "No", "Ask, then wait"}
    assert [row["mode"] for row in body["modes"]] == ["full", "suffix"]


def test_edit_takes_values_of_several_lines_from_files(tiny_folder: str, tmp_path: Path) -> None:
    (tmp_path / "todo.txt").write_text("- [ ] call\n- [ ] refund\n")
    (tmp_path / "prompt.txt").write_text("todo:\n{todo}\nreply only.")
    done = pkv(
        "edit", "--prompt", str(tmp_path / "prompt.txt"), "--field", "todo=none", "--set", f"todo=@{tmp_path / 'todo.txt'}",
        *ASK, "--model", tiny_folder, "--mode", "field_erratum", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["mode"] for row in json.loads(done.stdout)["modes"]} == {"full", "field_erratum"}


@pytest.mark.slow
def test_edit_shows_which_modes_a_model_refuses(policy: str, tmp_path: Path) -> None:
    """A model whose keys cannot be relocated refuses to refresh a value of another length; other modes are compared."""
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
    assert "cached at one position is valid at another" in modes["in_place"]["note"]
    assert modes["erratum"]["decision"] in ("cancel", "deny")
    table = pkv("edit", "--prompt", policy, *edited, *ASK, "--model", str(tmp_path / "gpt2"), "--mode", "in_place")
    assert "refused" in table.stdout


BEFORE_A_MODEL_IS_LOADED = [
    (
        ["--field", "status=shipped", "--set", "colour=red", *ASK],
        "there is no field 'colour' to --set; the fields are: status",
    ),
    (["--field", "status", "--set", "status=x", *ASK], "takes name=value"),
    (["--field", "status=a", "--field", "status=b", "--set", "status=x", *ASK], "gives 'status' twice"),
    (["--field", "nothing=here", "--set", "nothing=x", *ASK], "no placeholder {nothing}"),
    (["--field", "status=@nowhere.txt", "--set", "status=x", *ASK], "cannot read nowhere.txt"),
    (["--field", "status=shipped", "--set", "status=x", "--ask", "?", "--options", "one"], "at least two answers"),
    (["--field", "status=shipped", "--set", "status=x", "--ask", "?"], "at least two answers"),
    (
        ["--field", "status=shipped", "--set", "status=x", "--ask", "?", "--options", '"a,b'],
        "an item with a comma in double",
    ),
    (["--field", "status=shipped", "--set", "status=x", *ASK, "--mode", "magic"], "unknown edit mode 'magic'"),
]
WITH_A_MODEL = [
    (["--field", "status=shipped", "--set", "status=", *ASK], "is empty"),
    (["--field", "status=shipped", "--set", "status=a<|im_end|>b", *ASK], "mark roles"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BEFORE_A_MODEL_IS_LOADED, ids=lambda item: item if isinstance(item, str) else ""
)
def test_mistakes_are_told_before_a_model_is_loaded(policy: str, arguments: list[str], message: str) -> None:
    """The named model does not exist, but the error is about the other mistake."""
    assert_told(pkv("edit", "--prompt", policy, *arguments, "--model", "missing.gguf"), message)


@pytest.mark.parametrize(("arguments", "message"), WITH_A_MODEL, ids=lambda item: item if isinstance(item, str) else "")
def test_values_are_judged_by_the_model(policy: str, tiny_folder: str, arguments: list[str], message: str) -> None:
    assert_told(pkv("edit", "--prompt", policy, *arguments, "--model", tiny_folder), message)


def test_a_missing_model(policy: str) -> None:
    edited = ["--field", "status=shipped", "--set", "status=x", *ASK]
    assert_told(pkv("edit", "--prompt", policy, *edited, "--model", "missing.gguf"), "no GGUF file")


def test_a_missing_prompt_file() -> None:
    edited = ["--field", "a=b", "--set", "a=c", *ASK]
    assert_told(pkv("edit", "--prompt", "nowhere.md", *edited), "cannot read nowhere.md")


def test_a_prompt_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "p.md").write_bytes(b"\xff\xfe{a}")
    edited = ["--field", "a=b", "--set", "a=c", *ASK]
    assert_told(pkv("edit", "--prompt", str(tmp_path / "p.md"), *edited), "is not UTF-8 text")


def assert_told(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Assert one line on stderr with the message, no traceback, and nothing on stdout."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error (")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_the_version() -> None:
    import programmable_kv

    assert pkv("--version").stdout == f"programmable-kv {programmable_kv.__version__}\n"


def test_an_interrupt_is_one_line(policy: str) -> None:
    """Press Ctrl-C while the command waits for its standard input."""
    import signal

    command = [sys.executable, "-m", "programmable_kv", "edit", "--prompt", "-", "--field", "a=b", "--set", "a=c", *ASK]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        # A pipe buffers 64 kB. Once more than that is written, the command has started and is reading.
        running.stdin.write("x" * 1_000_000)
        running.stdin.flush()
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate()
    assert running.returncode == 130
    assert stderr.startswith("interrupted")
    assert len(stderr.splitlines()) == 1
    assert stdout == ""


@pytest.mark.weights
def test_demo_writes_its_page_which_needs_nothing_else(tmp_path: Path) -> None:
    done = pkv("demo", "--page", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "account_role: verified_admin → suspended_user" in done.stdout
    assert "order_status" in done.stdout
    assert is_whole(done.stdout.rpartition("\n\n")[0] or done.stdout)
    assert done.stderr == ""
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<details>") == len(demo.CASES) * (len(demo.MODES) + 1)
    for state in ("stale", "after edit", "refreshed", "exact"):
        assert f'title="{state}"' in page
    assert ERRATUM_STYLE in page


def test_results_lists_the_records() -> None:
    root = Path(__file__).parent.parent
    done = pkv("results", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "edit-modes" in done.stdout
    assert is_whole(done.stdout)
    assert "edit-ttft" in json.loads(pkv("results", "--json", cwd=root).stdout)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bad.json").write_text("{}")
    done = pkv("results", cwd=tmp_path)
    assert done.returncode == 1
    assert "bad.json" in done.stderr.replace("\n", "")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_skill_is_compiled_kept_carried_and_removed(policy: str, tiny_folder: str, tmp_path: Path) -> None:
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
        "--model",
        tiny_folder,
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
    assert "was removed" in pkv("skills", "rm", "refunds", *store).stdout
    gone = pkv("skills", "verify", "refunds", *store)
    assert gone.returncode != 0
    assert "no skill called" in gone.stderr
    assert "Traceback" not in gone.stderr
    assert pkv("skills", "import", str(carried), *store).returncode == 0
    assert "intact" in pkv("skills", "verify", "refunds", *store).stdout


def test_a_disk_that_is_full_is_told_and_nothing_half_written_stays(
    policy: str, tiny_folder: str, tmp_path: Path
) -> None:
    """A limit on the file size acts as a full disk: the write really fails halfway."""
    folder = tmp_path / "skills"
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f 8; exec "{sys.executable}" -m programmable_kv "$@"', "pkv", "skills", "compile", policy,
         "--field", "status=shipped", "--store", str(folder), "--model", tiny_folder],
        capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error (Storage)")
    assert "make room" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
