"""A real vLLM with the plugin, in its own process and its own environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from programmable_kv.bench.vllm_server import LOG, SERVED, serving

VARIABLE = "PKV_VLLM_PYTHON"
"""the variable that names the interpreter of an environment with vLLM"""
LIKELIEST = 20
_START_S = 900.0
PATIENCE_S = 900.0
"""a timeout: on a machine with other work a forward may take minutes"""


@dataclass(frozen=True, slots=True)
class Completion:
    """vLLM's answer to a prompt of token ids."""

    tokens: list[int]
    likeliest: list[dict[int, float]]
    """log-probabilities at each step"""
    cached: int
    loaded: int
    why: str


@dataclass(frozen=True, slots=True)
class Engine:
    """A running vLLM."""

    url: str
    log: Path

    def complete(self, body: dict[str, Any]) -> Completion:
        """The greedy answer to a request of `Composition.requests`."""
        options = {"temperature": 0, "logprobs": LIKELIEST, "return_tokens_as_token_ids": True, "ignore_eos": True}
        got = httpx2.post(f"{self.url}/v1/completions", json={"model": SERVED, **options, **body}, timeout=PATIENCE_S)
        assert got.status_code == 200, got.text[:500]
        answer = got.json()
        [choice] = answer["choices"]
        told = (answer.get("kv_transfer_params") or {}).get("skills", {})
        return Completion(
            [_token(each) for each in choice["logprobs"]["tokens"]],
            [{_token(name): share for name, share in each.items()} for each in choice["logprobs"]["top_logprobs"]],
            (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            told.get("tokens_loaded", 0),
            told.get("why", ""),
        )


@contextmanager
def engine(python: str, folder: Path, store: Path, scratch: Path) -> Iterator[Engine]:
    """A vLLM that serves a folder with the plugin on a store, ready for requests."""
    options = ["--max-model-len", "4096", "--max-logprobs", str(LIKELIEST), "--max-num-seqs", "4", "--enable-scale-out"]
    with serving(python, folder, scratch, skills=store, more=options, cache_gib=1, start_s=_START_S) as found:
        yield Engine(f"http://127.0.0.1:{found.port}", scratch / LOG)


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
