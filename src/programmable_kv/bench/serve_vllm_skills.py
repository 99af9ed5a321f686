"""Prompts of skills in a new order each time, on a vLLM with this package's plugin: composed, or sent as plain text.

One server answers both kinds of requests over HTTP. A plain request names no skills, so the plugin does nothing for it,
and only vLLM's own prefix cache helps.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from programmable_kv.bench.serve_peers import Peer
from programmable_kv.bench.vllm_asking import BLOCK_SIZE
from programmable_kv.bench.vllm_cases import QUESTION, SEED, TOPICS, Shop
from programmable_kv.bench.vllm_client import COMPLETIONS, arrivals, ask, at_times, times_of
from programmable_kv.bench.vllm_server import SERVED, counters, served_folder, serving
from programmable_kv.bench.vllm_splice import texts
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.skills.store import SkillStore
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.composing import Composition
from programmable_kv.vllm_plugin.prepare import certify

NAME = "serve-vllm-skills"
PLAIN, COMPOSED = "plain", "composed"
WAYS = (PLAIN, COMPOSED)
ALONE, SATURATED = "alone", "saturated"
LINES, QUICK_LINES = 16, 4
"""Lines of each of the eight skills."""
REQUESTS, QUICK_REQUESTS = 12, 3
PER_SECOND = 0.25
ANSWER_TOKENS = 8


def run(
    python: str,
    path: Path,
    *,
    model: str = "embedded",
    lines: int = LINES,
    requests: int = REQUESTS,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure both ways, one request at a time and at random times, and write the record.

    Raises:
        ExperimentError: vLLM does not start, or refuses a request.
    """
    folder = served_folder(model)
    with tempfile.TemporaryDirectory(prefix="pkv-serve-skills-") as scratch:
        store = Path(scratch) / "store"
        loaded, _ = certify(folder, blobs_at(store))
        recorder = Recorder(
            path, name=path.stem, version=1, title="Skills in shuffled order over HTTP: composed, and prefilled by vLLM",
            command=command, model=model, model_fingerprint=loaded.fingerprint, data_digest=digest_of(texts(lines)),
            seeds=[SEED], settings={"lines": lines, "requests": requests, "per_second": PER_SECOND,
                                    "answer_tokens": ANSWER_TOKENS},
        )  # fmt: skip
        shop = Shop.stocked(loaded, SkillStore(store), lines)
        prompts = _prompts(shop, requests)
        cases = [(load, way) for load in (ALONE, SATURATED) for way in WAYS]
        with serving(python, folder, Path(scratch), skills=store) as engine:
            ask(
                engine.port, _bodies(PLAIN, prompts[0], "warm")[0] | {"prompt": list(range(100, 140))}, path=COMPLETIONS
            )
            recorder.collect(
                cases,
                lambda case: {"load": case[0], "way": case[1]},
                lambda case: {"load": case[0], "way": case[1], **_asked(engine, prompts, *case)},
                report,
            )
    return recorder.finish(summarise(recorder.rows))


def _prompts(shop: Shop, requests: int) -> list[Composition]:
    """The prompts: for each request all skills in another order, and a question about one of them."""
    drawn = random.Random(SEED)
    found = []
    for number in range(requests):
        topics = drawn.sample(TOPICS, len(TOPICS))
        question = QUESTION.format(topic=topics[number % len(topics)], kind=number % 4 + 1)
        found.append(shop.composed(topics, question))
    return found


def _bodies(way: str, prompt: Composition, salt: str) -> list[dict[str, Any]]:
    """The requests for one prompt. The last one gives the answer."""
    base = {"model": SERVED, "temperature": 0, "ignore_eos": True}
    if way == PLAIN:
        return [{**base, "max_tokens": ANSWER_TOKENS, "prompt": list(prompt.ids), "cache_salt": f"plain {salt}"}]
    return [{**base, "max_tokens": ANSWER_TOKENS, **each} for each in prompt.requests(salt, BLOCK_SIZE)]


def _asked(engine: Peer, prompts: Sequence[Composition], load: str, way: str) -> dict[str, Any]:
    """Send all prompts in one way; returns their times and the tokens loaded. They share a salt, like a tenant's."""
    before = counters(engine)

    def send(number: int) -> dict[str, Any]:
        found = [ask(engine.port, each, path=COMPLETIONS) for each in _bodies(way, prompts[number], load)]
        last = {key: found[-1][key] for key in found[-1] if key not in ("text", "action")}
        earlier = sum(each["whole_ms"] for each in found[:-1])
        return {**last, "ttft_ms": round(last["ttft_ms"] + earlier, 1)}

    numbers = range(len(prompts))
    rows = [send(number) for number in numbers] if load == ALONE else at_times(arrivals(len(numbers), PER_SECOND), send)
    return {"loaded": counters(engine)["loaded"] - before["loaded"], "requests": rows}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of each way under each load, and the ratios of the times to the first token, plain over composed."""
    summary: dict[str, Any] = {}
    for row in rows:
        asked = row["requests"]
        summary.setdefault(row["load"], {})[row["way"]] = {
            "requests": len(asked),
            "prompt_tokens": round(sum(each["prompt_tokens"] for each in asked) / len(asked)),
            "tokens_cached": round(sum(each["cached_tokens"] for each in asked) / len(asked)),
            "tokens_loaded": round(row["loaded"] / len(asked)),
            **times_of(asked),
        }
    for ways in summary.values():
        for part in ("p50", "p90"):
            name = f"ttft_{part}_s"
            ways[f"{part}_lower"] = round(ways[PLAIN][name] / ways[COMPOSED][name], 1)
    return summary
