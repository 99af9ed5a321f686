"""The store under several processes, some of which are killed. Each scenario is a function in `races.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.mark.parametrize("scenario", ["killed_writers", "evicting", "two_writers", "stopped_writer", "full_disk"])
def test_the_store_keeps_its_promises(tmp_path: Path, scenario: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("races.py")), scenario, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), "it says what happened, so something did"
