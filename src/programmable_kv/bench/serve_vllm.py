"""A real vLLM behind the gateway: hit rate, time to first token and throughput, under arrivals that do not wait for answers.

Conversations share a policy, and tell the model a clock. The clock stands at the top of the system prompt, as many clients
write it; the same behind a gateway; or at the end of the newest message, from a client that was mended by hand. All arms ask
one engine, with a cache salt for each, at the same times.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from programmable_kv.bench.serve_peers import Peer, free_port, gateway, stop
from programmable_kv.bench.vllm_cases import TOPICS, policy
from programmable_kv.errors import ExperimentError
from programmable_kv.models.load import load_model
from programmable_kv.models.source import find_source
from programmable_kv.records import Record, Recorder, digest_of

IN_PREFIX, APPENDED = "in the prefix", "appended by the client"
MODES = ("erratum", "hoist")
ARMS = (IN_PREFIX, *(f"gateway: {mode}" for mode in MODES), APPENDED)
TURNS = 4
ANSWER_TOKENS = 8
SEED = 5
_START_S = 300.0
_STOP_S = 60.0
_COUNTERS = {"queries": "vllm:prefix_cache_queries_total", "hits": "vllm:prefix_cache_hits_total"}


def texts(lines: int) -> list[str]:
    """The policy that all conversations share."""
    return ["".join(policy(topic, lines) for topic in TOPICS)]


def body(arm: str, text: str, session: int, turn: int, clock: int) -> bytes:
    """One request: a turn of a conversation, with what was said before."""
    appended = arm == APPENDED
    times = [clock - (turn - earlier) * 10 for earlier in range(turn + 1)]
    system = text if appended else f"Now: {_clock(clock)}\n{text}"
    messages = [{"role": "system", "content": system}]
    for number in range(turn + 1):
        topic = TOPICS[(session + number) % len(TOPICS)]
        asked = f"Customer {session} asks about {topic} of kind {number + 1}. Which desk?"
        messages.append({"role": "user", "content": f"{asked}\n\nNow: {_clock(times[number])}" if appended else asked})
        if number < turn:
            messages.append({"role": "assistant", "content": f"The desk for {topic}, kind {number + 1}."})
    return json.dumps(
        {
            "model": "served", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": ANSWER_TOKENS,
            "temperature": 0, "cache_salt": arm, "messages": messages,
        }
    ).encode()  # fmt: skip


def _clock(minutes: int) -> str:
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def arrivals(requests: int, per_second: float) -> list[float]:
    """Seconds from the start, of a Poisson process."""
    drawn = random.Random(SEED)
    at, found = 0.0, []
    for _ in range(requests):
        at += drawn.expovariate(per_second)
        found.append(at)
    return found


def run(
    python: str,
    path: Path,
    *,
    model: str = "embedded",
    lines: int = 7,
    sessions: int = 8,
    per_second: float = 0.25,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure every arm and write the record.

    Args:
        python: the interpreter of the environment with vLLM.
        model: "embedded", or a folder that vLLM serves.
        lines: of each of the eight parts of the policy; seven make about 1,500 tokens.
        sessions: conversations, of four turns each.
        per_second: requests that arrive in a second, on average.

    Raises:
        ExperimentError: vLLM did not start, or refused a request.
    """
    source = find_source(model)
    if source.folder is None or source.gguf_file is not None:
        raise ExperimentError(f"'{model}' is not a folder that vLLM serves: `pkv vllm export` writes one")
    loaded = load_model(model)
    (text,) = texts(lines)
    recorder = Recorder(
        path, name=path.stem, version=1, title="A real vLLM, with and without the gateway in front", command=command,
        model=model, model_fingerprint=loaded.fingerprint, data_digest=digest_of([text]), seeds=[SEED],
        settings={"lines": lines, "sessions": sessions, "turns": TURNS, "per_second": per_second,
                  "answer_tokens": ANSWER_TOKENS},
    )  # fmt: skip
    del loaded
    times = arrivals(sessions * TURNS, per_second)
    counted: dict[str, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="pkv-serve-vllm-") as scratch,
        _vllm(python, source.folder, Path(scratch)) as engine,
    ):
        _ask(engine.port, body("warm", "You answer briefly.", 0, 0, 0), "warm")
        for number, arm in enumerate(ARMS):
            before = _counters(engine)
            mode = arm.removeprefix("gateway: ") if arm not in (IN_PREFIX, APPENDED) else ""
            with gateway(mode, engine.port, Path(scratch)) if mode else nullcontext(engine) as peer:
                began = time.perf_counter()
                rows = _loaded(peer.port, arm, text, times, sessions)
                seconds = time.perf_counter() - began
            after = _counters(engine)
            counted[arm] = {each: after[each] - before[each] for each in _COUNTERS} | {"seconds": seconds}
            for row in rows:
                recorder.add({"arm": arm, **row})
            if report is not None:
                report(number + 1, len(ARMS))
    return recorder.finish(summarise(recorder.rows, counted))


def _loaded(port: int, arm: str, text: str, times: Sequence[float], sessions: int) -> list[dict[str, Any]]:
    """Requests sent at their times, whether or not earlier ones were answered; in the order of arrival."""
    found: list[dict[str, Any]] = [{} for _ in times]
    faults: list[BaseException] = []
    began = time.perf_counter()

    def send(number: int, at: float) -> None:
        session, turn = number % sessions, number // sessions
        time.sleep(max(0.0, began + at - time.perf_counter()))
        try:
            asked = body(arm, text, session, turn, 600 + number)
            found[number] = {"session": session, "turn": turn, **_ask(port, asked, f"{arm} {session}")}
        except BaseException as fault:  # told to the caller, whose thread this is not
            faults.append(fault)

    threads = [threading.Thread(target=send, args=each) for each in enumerate(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise ExperimentError(f"a request of '{arm}' failed: {faults[0]}") from faults[0]
    return found


def _ask(port: int, asked: bytes, session: str) -> dict[str, Any]:
    """Send a request and read its stream.

    Raises:
        ExperimentError: the answer is an error.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    headers = {"content-type": "application/json", "x-session-id": session.replace(" ", "-").replace(":", "")}
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", asked, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ExperimentError(f"status {answer.status}: {answer.read()[:300]!r}")
        first = 0.0
        usage: dict[str, Any] = {}
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter()
            usage = event.get("usage") or usage
        ended = time.perf_counter()
        return {
            "ttft_ms": round(1000 * ((first or ended) - began), 1),
            "whole_ms": round(1000 * (ended - began), 1),
            "prompt_tokens": usage.get("prompt_tokens"),
            "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            "action": answer.headers.get("x-pkv-action", ""),
        }
    finally:
        connection.close()


@contextmanager
def _vllm(python: str, folder: Path, scratch: Path) -> Iterator[Peer]:
    """A vLLM that serves the folder, ready for requests.

    Raises:
        ExperimentError: it did not start.
    """
    port = free_port()
    line = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "served",
        "--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "8192", "--port", str(port),
        "--host", "127.0.0.1", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    log = scratch / "vllm.log"
    with log.open("wb") as output:
        running = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        peer = Peer(port, running.pid)
        end = time.monotonic() + _START_S
        while not _healthy(port):
            if running.poll() is not None or time.monotonic() > end:
                said = log.read_text(encoding="utf-8", errors="replace")[-800:]
                raise ExperimentError(f"vLLM did not start: {said} (docs/vllm.md says how to install it)")
            time.sleep(0.5)
        yield peer
    finally:
        stop(running, _STOP_S)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _counters(engine: Peer) -> dict[str, float]:
    """The engine's own counts of prompt tokens that were looked for and found in its prefix cache."""
    found = dict.fromkeys(_COUNTERS, 0.0)
    for line in engine._get("/metrics").splitlines():
        for name, counter in _COUNTERS.items():
            if line.startswith(counter + "{"):
                found[name] += float(line.rpartition(" ")[2])
    return found


def summarise(rows: Sequence[dict[str, Any]], counted: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Each arm by a short name: hit rate by the engine's counters, times to first token, requests answered in a second."""
    summary: dict[str, Any] = {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        times = sorted(row["ttft_ms"] for row in mine)
        summary[_short(arm)] = {
            "requests": len(mine),
            "hit_rate": round(counted[arm]["hits"] / counted[arm]["queries"], 4),
            "ttft_p50_s": round(statistics.median(times) / 1000, 3),
            "ttft_p90_s": round(times[int(0.9 * (len(times) - 1))] / 1000, 3),
            "per_second": round(len(mine) / counted[arm]["seconds"], 3),
        }
    worst = summary[_short(IN_PREFIX)]
    for arm in ARMS[1:]:
        own = summary[_short(arm)]
        own["p90_lower"] = round(worst["ttft_p90_s"] / own["ttft_p90_s"], 1)
        own["p50_lower"] = round(worst["ttft_p50_s"] / own["ttft_p50_s"], 1)
    return summary


def _short(arm: str) -> str:
    return arm.removeprefix("gateway: ").split(" ")[0]
