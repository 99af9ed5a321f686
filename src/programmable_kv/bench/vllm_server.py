"""Runs a vLLM server over HTTP, in its own environment, and reads its prefix cache's counters."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from programmable_kv.bench.serve_peers import Peer, free_port, stop
from programmable_kv.bench.vllm_asking import BLOCK_SIZE
from programmable_kv.errors import ExperimentError
from programmable_kv.models.source import find_source

SERVED = "served"
"""The model's name in requests."""
LOG = "vllm.log"
_START_S = 300.0
_STOP_S = 60.0
_COUNTERS = {
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
    "loaded": "vllm:external_prefix_cache_hits_total",
}


def served_folder(model: str) -> Path:
    """The folder of a model in a form that vLLM can serve.

    Raises:
        ExperimentError: the model is not such a folder.
    """
    source = find_source(model)
    if source.folder is None or source.gguf_file is not None:
        raise ExperimentError(f"'{model}' is not a folder that vLLM can serve: `pkv vllm export` writes one")
    return source.folder


@contextmanager
def serving(
    python: str,
    folder: Path,
    scratch: Path,
    *,
    skills: Path | None = None,
    more: Sequence[str] = (),
    cache_gib: int = 3,
    start_s: float = _START_S,
) -> Iterator[Peer]:
    """Run a vLLM that serves a folder; yields it when it is ready for requests.

    Args:
        python: the interpreter of the environment with vLLM.
        scratch: the folder for its log.
        skills: a store from which this package's plugin loads; None serves without the plugin.
        more: further options of vLLM. They override the options that are always given.
        cache_gib: memory for cached keys and values, in GiB.
        start_s: maximum time to start, in seconds.

    Raises:
        ExperimentError: vLLM does not start.
    """
    port = free_port()
    line = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", SERVED,
        "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_SIZE), "--max-model-len", "8192",
        "--port", str(port), "--host", "127.0.0.1", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    if skills is not None:
        connector = {
            "kv_connector": "SkillConnector",
            "kv_connector_module_path": "programmable_kv.vllm_plugin.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"store": str(skills)},
        }
        line += ["--kv-transfer-config", json.dumps(connector)]
    line += more
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(cache_gib), "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    log = scratch / LOG
    with log.open("wb") as output:
        running = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + start_s
        while not _healthy(port):
            if running.poll() is not None or time.monotonic() > end:
                said = log.read_text(encoding="utf-8", errors="replace")
                errors = [line for line in said.splitlines() if "Error" in line]  # the first causes the others
                why = "\n".join([*errors[:2], said[-800:]])
                ended = "" if running.poll() is None else f" (it ended with {running.returncode})"
                raise ExperimentError(f"vLLM did not start{ended}: {why} (docs/vllm.md says how to install it)")
            time.sleep(0.5)
        yield Peer(port, running.pid)
    finally:
        stop(running, _STOP_S)


def counters(engine: Peer) -> dict[str, float]:
    """The engine's counts of prompt tokens: looked up in its prefix cache, found there, and loaded by a connector."""
    found = dict.fromkeys(_COUNTERS, 0.0)
    for line in engine.get("/metrics").splitlines():
        for name, counter in _COUNTERS.items():
            if line.startswith(counter + "{"):
                found[name] += float(line.rpartition(" ")[2])
    return found


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
