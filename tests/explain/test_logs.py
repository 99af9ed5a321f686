"""Logs in the formats that people have. Lines that are not requests are reported by their number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from explain.corpus import ANSWERED, ASKED, ASKED_NEXT, RULES, chat, codex, said
from programmable_kv import InvalidArgumentError, InvalidRequestError, explain_miss
from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.pieces import Request

BODY = chat(RULES, ASKED)
USAGE = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 64}}

STREAM = """event: message_start
data: {"type": "message_start", "message": {"usage": {"input_tokens": 3, "cache_read_input_tokens": 60,
data: {"type": "message_start", "message": {"usage": {"input_tokens": 3, "cache_read_input_tokens": 60}}}
data: {"type": "message_delta", "usage": {"output_tokens": 9}}
"""
OPENAI_STREAM = (
    f"data: {json.dumps({'choices': [], 'usage': None})}\n\ndata: {json.dumps({'usage': USAGE})}\n\ndata: [DONE]\n"
)


def read(entry: dict[str, Any]) -> Request:
    reader = LogReader()
    reader.add(entry, "x")
    [found] = reader.requests
    return found


@pytest.mark.parametrize(
    ("entry", "usage", "time", "session"),
    [
        (BODY, None, None, ""),
        ({"request": BODY, "response": {"usage": USAGE}, "timestamp": 5}, 64, 5.0, ""),
        ({"body": BODY, "usage": USAGE, "ts": "1970-01-01T00:01:00Z"}, 64, 60.0, ""),
        ({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}, None, None, ""),
        ({"request": {"body": BODY, "headers": {"X-Claude-Code-Session-Id": "s1"}}}, None, None, "s1"),
        ({"request": json.dumps(BODY), "response": json.dumps({"usage": USAGE})}, 64, None, ""),
        ({"proxy_server_request": {"body": BODY}, "response": {"body": {"usage": USAGE}}}, 64, None, ""),
        ({**BODY, "response": {"usage": USAGE}, "startTime": "1970-01-01 00:00:30"}, 64, 30.0, ""),
        ({"request": {"body": BODY, "timestamp": 7}, "response": {"body_raw": STREAM}}, 60, 7.0, ""),
        ({"request": BODY, "response": OPENAI_STREAM}, 64, None, ""),
        ({"request": BODY, "time": 1_780_000_000_000}, None, 1_780_000_000.0, ""),
        ({"request": {**BODY, "metadata": {"user_id": "u1"}}}, None, None, "u1"),
        ({"request": {**BODY, "prompt_cache_key": "k1"}}, None, None, "k1"),
    ],
)
def test_a_line_of_any_gateway_is_read(
    entry: dict[str, Any], usage: int | None, time: float | None, session: str
) -> None:
    found = read(entry)
    assert [piece.text for piece in found.pieces] == [RULES, ASKED]
    assert found.model == "some-model"
    assert (found.usage.cached if found.usage else None) == usage
    assert found.time == time
    assert found.session == session


def test_a_file_is_one_request_a_list_or_a_log(tmp_path: Path) -> None:
    second = chat(RULES, ASKED, ANSWERED, ASKED_NEXT)
    one, two, listed, log = (tmp_path / name for name in ("one.json", "two.json", "list.json", "log.jsonl"))
    one.write_text(json.dumps(BODY, indent=2))
    two.write_text(json.dumps(second))
    listed.write_text(json.dumps([BODY, second]))
    log.write_bytes(b"\xef\xbb\xbf" + (json.dumps(BODY) + "\r\n\r\n" + json.dumps(second) + "\r\n").encode())
    expected = explain_miss(BODY, second)
    for report in (explain_miss(one, str(two)), explain_miss(listed), explain_miss(log)):
        assert [finding.cause for finding in report.findings] == ["first request", "appended"]
        assert report.total == expected.total
    assert [finding.source for finding in explain_miss(log).findings] == ["log.jsonl:1", "log.jsonl:3"]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ('{"messages": [', r"log.jsonl:2 is not JSON"),
        ("[1]", r"log.jsonl:2 is list; expected a JSON object"),
        ('{"event": "started"}', r"log.jsonl:2 is not a request: .*found the keys event"),
        ('{"messages": [{"content": "x"}]}', r"log.jsonl:2: messages\[0\]"),
        ("[" * 100_000, r"log.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_told_by_its_number_or_left_out_and_counted(tmp_path: Path, bad: str, match: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([json.dumps(BODY), bad, json.dumps(BODY)]))
    with pytest.raises(InvalidRequestError, match=match) as raised:
        explain_miss(log)
    assert "--skip-bad-lines" in str(raised.value)
    report = explain_miss(log, skip_bad_lines=True)
    assert len(report.findings) == 2
    assert len(report.skipped) == 1
    assert "log.jsonl:2" in report.skipped[0]


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe4"}')
    for path, match in (
        (tmp_path / "none.jsonl", "cannot read"),
        (tmp_path / "empty.jsonl", "is empty"),
        (tmp_path / "latin.jsonl", "is not UTF-8"),
        (tmp_path, "cannot read"),
    ):
        with pytest.raises(InvalidRequestError, match=match):
            explain_miss(path)
    with pytest.raises(InvalidArgumentError, match="at least one log"):
        explain_miss()
    with pytest.raises(InvalidArgumentError, match="block_size"):
        explain_miss(BODY, block_size=0)
    with pytest.raises(InvalidArgumentError, match="a path or a mapping"):
        explain_miss(3)  # type: ignore[arg-type]


def test_a_stored_response_is_put_in_where_the_log_has_it() -> None:
    """`previous_response_id` refers to what the server keeps. If the log has the answer, all of it is compared."""
    answer = {"id": "resp_1", "output": [said("assistant", ANSWERED)]}
    first = {"request": codex(said("user", ASKED)), "response": answer}
    second = {"request": codex(said("user", ASKED_NEXT), previous_response_id="resp_1")}
    report = explain_miss(first, second)
    assert report.findings[1].cause == "appended"
    assert report.findings[1].hit == len((RULES + ASKED).encode())
    unknown = explain_miss(first, {"request": codex(said("user", ASKED_NEXT), previous_response_id="resp_9")})
    assert unknown.findings[1].cause == "stored conversation"
    assert any("previous_response_id" in note for note in unknown.notes)


def test_equal_texts_of_a_long_log_are_kept_once() -> None:
    reader = LogReader()
    for _ in range(3):
        reader.add(json.loads(json.dumps(BODY)), "x")
    assert len({id(request.pieces[0]) for request in reader.requests}) == 1
