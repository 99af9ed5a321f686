"""The benches of a real vLLM, as far as they can be tested without one: prompts, the library's answers, and figures.

With a vLLM, each of them is one command (docs/vllm.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny, tokenizer
from programmable_kv import SkillStore, load_model
from programmable_kv.bench import vllm_splice
from programmable_kv.bench.vllm_cases import Answer, Shop, answered
from programmable_kv.errors import ExperimentError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny(max_position_embeddings=4096).engine.model.save_pretrained(made)
    tokenizer("byte-level").save_pretrained(made)
    return made


def test_a_case_is_the_same_tokens_in_the_library_and_in_the_requests(folder: Path, tmp_path: Path) -> None:
    """The cases check their tokens. This test checks that the answer is the composed context's, not a prefill's."""
    model = load_model(folder, dtype="float64")
    shop = Shop.stocked(model, SkillStore(tmp_path), lines=2)
    question = "Which desk?"
    side_by_side = shop.case("side by side", ("refunds", "returns"), question)
    staged = shop.case_in_stages("in stages", ("refunds", "returns"), question, block_size=16, seam=0)
    for case in (side_by_side, staged):
        buffer = model.engine.new_buffer(len(case.composition.ids))
        logits = model.engine.append(buffer, list(case.composition.ids))
        full = torch.log_softmax(logits[-1].double(), dim=-1)
        assert float((full - case.answer.logprobs[0]).abs().max()) > 1e-3, case.name


def test_an_answer_leaves_the_context_unchanged(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    shop = Shop.stocked(model, SkillStore(tmp_path), lines=2)
    notebook, opened = shop.asked(("refunds",), "Which desk?")
    before = len(notebook)
    one, two = (answered(model.engine, notebook, opened) for _ in range(2))
    assert one.tokens == two.tokens
    assert len(notebook) == before


def given(expected: Answer, **changes: Any) -> dict[str, Any]:
    """An engine's answer that agrees with the library's, except for some changes."""
    likely = [{str(token): float(row[token]) for token in range(3)} for row in expected.logprobs]
    answer = {"tokens": list(expected.tokens), "logprobs": likely, "told": None, "cached": 0, "prompt_tokens": 9}
    return answer | changes


def test_a_difference_is_found_and_what_follows_another_token_is_not_compared() -> None:
    expected = Answer((1, 2), torch.log_softmax(torch.arange(6.0).reshape(2, 3), dim=-1).double())
    assert vllm_splice._compared(expected, given(expected))["largest_difference"] == 0.0
    off = given(expected)
    off["logprobs"][1]["2"] += 0.25
    assert vllm_splice._compared(expected, off)["largest_difference"] == pytest.approx(0.25)
    assert vllm_splice._compared(expected, off)["same_tokens"]
    other = vllm_splice._compared(expected, off | {"tokens": [0, 2]})
    assert not other["same_tokens"]
    assert other["largest_difference"] == 0.0, "the second step answers another text"


def test_an_environment_without_vllm_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="vLLM did not answer: ModuleNotFoundError: No module named 'vllm'"):
        vllm_splice.run(sys.executable, tmp_path / "vllm-splice.json", model=str(folder), lines=4, requests=0)
