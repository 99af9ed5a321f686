"""A database that accepts a connection and then does not answer, like a pooler without a free connection."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.address import DatabaseAddress

pytest.importorskip("psycopg")

from programmable_kv.serve import postgres
from programmable_kv.serve.postgres import PostgresState

_LET_IN = b"R" + struct.pack("!II", 8, 0) + b"Z" + struct.pack("!I", 5) + b"I"
_NO_TLS, _TLS_OR_GSS = b"N", (80877103, 80877104)


@pytest.fixture
def silent() -> Iterator[str]:
    """Run a database that accepts connections and does not answer. Yields its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            held.append(client)
            while len(asked := client.recv(4096)) >= 8 and struct.unpack("!I", asked[4:8])[0] in _TLS_OR_GSS:
                client.sendall(_NO_TLS)
            client.sendall(_LET_IN)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"postgresql://pkv@127.0.0.1:{listening.getsockname()[1]}/pkv"
    listening.close()
    for each in held:
        each.close()


def test_nobody_waits_for_a_database_that_says_nothing(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_FIRST_S", 1.0)
    began = time.monotonic()
    with pytest.raises(InvalidArgumentError, match="cannot keep the state"):
        PostgresState(DatabaseAddress(silent))
    assert time.monotonic() - began < 20
