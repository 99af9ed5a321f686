"""The store under several processes, some of which are killed. Each scenario is a function in `races.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all scenarios, run in one process: loading the libraries takes longer than any scenario."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("races.py")), str(tmp_path_factory.mktemp("races"))],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {row["scenario"]: {**row, "stderr": done.stderr} for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("scenario", ["killed_writers", "evicting", "two_writers", "stopped_writer", "full_disk"])
def test_the_store_keeps_its_promises(results: dict[str, Any], scenario: str) -> None:
    result = results[scenario]
    assert not result["error"], f"{result['error']}\n{result['stderr']}"
    assert result["told"], "it says what happened, so something did"
