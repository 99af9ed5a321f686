"""`generate`: every parameter works as in transformers' own `generate`, and an answer ends where it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny
from programmable_kv import Notebook
from programmable_kv.errors import InvalidArgumentError, OutOfStepError
from programmable_kv.notebook.sampling import Sampler, Sampling
from programmable_kv.notebook.stopping import Deadline, StopStrings

PARAMETERS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 0.1},
    {"logit_bias": {17: 50.0, 9: -3.0}},
    {"temperature": 3.0},
    {"temperature": 3.0, "top_k": 3},
    {"temperature": 9.0, "top_p": 0.4},
    {"temperature": 9.0, "min_p": 0.5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}},
]


def build() -> Notebook:
    notebook = Notebook(tiny())
    notebook.message("system", "status: {status}\nreply only.", status="shipped")
    notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    return notebook


def raw_text() -> Notebook:
    notebook = Notebook(tiny()).text("the customer asks to cancel. status: {status}. so", status="shipped")
    notebook.prefill()
    return notebook


def theirs(notebook: Notebook, count: int, **parameters: Any) -> list[int]:
    """The tokens of transformers' own `generate` on the same text, drawn with a CPU generator like ours."""
    from transformers import GenerationConfig

    # transformers samples with torch's global generator; ours is a separate generator with the same algorithm.
    torch.manual_seed(parameters.pop("seed", 0))
    bias = parameters.pop("logit_bias", None)
    config = GenerationConfig(
        max_new_tokens=count,
        do_sample=parameters.get("temperature", 0) > 0,
        eos_token_id=notebook.model.engine.model.generation_config.eos_token_id,
        pad_token_id=0,
        sequence_bias=None if bias is None else [[[token], value] for token, value in bias.items()],
        **({"top_k": 0} | parameters),
    )
    ids = torch.tensor([list(notebook.ids)])
    said = notebook.model.engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=None
    )
    return said[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda it: "+".join(it) or "greedy")
def test_tokens_are_those_of_transformers_generate(parameters: dict[str, Any]) -> None:
    raw = raw_text()
    expected = theirs(raw, 12, seed=3, **parameters)
    said = "".join(raw.generate(max_new_tokens=12, seed=3, **parameters))
    # A character whose last bytes are missing is not shown.
    assert said == raw.model.tokenizer.decode(expected, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
    assert len(raw) == raw.cache.length


def test_the_parameters_matter() -> None:
    """Each set of parameters above gives another answer than greedy decoding, so the comparison can fail."""
    notebook = raw_text()
    greedy = "".join(notebook.generate(max_new_tokens=12))
    for parameters in PARAMETERS[1:]:
        assert "".join(notebook.generate(max_new_tokens=12, seed=3, **parameters)) != greedy, parameters


def test_a_text_is_biased_at_its_last_token() -> None:
    notebook = build()
    tokenizer = notebook.model.tokenizer
    first, second = tokenizer.encode("cancel it", add_special_tokens=False)[:2]
    text = tokenizer.decode([first, second])
    assert tuple(tokenizer.encode(text, add_special_tokens=False)) == (first, second)
    said = "".join(notebook.generate(max_new_tokens=4, logit_bias={first: 100.0, text: 200.0}))
    assert said == text * 2


class TestStops:
    def test_an_answer_ends_before_the_first_stop_string(self) -> None:
        notebook = build()
        whole = "".join(notebook.generate("go on", max_new_tokens=20))
        middle = len(whole) // 2
        stop = whole[middle : middle + 3]
        pieces = list(notebook.generate("go on", max_new_tokens=20, stop=[stop, "never said at all"]))
        assert "".join(pieces) == whole[: whole.index(stop)]
        account = notebook.last_account
        assert account is not None
        assert "(stop)" in account.why

    def test_a_kept_answer_has_no_stop_string_and_is_exact(self) -> None:
        notebook, fresh = build(), build()
        whole = "".join(notebook.generate("go on", max_new_tokens=20))
        stop = whole[len(whole) // 2 :][:3]
        answer = "".join(notebook.generate("go on", max_new_tokens=20, stop=[stop], keep=True))
        assert stop not in answer
        fresh.add("user", "go on")
        fresh.add("assistant", answer)
        assert notebook.rendered_text == fresh.rendered_text
        assert notebook.ids == fresh.ids
        assert set(notebook.states) == {"exact"}

    @given(
        st.lists(st.text("abc", max_size=4), max_size=12),
        st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def test_pieces_make_no_difference(self, pieces: list[str], strings: list[str]) -> None:
        stops = StopStrings(strings)
        shown = ""
        for count, piece in enumerate(pieces):
            shown += stops.passed(piece)
            so_far = "".join(pieces[: count + 1])
            if stops.found is None:
                assert so_far.startswith(shown)
                assert not any(string in so_far for string in strings)
                # Text that is held back may still become a stop string.
                held = so_far[len(shown) :]
                assert not held or any(string.startswith(held) for string in strings)
        shown += stops.rest()
        whole = "".join(pieces)
        ends = [(whole.index(string) + len(string), whole.index(string)) for string in strings if string in whole]
        assert shown == (whole[: min(ends)[1]] if ends else whole)

    def test_a_time_limit_ends_an_answer_after_a_token(self) -> None:
        notebook = build()
        whole = "".join(notebook.generate("go on", max_new_tokens=40))
        short = "".join(notebook.generate("go on", max_new_tokens=40, max_seconds=1e-9))
        assert whole.startswith(short)
        assert len(short) < len(whole)
        account = notebook.last_account
        assert account is not None
        assert "max_seconds" in account.why
        assert not Deadline(None).passed
        assert not Deadline(3600).passed

    def test_why_is_empty_where_the_model_ends_the_answer(self) -> None:
        notebook = build()
        end = notebook.model.tokenizer.eos_token_id
        assert "".join(notebook.generate("go on", max_new_tokens=5, logit_bias={end: 1e4})) == ""
        account = notebook.last_account
        assert account is not None
        assert account.why == ""
        list(notebook.generate("go on", max_new_tokens=5))
        assert notebook.last_account is not None
        assert "max_new_tokens" in notebook.last_account.why


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": "high"}, "repetition_penalty"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"stop": "end"}, "list of strings"),
        ({"stop": [""]}, "stop string"),
        ({"stop": [3]}, "stop string"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"logit_bias": {-1: 3.0}}, "token id"),
        ({"logit_bias": {10**9: 3.0}}, "tokens"),
        ({"logit_bias": {"": 3.0}}, "logit_bias"),
        ({"logit_bias": {3: float("inf")}}, "logit bias"),
        ({"logit_bias": {3: True}}, "logit bias"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused_before_the_stream_begins(parameters: dict[str, Any], message: str) -> None:
    notebook = build()
    with pytest.raises(InvalidArgumentError, match=message):
        notebook.generate("go on", **parameters)
    notebook.add("user", "the notebook is still free")


def test_a_notebook_that_changed_before_the_stream_began_refuses_it() -> None:
    notebook = build()
    stream = notebook.generate("go on", max_new_tokens=5)
    notebook.add("user", "one more thing")
    with pytest.raises(OutOfStepError, match="ask again"):
        next(stream)
    notebook.add("user", "still free")


def test_what_was_drawn_is_remembered_for_the_penalty() -> None:
    sampler = Sampler(Sampling(max_new_tokens=3, repetition_penalty=4.0), [1], tiny().tokenizer, 8)
    logits = torch.tensor([0.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0])
    assert [sampler.choose(logits) for _ in range(3)] == [2, 3, 1]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_a_watcher_is_told_the_model_s_own_log_probabilities(parameters: dict[str, Any]) -> None:
    """No sampling parameter changes them: the oracle is one full forward over the context and the answer."""
    notebook = raw_text()
    told: list[tuple[int, torch.Tensor]] = []
    mark = list(notebook.ids)
    text = "".join(notebook.generate(max_new_tokens=6, watch=lambda *each: told.append(each), **parameters))
    drawn = [token for token, _ in told]
    assert notebook.model.tokenizer.decode(drawn, skip_special_tokens=True) == text
    logits = notebook.model.engine.model(torch.tensor([[*mark, *drawn]])).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)[len(mark) - 1 : len(mark) - 1 + len(drawn)]
    torch.testing.assert_close(torch.stack([shares for _, shares in told]).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_temperature_that_float32_cannot_divide_by_is_greedy() -> None:
    notebook = build()
    greedy = "".join(notebook.generate(max_new_tokens=6))
    assert "".join(notebook.generate(max_new_tokens=6, temperature=1e-69, top_p=0.5)) == greedy


def test_a_limit_of_any_size_takes_memory_for_what_is_drawn_only() -> None:
    notebook = build()
    stream = notebook.generate(max_new_tokens=10**18, repetition_penalty=1.3)
    drawn = [next(stream) for _ in range(3)]
    stream.close()
    assert drawn == list(notebook.generate(max_new_tokens=40, repetition_penalty=1.3))[:3]


def test_an_answer_longer_than_the_first_room_remembers_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = build()
    expected = "".join(notebook.generate(max_new_tokens=40, repetition_penalty=1.5))
    monkeypatch.setattr("programmable_kv.notebook.sampling._ROOM", 2)
    assert "".join(notebook.generate(max_new_tokens=40, repetition_penalty=1.5)) == expected
