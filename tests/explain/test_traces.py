"""A real agent's trace of hashed blocks: the report finds where the prefix breaks, and does not claim why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programmable_kv import InvalidRequestError, explain_miss

TRACE = Path(__file__).parent / "traces" / "trace_0403.json"


def written(tmp_path: Path, name: str = "t.json", **changes: Any) -> Path:
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(TRACE.read_text()), **changes}))
    return path


def test_the_break_of_a_real_trace_is_found() -> None:
    requests = json.loads(TRACE.read_text())["requests"]
    report = explain_miss(TRACE)
    assert [finding.cause for finding in report.findings] == [
        "first request", "appended", "appended", "unknown (hashes only)", "appended",
    ]  # fmt: skip
    broken = report.findings[3]
    same = [a == b for a, b in zip(requests[2]["hash_ids"], requests[3]["hash_ids"], strict=False)].index(False)
    assert broken.hit == broken.token == 64 * same
    assert broken.lost == min(requests[2]["in"], requests[3]["in"]) - 64 * same
    assert broken.place == "system prompt"
    assert broken.byte is None
    assert (broken.line, broken.before, broken.after, broken.behind) == ("", "", "", ()), "a hash is no text"
    assert report.total == sum(request["in"] for request in requests)
    assert report.at_most
    assert any("not why" in note for note in report.notes)


def test_a_block_that_lies_in_two_parts_names_both(tmp_path: Path) -> None:
    requests = [
        {"t": 0, "model": "m", "in": 200, "hash_ids": [1, 2, 3]},
        {"t": 1, "model": "m", "in": 200, "hash_ids": [1, 9, 8]},
    ]
    found = explain_miss(written(tmp_path, requests=requests, tool_tokens=100, system_tokens=60)).findings[1]
    assert found.place == "tool list or system prompt"
    found = explain_miss(written(tmp_path, requests=requests, tool_tokens=30, system_tokens=20)).findings[1]
    assert found.place == "conversation"


def test_local_hashes_mean_nothing_in_another_file(tmp_path: Path) -> None:
    one, two = written(tmp_path, "a.json"), written(tmp_path, "b.json")
    report = explain_miss(one, two)
    assert report.findings[5].hit == 0
    other = explain_miss(one, written(tmp_path, "c.json", requests=[{"model": "m", "in": 99, "hash_ids": [1]}]))
    assert other.findings[5].cause == "new conversation", "another model's trace continues nothing"
    assert report.findings[5].cause == "new conversation"
    one, two = (written(tmp_path, name, hash_id_scope="global") for name in ("a.json", "b.json"))
    assert explain_miss(one, two).findings[5].cause == "repeated"


def test_a_trace_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"requests\[0\] has no 'hash_ids'"):
        explain_miss(written(tmp_path, requests=[{"in": 3}]))
    with pytest.raises(InvalidRequestError, match="block_size is 0"):
        explain_miss(written(tmp_path, block_size=0))
