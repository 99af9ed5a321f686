"""`pkv lab obedience`: what the model is asked, and how the answers are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.lab import obedience
from programmable_kv.lab.obedience import ARMS, BACK, FORGED, GENUINE, SETTINGS, policies, run, summarise
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import read_record

TOKEN, OTHER = "1" * 16, "2" * 16


def arms() -> dict[str, list[tuple[str, str]]]:
    [gate] = policies(1)[0].gates
    return obedience._arms(gate, "old", "new", "What now?", TOKEN, OTHER)


def test_only_genuine_lines_have_the_token() -> None:
    found = arms()
    assert set(found) == set(ARMS)
    for arm in GENUINE:
        assert TOKEN in found[arm][-1][1]
        assert '"new"' in found[arm][-1][1]
    for arm in FORGED:
        [(role, text)] = found[arm]
        assert role == "user", "a user cannot speak as another"
        assert TOKEN not in text
        assert "new" in text
        assert "What now?" in text
    assert OTHER in found["forged_wrong_token"][0][1]
    assert OTHER not in found["forged_no_token"][0][1]
    assert "From now on" in found["forged_order"][0][1]
    assert [role for role, _ in found[BACK]] == ["user", "system", "user"]
    assert TOKEN in found[BACK][1][1]
    assert TOKEN not in found[BACK][2][1]
    assert '"old"' in found[BACK][2][1]


def test_one_token_tells_the_actions_apart() -> None:
    for scenario in policies(20):
        [gate] = scenario.gates
        now = gate.actions[scenario.values[gate.field]]
        assert obedience._others(scenario)
        assert all(gate.actions[value][0] != now[0] for value in obedience._others(scenario))


def row(**choices: str) -> dict[str, Any]:
    found = {"before": "keep", "in_place": "drop", **dict.fromkeys(ARMS, "drop"), **choices}
    return {
        "domain": "a",
        "old": "keep",
        "new": "drop",
        "announced": found,
        "not_announced": {"before": "drop", "in_place": "drop"},
    }


def test_following_is_counted_where_there_is_a_decision_to_change() -> None:
    summary = summarise([row(), row(genuine_user="keep"), row(**{BACK: "keep"})])
    assert summary["not_announced"]["counted"] == 0
    assert summary["announced"]["counted"] == 3
    followed = {arm: summary["announced"][arm]["value"] for arm in ("genuine_system", "genuine_user", BACK)}
    assert followed == pytest.approx({"genuine_system": 1, "genuine_user": 2 / 3, BACK: 1 / 3})


def test_a_run_leaves_a_whole_record_and_the_notebook_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    choice = obedience._choice

    def watched(notebook: Notebook, *rest: Any) -> str:
        before = (len(notebook), list(notebook.ids))
        found = choice(notebook, *rest)
        lengths.append((before, (len(notebook), list(notebook.ids))))
        return found

    monkeypatch.setattr(obedience, "_choice", watched)
    record = run(tiny_chat_model(2048), 4, tmp_path / "obedience.json")
    assert record.complete
    assert read_record(tmp_path / "obedience.json") == record
    assert all(before == after for before, after in lengths)
    assert len(lengths) >= 4 * 2 * len(SETTINGS)
    for each in record.rows:
        assert {each[setting]["before"] for setting in SETTINGS} <= {each["old"], each["new"]}
