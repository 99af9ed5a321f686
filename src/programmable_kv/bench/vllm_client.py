"""Streams and times requests to a served model: one at a time, or at given times that do not wait for answers."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from programmable_kv.errors import ExperimentError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SEED = 5
_PATIENCE_S = 3600.0


def arrivals(requests: int, per_second: float) -> list[float]:
    """Arrival times in seconds from the start, from a Poisson process."""
    drawn = random.Random(SEED)
    at, found = 0.0, []
    for _ in range(requests):
        at += drawn.expovariate(per_second)
        found.append(at)
    return found


def ask(port: int, body: Mapping[str, Any], *, session: str = "", path: str = CHAT) -> dict[str, Any]:
    """Send a request and read its stream; returns the times of tokens, the server's token counts, and the text.

    Args:
        body: the request without the options for streaming, which are added.
        session: the conversation's name, for a gateway.

    Raises:
        ExperimentError: the answer's status is not 200.
    """
    asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    headers = {"content-type": "application/json", **({"x-session-id": session} if session else {})}
    began = time.perf_counter()
    try:
        connection.request("POST", path, asked, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ExperimentError(f"status {answer.status}: {answer.read()[:300]!r}")
        first = last = 0.0
        text = ""
        usage: dict[str, Any] = {}
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                said = choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
                text += said
                last = time.perf_counter()
                first = first or (last if said else 0.0)
        first = first or last
        tokens = int(usage.get("completion_tokens", 0))
        return {
            "ttft_ms": round(1000 * (first - began), 1),
            "tpot_ms": round(1000 * (last - first) / (tokens - 1), 1) if tokens > 1 else None,
            "whole_ms": round(1000 * (time.perf_counter() - began), 1),
            "prompt_tokens": usage.get("prompt_tokens"),
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            "action": answer.headers.get("x-pkv-action", "").partition(";")[0],
            "text": text,
        }
    finally:
        connection.close()


def at_times(times: Sequence[float], send: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of `send`, called with each index of `times` at that second; calls do not wait for earlier ones.

    Raises:
        ExperimentError: a request failed.
    """
    found: list[dict[str, Any]] = [{} for _ in times]
    faults: list[BaseException] = []
    began = time.perf_counter()

    def at(number: int, when: float) -> None:
        time.sleep(max(0.0, began + when - time.perf_counter()))
        try:
            found[number] = send(number)
        except BaseException as fault:  # raised again in the caller's thread
            faults.append(fault)

    threads = [threading.Thread(target=at, args=each) for each in enumerate(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise ExperimentError(f"a request failed: {faults[0]}") from faults[0]
    return found


def times_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percentiles (nearest rank) of the time to the first token in seconds; the median time between tokens in ms."""
    ttft = sorted(row["ttft_ms"] for row in rows)
    tpot = sorted(row["tpot_ms"] for row in rows if row["tpot_ms"] is not None)
    found = {f"ttft_p{part}_s": round(_rank(ttft, part / 100) / 1000, 3) for part in (50, 90, 99)}
    return found | ({"tpot_p50_ms": _rank(tpot, 0.5)} if tpot else {})


def _rank(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    return values[max(0, -int(-part * len(values) // 1) - 1)]
