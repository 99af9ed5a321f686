"""Options are compared as whole strings, as full forwards confirm, and scoring leaves the notebook unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny, tokenizer
from programmable_kv import Notebook
from programmable_kv.errors import InvalidOptionsError
from programmable_kv.notebook.decision import likeliest, option_ids, score
from reference import full_forward


def build(kind: str = "byte-level") -> Notebook:
    notebook = Notebook(tiny(kind=kind)).text("status: {status}. what now?\nAction:", status="pending")
    notebook.prefill()
    return notebook


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True))
@settings(max_examples=40, deadline=None)
def test_the_likeliest_is_the_best_scored(options: list[tuple[int, ...]]) -> None:
    engine = tiny().engine
    buffer = engine.new_buffer()
    first = engine.append(buffer, tokenizer("byte-level").encode("what now?"))
    length = buffer.length
    scores = score(engine, buffer, first, options)
    assert scores[likeliest(engine, buffer, first, options)] == pytest.approx(max(scores), abs=1e-12)
    assert buffer.length == length


def test_an_option_that_cannot_win_is_not_computed() -> None:
    engine = tiny().engine
    buffer = engine.new_buffer()
    first = engine.append(buffer, tokenizer("byte-level").encode("what now?"))
    best, worst = int(first[-1].argmax()), int(first[-1].argmin())
    with engine.meter.measure() as reading:
        assert likeliest(engine, buffer, first, [[worst, 1, 2, 3], [best]]) == 1
        assert likeliest(engine, buffer, first, [[best], [worst]]) == 0
    assert reading.account.tokens_computed == 0
    with engine.meter.measure() as reading:
        likeliest(engine, buffer, first, [[best, 1, 2, 3, last] for last in range(9)])
    assert reading.account.tokens_computed == 4, "what they begin with is computed once"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize(
    "options", [("deny", "cancel"), ("cancel order", "cancel refund"), ("cancel", "cancel refund", "x")]
)
def test_scores_equal_full_forwards(kind: str, options: tuple[str, ...]) -> None:
    notebook = build(kind)
    decision = notebook.decide(options=options)
    end = notebook.model.tokenizer.eos_token_id
    for option, ids in zip(options, option_ids(notebook.model.tokenizer, "Action:", options, end), strict=True):
        _, logits = full_forward(notebook.model.engine.model, [*notebook.ids, *ids])
        rows = torch.log_softmax(logits.double(), dim=-1)
        start = len(notebook) - 1
        expected = sum(float(rows[start + i, token]) for i, token in enumerate(ids))
        assert decision.log_probabilities[option] == pytest.approx(expected, abs=1e-8)
    assert sum(decision.probabilities.values()) == pytest.approx(1.0)
    assert decision.choice == max(decision.log_probabilities, key=lambda o: decision.log_probabilities[o])


def test_a_guessed_thought_is_the_greedy_one() -> None:
    """A repeated thought is checked in one forward. If its first token differs, it is decoded as usual."""
    notebook = build()
    model = notebook.model.engine.model
    first = notebook.decide(options=["deny", "cancel"], think=True)
    assert first.scoring.tokens_computed > 3
    again = notebook.decide(options=["deny", "cancel"], think=True)
    assert again.thought == first.thought
    assert again.log_probabilities == pytest.approx(first.log_probabilities, abs=1e-9)
    said = notebook._thoughts[0]
    ids = torch.tensor([notebook.ids])
    arguments = {"max_new_tokens": len(said), "do_sample": False}
    assert model.generate(ids, **arguments)[0, ids.shape[1] :].tolist() == said
    wrong = [*said[:2], (said[2] + 1) % 400, *said[3:]]
    notebook._thoughts[:] = [wrong]
    assert notebook.decide(options=["deny", "cancel"], think=True).thought == first.thought
    assert notebook._thoughts[1] == said


def test_deciding_leaves_the_cache_as_it_was() -> None:
    notebook = build()
    keys = [notebook.cache.keys(i).clone() for i in range(2)]
    for _ in range(2):
        notebook.decide(" really?", ["deny", "cancel", "cancel order"])
        assert notebook.cache.length == len(notebook)
        for layer in range(2):
            torch.testing.assert_close(notebook.cache.keys(layer), keys[layer], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("end", "expected"), [("Action:", " deny"), ("assistant\n", "deny"), ("Is it ", "deny")])
def test_the_form_follows_the_prompts_end(end: str, expected: str) -> None:
    ids = option_ids(tokenizer("byte-level"), end, ["deny", "cancel"], None)
    assert tokenizer("byte-level").decode(ids[0]) == expected


def test_a_metaspace_tokenizer_gets_no_second_word_marker() -> None:
    ids = option_ids(tokenizer("metaspace"), "is\n", ["deny", "cancel"], None)
    assert tokenizer("metaspace").decode(ids[0]) == "deny"


def test_an_option_that_begins_another_can_lose() -> None:
    """Without an end token, the probability of the shorter option would contain that of the longer one."""
    end = tokenizer("byte-level").eos_token_id
    ids = option_ids(tokenizer("byte-level"), "Action:", ["cancel", "cancel order"], end)
    assert all(option[-1] == end for option in ids)
    ids = option_ids(tokenizer("byte-level"), "Action:", ["cancel", "deny"], end)
    assert not any(end in option for option in ids)


@pytest.mark.parametrize("options", [[], ["a"], ["a", "a"], ["a", " "], [1, 2]])
def test_bad_options(options: list[Any]) -> None:
    with pytest.raises(InvalidOptionsError):
        build().decide(options=options)


def test_a_decision_is_printed_with_its_price() -> None:
    decision = build().decide(options=["cancel", "deny"])
    said = str(decision)
    assert said.startswith(f"{decision.choice} ({decision.choice} {decision.probabilities[decision.choice]:.3f}, ")
    assert f"{decision.account.tokens_computed} tokens computed" in said
