"""Properties of any log: differences are symmetric, reports reproducible, and no request loses more than it sent."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from explain.corpus import chat
from programmable_kv import explain_miss
from programmable_kv.explain.difference import common_length, first_difference
from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.volatile import volatile_at

TEXT = st.text(st.sampled_from("ab 1:2-\n<>é😀"), max_size=12)
BODY = st.builds(
    lambda system, turns, model: chat(system, *turns) | {"model": model},
    TEXT, st.lists(TEXT, min_size=1, max_size=5), st.sampled_from(["m", "n"]),
)  # fmt: skip
LOG = st.lists(BODY, min_size=1, max_size=7)


def requests(log: list[dict[str, Any]]) -> LogReader:
    reader = LogReader()
    for body in log:
        reader.add(body, "x")
    return reader


@given(TEXT, TEXT)
def test_the_common_beginning_is_the_longest(one: str, other: str) -> None:
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]


@given(BODY, BODY)
def test_the_first_difference_is_the_same_from_both_sides(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = requests([one, other]).requests
    here, there = first_difference(first, second), first_difference(second, first)
    assert (here.index, here.offset, here.equal_bytes) == (there.index, there.offset, there.equal_bytes)
    assert (here.before, here.after) == (there.after, there.before)


@given(TEXT, TEXT)
def test_a_volatile_value_covers_the_first_difference(one: str, other: str) -> None:
    offset = common_length(one, other)
    found = volatile_at(one, other, offset)
    if found is not None and one != other:
        assert found.start <= offset <= min(found.stop_before, found.stop_after)
        assert one[found.start : found.stop_before] != other[found.start : found.stop_after]


@settings(max_examples=60)
@given(LOG)
def test_a_report_adds_up(log: list[dict[str, Any]]) -> None:
    report = explain_miss(*log)
    for finding in report.findings:
        assert finding.total is not None
        assert finding.hit is not None
        assert finding.lost is not None
        assert 0 <= finding.hit <= finding.total
        assert 0 <= finding.lost <= finding.total - finding.hit
        assert finding.compared_with is None or finding.compared_with < finding.number
        assert finding.missed == (finding.lost > 0)
    assert sum(cause.lost for cause in report.causes) == report.lost
    assert sorted(number for cause in report.causes for number in cause.requests) == [
        finding.number for finding in report.findings if finding.missed
    ]
    assert explain_miss(*log) == report, "a log read twice gives the same report"
    json.dumps(report.as_json())


@settings(max_examples=60)
@given(LOG)
def test_the_hit_is_the_longest_prefix_of_any_earlier_request(log: list[dict[str, Any]]) -> None:
    """The tree finds the same prefix as a comparison with every earlier request."""
    read = requests(log).requests
    for finding, request in zip(explain_miss(*log).findings, read, strict=True):
        earlier = [each for each in read[: request.number - 1] if each.model == request.model]
        assert finding.hit == max((first_difference(each, request).equal_bytes for each in earlier), default=0)


@settings(max_examples=40)
@given(LOG, TEXT)
def test_a_conversation_that_only_grows_loses_nothing(log: list[dict[str, Any]], said: str) -> None:
    turns = [message["content"] for body in log for message in body["messages"]]
    growing = [chat(said, *turns[: n + 1]) for n in range(len(turns))]
    assert explain_miss(*growing).lost == 0
