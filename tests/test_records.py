"""Records are validated when read, resumed after an interruption, and have correct intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from programmable_kv.errors import RecordError
from programmable_kv.records import (
    Recorder,
    all_records,
    bootstrap_mean,
    cluster_bootstrap,
    clustered_wilson,
    digest_of,
    read_record,
    wilson,
)


def recorder(path: Path, **changes: Any) -> Recorder:
    settings: dict[str, Any] = {
        "name": "a-test", "version": 1, "title": "A test", "command": "none", "model": "m", "model_fingerprint": "f",
        "data_digest": "d", "seeds": [1], "settings": {"n": 2},
    }  # fmt: skip
    return Recorder(path, **{**settings, **changes})


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "a-test.json"
    first = recorder(path)
    first.add({"item": 0, "right": True})
    del first  # the run is killed here
    second = recorder(path)
    assert second.done(item=0)
    assert not second.done(item=1)
    second.add({"item": 1, "right": False})
    record = second.finish({"accuracy": wilson(1, 2)})
    assert [row["item"] for row in record.rows] == [0, 1]
    assert record.complete
    assert all_records(tmp_path) == [read_record(path)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-test.json"]


@pytest.mark.parametrize("change", [{"seeds": [2]}, {"data_digest": "e"}, {"model_fingerprint": "g"}, {"settings": {}}])
def test_another_runs_rows_are_not_mixed_in(tmp_path: Path, change: dict[str, Any]) -> None:
    recorder(tmp_path / "a-test.json").add({"item": 0})
    with pytest.raises(RecordError, match=next(iter(change))):
        recorder(tmp_path / "a-test.json", **change)


def test_a_name_that_no_record_may_have_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="lower-case"):
        recorder(tmp_path / "my_run.json", name="my_run")


def test_a_record_is_validated_on_read(tmp_path: Path) -> None:
    path = tmp_path / "a-test.json"
    recorder(path).finish({"x": 1.0})
    body = json.loads(path.read_text())
    for damage in ({"surprise": 1}, {"schema_version": 2}, {"name": "Not A Name"}):
        path.write_text(json.dumps({**body, **damage}))
        with pytest.raises(RecordError):
            read_record(path)
    path.write_text("{")
    with pytest.raises(RecordError):
        read_record(path)
    with pytest.raises(RecordError, match="no record"):
        read_record(tmp_path / "nothing.json")


def test_figures_by_path(tmp_path: Path) -> None:
    record = recorder(tmp_path / "a-test.json").finish({"share": wilson(3, 4), "deep": {"ratio": 2.5}, "word": "x"})
    assert record.figure("share") == record.figure("share.value") == 0.75
    assert record.figure("share.low") < 0.75
    assert record.figure("deep.ratio") == 2.5
    for path in ("nothing", "deep.nothing", "word", "deep"):
        with pytest.raises(RecordError):
            record.figure(path)


def test_wilson_is_the_textbooks() -> None:
    # Newcombe (1998), table I, example (a): 81 of 263 gives 0.2553 to 0.3662 by the score method.
    interval = wilson(81, 263)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)
    assert wilson(0, 0).n == 0


def test_bootstraps_cover_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    hits = [(i := bootstrap_mean(rng.normal(1.0, 1.0, 40).tolist(), seed=k)).low <= 1.0 <= i.high for k in range(60)]
    assert 0.8 <= sum(hits) / 60 <= 1.0


def test_clusters_widen_the_interval() -> None:
    """Items of one cluster that move together must not count as independent."""
    clusters = [[float(k % 2)] * 10 for k in range(20)]
    wide = cluster_bootstrap(clusters)
    narrow = bootstrap_mean([value for cluster in clusters for value in cluster])
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_shares_in_clusters_have_wider_intervals() -> None:
    """Ten copies of an item count once, and items that are independent count as before."""
    alike = [[bool(k % 2)] * 10 for k in range(20)]
    assert clustered_wilson(alike).low == pytest.approx(wilson(10, 20).low, abs=0.01)
    mixed = [[True, False] * 5] * 20
    assert clustered_wilson(mixed).model_copy(update={"method": "wilson"}) == wilson(100, 200)
    assert clustered_wilson([[True] * 10] * 5) == wilson(50, 50), "nothing shows how alike the items are"
    assert clustered_wilson([[True, False]]) == wilson(1, 2)
    assert clustered_wilson([]).n == 0


def test_shares_in_clusters_are_covered_about_as_often_as_is_said() -> None:
    rng = np.random.default_rng(6)
    covered = plain = 0
    for _ in range(300):
        clusters = [(rng.random(12) < share).tolist() for share in rng.beta(3, 3, size=16)]
        covered += (i := clustered_wilson(clusters)).low <= 0.5 <= i.high
        plain += (i := wilson(sum(map(sum, clusters)), 192)).low <= 0.5 <= i.high
    assert plain < 0.85 * 300 < 0.92 * 300 < covered


def test_a_digest_tells_lists_apart() -> None:
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert digest_of(["ab"]) == digest_of(["ab"])
