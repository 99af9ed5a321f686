"""The clients of the soak: conversations whose clock advances at every request, and editors of notebooks.

They send failed requests again, and count wrong answers.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from programmable_kv.bench.serve_peers import Peer

TURNS = 60
"""Requests of one conversation before the client begins another."""
PATIENCE_S = 20.0
_CHAT = "/v1/chat/completions"
_OPENING = "You answer with the time.\n"


class Served(Protocol):
    """The gateways that run at the moment."""

    @property
    def peers(self) -> Sequence[Peer]: ...


@dataclass(slots=True)
class Seen:
    """What one client saw since the last call of `taken`."""

    milliseconds: list[float] = field(default_factory=list)
    blocks: int = 0
    cached: int = 0
    wrong: int = 0
    """Answers with a value other than the latest."""
    repeated: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    edits: int = 0
    """Acknowledged edits."""
    lost: int = 0
    """Acknowledged edits that were missing afterwards."""


class Client(threading.Thread):
    """One client. Its requests go to the gateways in turn."""

    def __init__(self, served: Served, number: int, pause_s: float, stopped: threading.Event) -> None:
        super().__init__(daemon=True)
        self._served, self._number, self._pause_s, self._stopped = served, number, pause_s, stopped
        self._random = random.Random(number)
        self._lock = threading.Lock()
        self._seen = Seen()
        self._tries = 0

    def taken(self) -> Seen:
        """What the client saw since the last call."""
        with self._lock:
            seen, self._seen = self._seen, Seen()
        return seen

    def _pause(self) -> None:
        self._stopped.wait(self._random.expovariate(1 / self._pause_s))

    def _once(
        self, method: str, path: str, body: Any, headers: Mapping[str, str]
    ) -> tuple[int, http.client.HTTPMessage, Any]:
        """Send one request to the next gateway; returns the status, headers and data of the answer.

        Raises:
            OSError: no answer came, or the status is 500 or more.
        """
        self._tries += 1
        peer = self._served.peers[(self._number + self._tries) % len(self._served.peers)]
        connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=PATIENCE_S)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"content-type": "application/json", **headers})
            response = connection.getresponse()
            data = response.read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
        finally:
            connection.close()
        if response.status >= 500:
            raise OSError(f"status {response.status}: {data[:200]!r}")
        return response.status, response.headers, json.loads(data)

    def _answer(self, body: Any, headers: Mapping[str, str]) -> str | None:
        """The upstream's answer in a conversation; None if the request failed."""
        began = time.perf_counter()
        try:
            status, told, reply = self._once("POST", _CHAT, body, headers)
            if status != 200:
                raise OSError(f"status {status}")
        except OSError:
            self._failed()
            return None
        usage, action = reply["usage"], told.get("x-pkv-action", "")
        with self._lock:
            seen = self._seen
            seen.milliseconds.append(1e3 * (time.perf_counter() - began))
            seen.blocks += usage["prompt_tokens"]
            seen.cached += usage["prompt_tokens_details"]["cached_tokens"]
            seen.actions[action] = seen.actions.get(action, 0) + 1
        return str(reply["choices"][0]["message"]["content"])

    def _failed(self) -> None:
        with self._lock:
            self._seen.repeated += 1
        self._stopped.wait(0.1)

    def _count(self, *, wrong: int = 0, edits: int = 0, lost: int = 0) -> None:
        with self._lock:
            self._seen.wrong += wrong
            self._seen.edits += edits
            self._seen.lost += lost


class Talker(Client):
    """A client with one conversation after another, whose clock advances at every request."""

    def __init__(self, served: Served, text: str, number: int, pause_s: float, stopped: threading.Event) -> None:
        super().__init__(served, number, pause_s, stopped)
        self._text = text

    def run(self) -> None:
        """Talk until it is stopped."""
        conversation = 0
        while not self._stopped.is_set():
            conversation += 1
            name = f"client-{self._number}-{conversation}"
            said = [{"role": "user", "content": f"{name}: what time is it?"}]
            for turn in range(TURNS):
                if self._stopped.is_set():
                    return
                answer = self._ask(name, said, f"{10 + turn // 60}:{turn % 60:02}:{self._random.randrange(60):02}")
                said += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"and now ({turn})?"}]
                self._pause()

    def _ask(self, name: str, said: list[dict[str, str]], now: str) -> str:
        system = {"role": "system", "content": f"Now: {now}\n{_OPENING}{self._text}"}
        body = {"model": "remembering", "messages": [system, *said]}
        while not self._stopped.is_set():
            answer = self._answer(body, {"x-session-id": name})
            if answer is not None:
                self._count(wrong=answer != now)
                return answer
        return ""


class Editor(Client):
    """A client that edits a notebook's field, checks that the edit is there, and asks the notebook for the value.

    It names the version that it edits, so that only one of several tries can succeed. After a try without an answer,
    the notebook may have the old or the new value.
    """

    def __init__(self, served: Served, text: str, number: int, pause_s: float, stopped: threading.Event) -> None:
        super().__init__(served, number, pause_s, stopped)
        self._system = {"role": "system", "content": f"Now: {{now}}\n{_OPENING}{text}"}
        self._version, self._value = 1, "00:00:00"
        """The latest acknowledged version and value."""
        self._tried: set[str] = set()
        """Values sent since for the next version, without an acknowledgement."""

    def run(self) -> None:
        """Edit until it is stopped."""
        made = {"upstream_model": "remembering", "messages": [self._system], "fields": {"now": self._value}}
        found = None
        while found is None and not self._stopped.is_set():
            found = self._asked("POST", "/v1/notebooks", made)
        where = "" if found is None else f"/v1/notebooks/{found[1]['id']}"
        edit = 0
        while not self._stopped.is_set():
            edit += 1
            self._edit(where, f"{edit // 3600 % 24:02}:{edit // 60 % 60:02}:{edit % 60:02}")
            self._look(where)
            body = {
                "model": f"notebook:{where.rpartition('/')[2]}",
                "messages": [{"role": "user", "content": f"{edit}?"}],
            }
            answer = None if self._tried else self._answer(body, {})
            if answer is not None:
                self._count(wrong=answer != self._value)
            self._pause()

    def _edit(self, where: str, value: str) -> None:
        self._tried.add(value)
        found = self._asked("PATCH", f"{where}/fields", {"now": value}, {"if-match": f'"{self._version}"'})
        if found is not None and found[0] == 200:  # otherwise an earlier try has succeeded meanwhile
            self._acknowledged(found[1])
            self._count(edits=1)

    def _look(self, where: str) -> None:
        """Count an edit as lost unless the notebook has the latest acknowledged value, or one tried since."""
        found = self._asked("GET", where, None)
        if found is None:
            return
        status, told = found
        if status != 200:
            self._count(lost=1)
            return
        version, value = told["version"], told["fields"]["now"]
        if (version, value) == (self._version, self._value):
            return
        self._count(lost=not (version == self._version + 1 and value in self._tried))
        self._acknowledged(told)

    def _acknowledged(self, told: Any) -> None:
        self._version, self._value = told["version"], told["fields"]["now"]
        self._tried.clear()

    def _asked(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any] | None:
        """Status and data of the answer; None if the request failed."""
        try:
            status, _, data = self._once(method, path, body, headers or {})
        except OSError:
            self._failed()
            return None
        return status, data
