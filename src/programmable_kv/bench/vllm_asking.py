"""Starts engines of a real vLLM, one after the other, and reads their answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from programmable_kv.bench.vllm_cases import GREEDY
from programmable_kv.errors import ExperimentError

BLOCK_SIZE = 32
LIKELIEST = 20
"""Number of tokens at each step whose log-probabilities are returned."""


def request(
    name: str, ids: Sequence[int], salt: str = "", parameters: Any = None, tokens: int = GREEDY
) -> dict[str, Any]:
    """A request with a prompt of token ids, in the form that `vllm_engine.py` reads."""
    return {
        "name": name, "prompt": list(ids), "salt": salt, "parameters": parameters, "tokens": tokens, "logprobs": LIKELIEST,
    }  # fmt: skip


class Answers:
    """The answers of one engine."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.error: str = given.get("error", "")
        self.runner: str = given.get("runner", "")
        self.versions: dict[str, str] = given.get("versions", {})
        self._given: list[dict[str, Any]] = given["answers"]

    def last(self, name: str) -> dict[str, Any]:
        """The answer to the last request with this name."""
        return next(each for each in reversed(self._given) if each["name"] == name)

    def total(self, name: str) -> dict[str, Any]:
        """All requests with one name: their number, their summed time to the first token, and the last one's tokens."""
        mine = [each for each in self._given if each["name"] == name]
        return {
            "requests": len(mine),
            "ttft_ms": round(1000 * sum(each["seconds"] for each in mine), 1),
            "prompt_tokens": mine[-1]["prompt_tokens"],
            "cached": mine[-1]["cached"],
        }


class Asking:
    """Starts an engine for each list of requests, one after the other, so that only one is in memory at a time."""

    def __init__(self, python: str, scratch: Path, folder: Path) -> None:
        self._python, self._scratch, self._folder = python, scratch, folder

    def __call__(self, store: Path | None, requests: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> Answers:
        """The answers of a vLLM with the plugin on a store, or of a plain one without. Nested lists are sent at once.

        Raises:
            ExperimentError: vLLM does not run, or does not answer.
        """
        engine: dict[str, Any] = {
            "model": str(self._folder), "dtype": "float32", "enforce_eager": True, "block_size": BLOCK_SIZE,
            "max_model_len": 8192, "max_num_batched_tokens": 8192, "max_num_seqs": 4, "max_logprobs": LIKELIEST,
        }  # fmt: skip
        if store is not None:
            engine["connector"] = {
                "kv_connector": "SkillConnector",
                "kv_connector_module_path": "programmable_kv.vllm_plugin.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"store": str(store)},
            }
        # An engine's first forward also initialises what later ones reuse, so an untimed request comes first.
        warm = request("warm", range(100, 140), "warm", tokens=2)
        job, answers = self._scratch / "job.json", self._scratch / "answers.json"
        job.write_text(json.dumps({"engine": engine, "requests": [warm, *requests]}), encoding="utf-8")
        answers.unlink(missing_ok=True)
        line = [self._python, "-m", "programmable_kv.bench.vllm_engine", str(job), str(answers)]
        done = subprocess.run(line, env=_environment(), capture_output=True, text=True, check=False)
        if not answers.exists():
            raise ExperimentError(
                f"{self._python} could not run vLLM: {(done.stderr or done.stdout)[-600:]}. It must be the Python of an "
                "environment with vLLM 0.32 (docs/vllm.md)."
            )
        found = Answers(json.loads(answers.read_text(encoding="utf-8")))
        if found.error and requests:
            raise ExperimentError(f"vLLM did not answer: {found.error[:600]}")
        return found


def _environment() -> dict[str, str]:
    """Environment variables for a vLLM in one process and without network, which imports this package from here."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
