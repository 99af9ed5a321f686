"""Where the state is kept in tests: in a file, or in a PostgreSQL database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve import places as kept
from serve.database import ABSENT, Database, programs
from serve.processes import free_port

DATABASE = pytest.param("database", marks=pytest.mark.xdist_group("postgres"))
"""one process of the tests starts a server"""


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    """A PostgreSQL server."""
    if programs() is None:
        pytest.skip(ABSENT)
    found = Database(free_port())
    yield found
    found.remove()


@pytest.fixture(scope="module", params=["file", DATABASE])
def places(request: pytest.FixtureRequest) -> Iterator[kept.Places]:
    """Where states are kept: each test that asks for this runs with both kinds."""
    found = kept.Places(request.getfixturevalue("database") if request.param == "database" else None)
    kept.now = found
    yield found
    kept.now = kept.Places()
