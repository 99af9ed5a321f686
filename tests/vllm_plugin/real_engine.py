"""A real vLLM with the plugin, in a process of its own and in its own environment."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from programmable_kv.bench.serve_peers import free_port, stop

VARIABLE = "PKV_VLLM_PYTHON"
"""names the interpreter of an environment with vLLM"""
BLOCK_SIZE = 32
LIKELIEST = 20
_START_S = 900.0
PATIENCE_S = 900.0
"""on a machine with other work a forward may take minutes"""


@dataclass(frozen=True, slots=True)
class Completion:
    """What vLLM answered to a prompt of token ids."""

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
        got = httpx2.post(f"{self.url}/v1/completions", json={"model": "served", **options, **body}, timeout=PATIENCE_S)
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
    port = free_port()
    connector = (
        '{"kv_connector": "SkillConnector", "kv_connector_module_path": "programmable_kv.vllm_plugin.connector", '
        '"kv_role": "kv_both", "kv_load_failure_policy": "recompute", '
        f'"kv_connector_extra_config": {{"store": "{store}"}}}}'
    )
    line = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "served",
        "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_SIZE), "--max-model-len", "4096", "--host",
        "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details", "--max-logprobs", str(LIKELIEST),
        "--max-num-seqs", "4", "--enable-scale-out", "--kv-transfer-config", connector,
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    log = scratch / "vllm.log"
    with log.open("wb") as output:
        running = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + _START_S
        while not _healthy(url):
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            assert running.poll() is None, f"vLLM did not start: {said}"
            assert time.monotonic() < end, f"vLLM did not start in time: {said}"
            time.sleep(0.5)
        yield Engine(url, log)
    finally:
        stop(running, 30)


def _healthy(url: str) -> bool:
    try:
        return bool(httpx2.get(f"{url}/health", timeout=5).status_code == 200)
    except httpx2.HTTPError:
        return False


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
