"""Which frequency tables a forward uses, and into which forwards rows are split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.cache.frequencies import FrequencyRule, first_reaching, require_first, require_same, tables_at
from programmable_kv.cache.rows import Rows
from programmable_kv.errors import FrequencyRegimeError, InvalidArgumentError

TWO = FrequencyRule("longrope frequencies", 64)
EVERY = FrequencyRule("dynamic frequencies", 64, every_length=True)


@pytest.mark.parametrize(
    ("rule", "first", "second", "same"),
    [
        (TWO, 1, 64, True), (TWO, 64, 65, False), (TWO, 65, 900, True),
        (EVERY, 1, 64, True), (EVERY, 64, 65, False), (EVERY, 65, 66, False), (EVERY, 70, 70, True),
    ],
)  # fmt: skip
def test_tables_by_length(rule: FrequencyRule, first: int, second: int, same: bool) -> None:
    assert (tables_at([rule], first) == tables_at([rule], second)) is same
    if same:
        assert require_same([rule], second, tables_at([rule], first), "a model") == tables_at([rule], second)
    else:
        with pytest.raises(FrequencyRegimeError, match="beyond 64 positions"):
            require_same([rule], second, tables_at([rule], first), "a model")
    assert require_same([rule], second, None, "a model") == tables_at([rule], second)


def test_only_keys_of_the_first_tables_can_be_rotated() -> None:
    require_first([TWO, EVERY], (0, 0), "a model")
    require_first([TWO], None, "a model")
    with pytest.raises(FrequencyRegimeError, match="relocation"):
        require_first([TWO, EVERY], (0, 70), "a model")


@given(
    rules=st.lists(st.builds(FrequencyRule, st.just("some"), st.integers(0, 60), st.booleans()), max_size=3),
    start=st.integers(0, 40),
    count=st.integers(1, 60),
    chunk=st.integers(1, 20),
    logits=st.integers(0, 60),
)
def test_forwards_cover_all_rows_with_the_tables_of_the_last(
    rules: list[FrequencyRule], start: int, count: int, chunk: int, logits: int
) -> None:
    rows = Rows.appended(range(count), start, start)
    spans = list(rows.forwards(rules, logits, chunk))
    assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])]
    assert spans[-1][1] == count
    assert all(a < b for a, b in spans)
    assert spans[-1][1] - spans[-1][0] >= min(logits, count), "the last forward has every row whose logits are wanted"
    final = tables_at(rules, start + count)
    for _, stop in spans:
        assert tables_at(rules, rows.positions[stop - 1] + 1) == final
    if not rules and logits <= 1:
        assert all(stop - begin <= chunk for begin, stop in spans)
        assert len(spans) == -(-count // chunk), "no more forwards than needed"


def test_the_fewest_positions_that_reach_a_table() -> None:
    assert first_reaching([TWO], range(100)) == 65
    assert first_reaching([TWO], range(64)) == 1
    assert first_reaching([EVERY], range(100)) == 100
    assert first_reaching([], range(100)) == 1


def test_rows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one entry"):
        Rows((1, 2), (0,), (0,))
    with pytest.raises(InvalidArgumentError, match="ascend"):
        Rows((1, 2), (1, 0), (0, 1))
    for ids in ((1, 512), (-1,), ("a",), (1.5,), (None,)):
        with pytest.raises(InvalidArgumentError, match="token ids"):
            Rows.appended(ids, 0, 0).token_ids(512)  # type: ignore[arg-type]
