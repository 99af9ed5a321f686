"""The per-user cache folder."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "PKV_HOME"


def home() -> Path:
    """The per-user cache folder; `PKV_HOME` overrides it. It need not exist yet."""
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("programmable-kv")
