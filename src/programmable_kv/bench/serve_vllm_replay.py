"""Replays traces of real agents on a real vLLM: with their arrival times, lengths and prefix breaks, but our own text.

A trace has hashes of blocks of tokens and no text. Each block becomes a few words that no other block has, so two
requests share the text of exactly the blocks that they share in the trace. The prompts begin with pieces that clients
are known to put there: a billing header, a date and a clock. Lengths and pauses are scaled down for a small machine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from programmable_kv.bench.serve_peers import Peer, gateway
from programmable_kv.bench.vllm_client import ask, at_times, times_of
from programmable_kv.bench.vllm_server import SERVED, counters, served_folder, serving
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.models.load import load_model
from programmable_kv.records import Record, Recorder, digest_of

NAME = "serve-vllm-replay"
AS_SENT, FIXED, GATEWAY = "as the client sends it", "a client without them", "gateway: erratum"
ARMS = {AS_SENT: "as_sent", FIXED: "fixed", GATEWAY: "erratum"}
RULES = {
    "volatile": [
        {"name": "billing header", "pattern": "^x-billing-header: (.*)$", "tell": False, "share": True},
        {"name": "the time", "pattern": "^The current time is (.*)\\.$"},
    ]
}
TOKENS_A_BLOCK = 4
"""Tokens that stand for a block of 64: lengths are scaled to a sixteenth."""
PACE = 10.0
"""Factor by which pauses are shortened."""
LONGEST_PAUSE_S = 6.0
MOST, QUICK = 10, 3
"""Maximum number of requests of one trace."""
ANSWER_TOKENS = 8
_WORDS = ("ash", "elm", "fir", "oak", "yew", "box", "bay", "fig")


Message = tuple[str, tuple[int, ...]]
"""A message: its role, and the numbers of its blocks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace."""

    at_s: float
    """Seconds from the start of the replay. The request is sent later if the previous answer has not come by then."""
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """One trace in the form that is replayed."""

    name: str
    requests: tuple[Asked, ...]


def shapes_in(folder: Path, most: int = MOST) -> list[Shape]:
    """The traces of a folder, scaled.

    Args:
        most: maximum number of requests of each trace.

    Raises:
        InvalidArgumentError: the folder has no traces.
    """
    found = [shape_of(json.loads(file.read_text(encoding="utf-8")), most) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise InvalidArgumentError(f"{folder} contains no traces (*.json files in kv-cache-tester's format)")
    return found


def shape_of(trace: Mapping[str, Any], most: int) -> Shape:
    """One trace, scaled: its first requests, with shorter pauses, and its blocks divided into messages.

    The system prompt includes the blocks of the tools. The blocks that a request adds become the answer to the previous
    request and a new user message. If a request drops or changes earlier blocks, the messages from there on are
    replaced.
    """
    size = trace["block_size"]
    head = (trace["tool_tokens"] + trace["system_tokens"]) // size
    at, before, answer = 0.0, None, 0
    messages: list[Message] = []
    found: list[Asked] = []
    for request in trace["requests"][:most]:
        blocks: list[int] = request["hash_ids"]
        at += 0.0 if before is None else min(LONGEST_PAUSE_S, max(0.0, request["t"] - before) / PACE)
        messages = _with_turn(_kept(messages, blocks) or [("system", tuple(blocks[:head]))], blocks, answer)
        found.append(Asked(round(at, 2), tuple(messages)))
        before, answer = request["t"], -(-request["out"] // size)
    return Shape(str(trace["id"]), tuple(found))


def _kept(messages: list[Message], blocks: list[int]) -> list[Message]:
    """The leading messages whose blocks the request still begins with."""
    at, kept = 0, []
    for role, own in messages:
        if tuple(blocks[at : at + len(own)]) != own:
            break
        kept.append((role, own))
        at += len(own)
    return kept


def _with_turn(messages: list[Message], blocks: list[int], answer: int) -> list[Message]:
    """Adds the remaining blocks: as an answer if the last message is a user's, and as a new user message."""
    rest = tuple(blocks[sum(len(own) for _, own in messages) :])
    if messages[-1][0] != "user":
        return [*messages, ("user", rest)]
    if len(rest) < 2:  # the same request again, or too few blocks for two messages
        return [*messages[:-1], ("user", messages[-1][1] + rest)]
    length = min(max(1, answer), len(rest) - 1)
    return [*messages, ("assistant", rest[:length]), ("user", rest[length:])]


def body(arm: str, shape: Shape, number: int, salt: str) -> dict[str, Any]:
    """The body of one request of a trace in an arm."""
    said = [
        {"role": role, "content": " ".join(map(_words, blocks))} for role, blocks in shape.requests[number].messages
    ]
    head = f"You are the coding agent {shape.name}.\n"
    if arm != FIXED:
        second = 7 * number
        clock = f"Thursday, November 26, 2026, 10:{second // 60:02}:{second % 60:02} AM"
        code = digest_of([shape.name, str(number)])[:5]
        head = f"x-billing-header: cc_version=2.1.7; cch={code};\nThe current time is {clock}.\n{head}"
    said[0]["content"] = head + said[0]["content"]
    return {
        "model": SERVED, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0, "cache_salt": salt,
        "messages": said,
    }  # fmt: skip


def _words(block: int) -> str:
    """The text of a block, unique to it: about `TOKENS_A_BLOCK` tokens."""
    return f"{_WORDS[block % len(_WORDS)]} {block}"


def run(
    python: str,
    path: Path,
    traces: Path,
    *,
    model: str = "embedded",
    most: int = MOST,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Replay all traces at once in every arm, and write the record.

    Args:
        traces: a folder of traces in kv-cache-tester's format.
        most: maximum number of requests of each trace.

    Raises:
        ExperimentError: vLLM does not start, or refuses a request.
        InvalidArgumentError: the folder has no traces.
    """
    folder, shapes = served_folder(model), shapes_in(traces, most)
    recorder = Recorder(
        path, name=path.stem, version=1, title="Traces of agents replayed on a real vLLM", command=command,
        model=model, model_fingerprint=load_model(model).fingerprint,
        data_digest=digest_of(json.dumps(asdict(shape)) for shape in shapes), seeds=[],
        settings={"traces": [shape.name for shape in shapes], "requests": [len(shape.requests) for shape in shapes],
                  "tokens_a_block": TOKENS_A_BLOCK, "pace": PACE, "longest_pause_s": LONGEST_PAUSE_S},
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="pkv-replay-") as scratch,
        serving(python, folder, Path(scratch)) as engine,
    ):
        recorder.collect(
            list(ARMS), lambda arm: {"arm": arm}, lambda arm: _replayed(engine, Path(scratch), shapes, arm), report
        )
    return recorder.finish(summarise(recorder.rows))


def _replayed(engine: Peer, scratch: Path, shapes: Sequence[Shape], arm: str) -> dict[str, Any]:
    """Replay all traces at once. Each sends its next request when it is due, but not before the previous answer."""
    gone = gateway("erratum", engine.port, scratch, rules=RULES) if arm == GATEWAY else nullcontext(engine)
    with gone as peer:
        before, began = counters(engine), time.perf_counter()

        def send(number: int) -> dict[str, Any]:
            shape, rows = shapes[number], []
            for at, asked in enumerate(shape.requests):
                time.sleep(max(0.0, began + asked.at_s - time.perf_counter()))
                found = ask(peer.port, body(arm, shape, at, arm), session=shape.name)
                own = {key: found[key] for key in found if key != "text"}
                rows.append({"trace": shape.name, "request": at, **own})
            return {"rows": rows}

        asked = at_times([0.0] * len(shapes), send)
        seconds = time.perf_counter() - began
    after = counters(engine)
    return {
        "arm": arm,
        "seconds": round(seconds, 2),
        "queries": after["queries"] - before["queries"],
        "hits": after["hits"] - before["hits"],
        "requests": [row for each in asked for row in each["rows"]],
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of each arm, and their ratios to those of the requests as the client sends them."""
    summary: dict[str, Any] = {}
    for row in rows:
        asked = row["requests"]
        summary[ARMS[row["arm"]]] = {
            "requests": len(asked),
            "prompt_tokens": round(sum(each["prompt_tokens"] for each in asked) / len(asked)),
            "hit_rate": round(row["hits"] / row["queries"], 4),
            **times_of(asked),
            "seconds": row["seconds"],
        }
    worst = summary[ARMS[AS_SENT]]
    for own in summary.values():
        if own is not worst:
            own["p50_lower"] = round(worst["ttft_p50_s"] / own["ttft_p50_s"], 1)
            own["p90_lower"] = round(worst["ttft_p90_s"] / own["ttft_p90_s"], 1)
    return summary
