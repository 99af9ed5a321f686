"""Skills composed inside a real vLLM: compares answers with the library's splice, provokes refusals, measures times.

vLLM has its own environment, whose Python is given. Everything is compared within one run: the same prompts go to a
plain vLLM with its prefix cache and to one with the plugin. Faults are put into copies of the store, never into the
plugin.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from programmable_kv.bench.vllm_asking import BLOCK_SIZE, Asking, request
from programmable_kv.bench.vllm_cases import GREEDY, HEAD, QUESTION, SEED, TOPICS, Answer, Case, Shop, policy
from programmable_kv.bench.vllm_faults import damaged, of_another_model, wrongly_turned
from programmable_kv.models.source import find_source
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.skills.store import SkillStore
from programmable_kv.storage.files import blobs_at
from programmable_kv.vllm_plugin.composing import Composition
from programmable_kv.vllm_plugin.prepare import certify, export

SEAM = 4
"""Seam of the timed prompts, in tokens."""
LONG_SEAM = 40
"""A seam longer than a block, so that the rest of a block does not hide it."""
PLAIN = "plain"
STEPS = 6
"""Number of steps for a progress bar."""


def texts(lines: int) -> list[str]:
    """All texts that make up the prompts."""
    return [HEAD, QUESTION, *(policy(topic, lines) for topic in TOPICS)]


def run(
    python: str,
    path: Path,
    *,
    model: str = "embedded",
    lines: int = 12,
    requests: int = 6,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Compare answers, provoke faults, time requests, and write the record.

    Args:
        python: the interpreter of the environment with vLLM.
        model: the model to serve; it is exported to a temporary folder first if vLLM cannot serve it as it is.
        lines: lines of each of the eight policies.
        requests: number of timed requests with the policies in random order; 0 times none.

    Raises:
        ExperimentError: vLLM does not start or does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="pkv-vllm-") as scratch:
        return _run(Path(scratch), python, path, model, lines, requests, report or (lambda done, of: None), command)


def _run(
    scratch: Path,
    python: str,
    path: Path,
    name: str,
    lines: int,
    requests: int,
    report: Callable[[int, int], None],
    command: str,
) -> Record:
    source = find_source(name)
    plain_folder = source.folder if source.folder is not None and source.gguf_file is None else None
    folder = plain_folder or export(name, scratch / "model", dtype="float32")
    store = scratch / "store"
    model, _ = certify(folder, blobs_at(store))
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="Skills composed inside vLLM, against the library's own splice and a plain vLLM",
        command=command,
        model=name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(texts(lines)),
        seeds=[SEED],
        settings={"lines": lines, "requests": requests, "block_size": BLOCK_SIZE, "seam": SEAM, "greedy": GREEDY},
    )
    shop = Shop.stocked(model, SkillStore(store), lines)
    cases = _cases(shop)
    timed = _timed(shop, requests)
    ask = Asking(python, scratch, folder)
    report(1, STEPS)

    plain = ask(None, [*(request(it.name, it.composition.ids, it.name) for it in cases), *timed[PLAIN]])
    report(2, STEPS)
    composed = ask(
        store, [*_composed(cases), *_witnesses(cases[0]), _together(cases[:2]), *timed["composed"], *timed["in stages"]]
    )
    report(3, STEPS)
    turned = ask(wrongly_turned(shop, store, scratch / "turned"), _composed(cases[:1]))
    report(4, STEPS)
    flipped = ask(damaged(shop, store, scratch / "damaged"), _composed(cases[:1]))
    report(5, STEPS)
    strange = ask(of_another_model(folder, store, scratch / "strange"), [])
    report(6, STEPS)

    for case in cases:
        recorder.add({"case": case.name, **_compared(case.answer, composed.last(case.name))})
        recorder.add({"computed": case.name, **_compared(case.answer, plain.last(case.name))})
    for number, (case, skills) in enumerate(_asked_together(cases[:2])):
        given = composed.last(f"together {number}")
        from_plain = _distance(given, plain.last(case.name))
        recorder.add(
            {"together": case.name, "skills": skills, **_compared(case.answer, given), "from_plain": from_plain}
        )
    first = cases[0]
    for witness, answers, key in (
        ("rotation off by one", turned, first.name),
        ("a damaged skill", flipped, first.name),
        ("no salt", composed, "no salt"),
        ("another salt, no skills", composed, "another salt"),
        ("the same salt, no skills", composed, "the same salt"),
    ):
        given = answers.last(key)
        recorder.add(
            {
                "witness": witness,
                **_compared(first.answer, given),
                "from_plain": _distance(given, plain.last(first.name)),
            }
        )
    error = strange.error.replace(str(scratch), "SCRATCH").replace(str(folder), "MODEL")
    recorder.add({"witness": "another model", "error": error[:400]})
    for way, answers in ((PLAIN, plain), ("composed", composed), ("in stages", composed)):
        for number in range(requests):
            recorder.add({"way": way, **answers.total(f"{way} {number}")})
    summary = summarise(recorder.rows) | {
        "policies": len(TOPICS),
        "skill_tokens": sum(len(skill) for skill in shop.skills.values()),
        "runner": composed.runner,
        "versions": composed.versions,
    }
    return recorder.finish(summary)


# -- requests ---------------------------------------------------------------------------------------------------------


def _cases(shop: Shop) -> list[Case]:
    def question(topic: str) -> str:
        return QUESTION.format(topic=topic, kind=3)

    return [
        shop.case("side by side", TOPICS[:3], question(TOPICS[1])),
        shop.case("in another order", (TOPICS[2], TOPICS[0], TOPICS[1]), question(TOPICS[1])),
        shop.case_in_stages("text between", TOPICS[3:5], question(TOPICS[4]), BLOCK_SIZE, 0),
        shop.case_in_stages("text between and a seam", TOPICS[3:5], question(TOPICS[4]), BLOCK_SIZE, LONG_SEAM),
    ]


def _in_stages(name: str, composition: Composition, salt: str, tokens: int) -> list[dict[str, Any]]:
    """The requests for one composition. All but the last ask for one token."""
    sent = composition.requests(salt, BLOCK_SIZE)
    return [
        request(
            name, body["prompt"], body["cache_salt"], body.get("kv_transfer_params"), body.get("max_tokens", tokens)
        )
        for body in sent
    ]


def _composed(cases: Sequence[Case]) -> list[dict[str, Any]]:
    return [
        each for case in cases for each in _in_stages(case.name, case.composition, case.name.replace(" ", "-"), GREEDY)
    ]


def _witnesses(case: Case) -> list[dict[str, Any]]:
    """Requests after the case itself: its prompt without a salt, and without skills under another and the same salt."""
    (sent,) = case.composition.requests(case.name.replace(" ", "-"), BLOCK_SIZE)
    return [
        request("no salt", sent["prompt"], "", sent["kv_transfer_params"]),
        request("another salt", sent["prompt"], "plain"),
        request("the same salt", sent["prompt"], sent["cache_salt"]),
    ]


def _asked_together(cases: Sequence[Case]) -> list[tuple[Case, bool]]:
    """The cases to send at once: each with its skills and without, twice."""
    return [(case, skills) for case in cases for skills in (True, False)] * 2


def _together(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The requests to send at once. Each request with skills has its own salt; plain requests share one."""
    found = []
    for number, (case, skills) in enumerate(_asked_together(cases)):
        (sent,) = case.composition.requests(f"together-{number}", BLOCK_SIZE)
        salt, parameters = (sent["cache_salt"], sent["kv_transfer_params"]) if skills else ("together", None)
        found.append(request(f"together {number}", sent["prompt"], salt, parameters))
    return found


def _timed(shop: Shop, requests: int) -> dict[str, list[dict[str, Any]]]:
    """The timed requests in three ways: all policies in another order each time, one token each. Those with skills have
    their own salts."""
    drawn = random.Random(SEED)
    found: dict[str, list[dict[str, Any]]] = {PLAIN: [], "composed": [], "in stages": []}
    for number in range(requests):
        topics = drawn.sample(TOPICS, len(TOPICS))
        question = QUESTION.format(topic=topics[number % len(topics)], kind=number + 1)
        one = shop.composed(topics, question)
        found[PLAIN].append(request(f"{PLAIN} {number}", one.ids, tokens=1))
        found["composed"] += _in_stages(f"composed {number}", one, f"one-{number}", 1)
        repaired = shop.composed(topics, question, seam=SEAM)
        found["in stages"] += _in_stages(f"in stages {number}", repaired, f"stages-{number}", 1)
    return found


# -- results ----------------------------------------------------------------------------------------------------------


def _compared(expected: Answer, given: dict[str, Any]) -> dict[str, Any]:
    """An answer compared with the library's: whether the tokens agree, and the largest difference in log-probability.

    The difference covers the steps up to and including the first at which the tokens differ.
    """
    same = list(expected.tokens) == given["tokens"]
    worst = 0.0
    for step, likely in enumerate(given["logprobs"]):
        worst = max(worst, *(abs(float(expected.logprobs[step, int(t)]) - value) for t, value in likely.items()))
        if given["tokens"][step] != expected.tokens[step]:
            break  # from here on the two continue different texts
    told = (given["told"] or {}).get("skills", {})
    return {
        "prompt_tokens": given["prompt_tokens"],
        "loaded": told.get("tokens_loaded", 0),
        "why": told.get("why", "")[:300],
        "cached": given["cached"],
        "same_tokens": same,
        "largest_difference": worst,
    }


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference in log-probability between two answers, over tokens that both list at the first step."""
    here, there = one["logprobs"][0], other["logprobs"][0]
    return float(max(abs(here[token] - there[token]) for token in here.keys() & there.keys()))


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Agreement over the cases, the figures of each witness by name, and the medians of the timed ways."""
    cases = [row for row in rows if "case" in row]
    computed = [row for row in rows if "computed" in row]
    summary: dict[str, Any] = {
        "cases": len(cases),
        "same_tokens": sum(row["same_tokens"] for row in cases),
        "largest_difference": max(row["largest_difference"] for row in cases),
        "tokens_loaded": sum(row["loaded"] for row in cases),
        "computed_largest_difference": max(row["largest_difference"] for row in computed),
    }
    for row in rows:
        if "witness" in row and "error" not in row:
            key = row["witness"].replace(",", "").replace(" ", "_")
            summary[key] = {each: row[each] for each in ("loaded", "cached", "largest_difference", "from_plain")}
    at_once = [row for row in rows if "together" in row]
    if at_once:
        skilled, plain = ([row for row in at_once if row["skills"] is which] for which in (True, False))
        summary["together"] = {
            "requests": len(at_once),
            "same_tokens": sum(row["same_tokens"] for row in skilled),
            "largest_difference": max(row["largest_difference"] for row in skilled),
            "plain_from_plain": max(row["from_plain"] for row in plain),
        }
    ways = {way: [row for row in rows if row.get("way") == way] for way in (PLAIN, "composed", "in stages")}
    if all(ways.values()):
        medians = {way: statistics.median(row["ttft_ms"] for row in found) for way, found in ways.items()}
        summary["ttft"] = {
            "prompt_tokens": statistics.median(row["prompt_tokens"] for row in ways[PLAIN]),
            "plain_ms": medians[PLAIN],
            "composed_ms": medians["composed"],
            "composed_first_ms": ways["composed"][0]["ttft_ms"],
            "in_stages_ms": medians["in stages"],
            "in_stages_requests": statistics.median(row["requests"] for row in ways["in stages"]),
            "plain_over_composed": round(medians[PLAIN] / medians["composed"], 2),
            "plain_over_composed_first": round(medians[PLAIN] / ways["composed"][0]["ttft_ms"], 2),
            "plain_over_in_stages": round(medians[PLAIN] / medians["in stages"], 2),
        }
    return summary
