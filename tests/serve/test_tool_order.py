"""Reordered tools: markers keep their places in the list, and every other byte of a tool stays unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.serve.rewriting.body import read
from programmable_kv.serve.rewriting.tools import MARKER, digests_of, in_order, plain


def turned(one: str, other: str) -> str:
    """The list of two tools after it is put into reverse order."""
    body = read(f'{{"tools": [ {one} , {other} ]}}'.encode())
    assert body is not None
    _, came = digests_of(body)
    return in_order(body, came, came[::-1])[1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ('{"n":1.00000000000000000001}', '{"m" : 1e400}', '[{"m" : 1e400},{"n":1.00000000000000000001}]'),
        (
            '{"n":1.00000000000000000001}', '{"m" : 1e400, "cache_control" : {"type":"e"}}',
            '[{"m" : 1e400},{"cache_control":{"type":"e"},"n":1.00000000000000000001}]',
        ),
        (
            '{"cache_control": null ,"s":"\\"cache_control\\": 1","n":-0.10}', "{ }",
            '[{"cache_control":null},{"s":"\\"cache_control\\": 1","n":-0.10}]',
        ),
        (
            '{"a":1,"cache_control":1,"b":2.50}', '{"cache_control":2}',
            '[{"cache_control":1},{"cache_control":2,"a":1,"b":2.50}]',
        ),
        ('{"a":1}', '{"cache\\u005fcontrol":3,"b":2}', '[{"b":2},{"cache_control":3,"a":1}]'),
        ("[1]", "null", "[null,[1]]"),
    ],
)  # fmt: skip
def test_what_is_sent(one: str, other: str, expected: str) -> None:
    assert turned(one, other) == expected


TOOLS = st.dictionaries(
    st.sampled_from([MARKER, "name", '"', "a\\", "é"]), st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["", MARKER, "\u2028", '"}']),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([MARKER, "x"]), inner, max_size=2),
        max_leaves=5,
    ),
)  # fmt: skip


@given(one=TOOLS, other=TOOLS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_it_is_the_same_data_with_the_markers_in_place(
    one: dict[str, Any], other: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    texts = [json.dumps(each, ensure_ascii=ascii_only, indent=indent) for each in (one, other)]
    wanted = [
        plain(each) | {MARKER: at[MARKER]} if MARKER in at else plain(each) for each, at in ((other, one), (one, other))
    ]
    if plain(one) == plain(other):  # equal tools are not reordered
        wanted = [one, other]
    assert json.loads(turned(*texts)) == wanted
