"""Counting in a model's tokens: its chat template decides what is equal, and the engine's blocks what is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from conftest import tokenizer
from explain.corpus import ANSWERED, ASKED, ASKED_NEXT, LONG, RULES, block, chat
from explain.test_protocols import CHAT_BODY, MESSAGES_BODY, RESPONSES_BODY
from programmable_kv import TemplateError, explain_miss
from programmable_kv.explain.explain import explain_requests
from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.prices import read_prices
from programmable_kv.explain.report import MissReport
from programmable_kv.explain.tokens import TokenCounter, chat_messages

TEMPLATES = Path(__file__).parent.parent / "templates"


def counter(family: str = "chatml") -> TokenCounter:
    made = copy.deepcopy(tokenizer("byte-level"))
    made.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return TokenCounter(family, made)


def read(*bodies: dict[str, Any]) -> LogReader:
    reader = LogReader()
    for body in bodies:
        reader.add(body, "x")
    return reader


def counted(*bodies: dict[str, Any], family: str = "chatml", block_size: int = 16) -> MissReport:
    return explain_requests(read(*bodies).requests, read_prices(), counter=counter(family), block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_first_differing_token_is_found_and_blocks_are_lost_whole(block_size: int) -> None:
    bodies = [chat(f"{RULES}Time: 15:0{n}\n{RULES}", ASKED) for n in range(2)]
    report = counted(*bodies, block_size=block_size)
    made = counter().tokenizer
    ids = [
        made(
            made.apply_chat_template(b["messages"], tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
        for b in bodies
    ]
    one, other = (each["input_ids"] for each in ids)
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    found = report.findings[1]
    assert found.token == same
    assert found.hit == same // block_size * block_size
    assert found.total == len(other)
    assert found.lost is not None
    # Everything after the clock was sent before. The clock's tokens and those that the template adds are not counted.
    assert found.total - found.hit - 24 <= found.lost <= found.total - found.hit
    assert report.unit == "tokens"


def test_a_flip_that_the_template_does_not_show_costs_nothing() -> None:
    bodies = chat(RULES, [block(ASKED + LONG)]), chat(RULES, ASKED + LONG, ANSWERED, ASKED_NEXT)
    assert explain_miss(*bodies).findings[1].missed, "without a tokenizer it may cost something"
    found = counted(*bodies).findings[1]
    assert found.cause == "serialisation flip"
    assert (found.lost, found.missed) == (0, False)


def test_a_template_that_renders_earlier_turns_anew_is_the_cause() -> None:
    """Qwen3's template omits the thoughts of earlier turns, although the client only appended messages."""
    thought = f"<think>\n{LONG}</think>\n\n{ANSWERED}"
    earlier = chat(RULES, ASKED, thought)
    earlier["messages"] += [{"role": "tool", "content": "ok"}]
    later = copy.deepcopy(earlier)
    later["messages"] += [{"role": "assistant", "content": ANSWERED}, {"role": "user", "content": ASKED_NEXT}]
    found = counted(earlier, later, family="qwen3").findings[1]
    assert found.cause == "chat template"
    assert found.lost is not None
    assert found.lost > 100
    assert counted(earlier, later, family="chatml").findings[1].cause == "appended"


def test_the_opening_of_an_answer_is_no_difference() -> None:
    report = counted(chat(RULES, ASKED), chat(RULES, ASKED, ANSWERED, ASKED_NEXT))
    assert report.findings[1].cause == "appended"
    assert report.lost == 0


def test_three_protocols_are_rendered_alike() -> None:
    requests = read(CHAT_BODY, MESSAGES_BODY, RESPONSES_BODY).requests
    one, other, third = (chat_messages(request) for request in requests)
    assert one == other
    assert [m["role"] for m in third] == [m["role"] for m in one]
    assert third[2]["tool_calls"] == one[2]["tool_calls"], "reasoning that the server keeps is not rendered"


def test_what_the_template_leaves_out_or_refuses_is_told() -> None:
    body = chat(RULES, ASKED, tools=[{"type": "function", "function": {"name": "zzyzx", "parameters": {}}}])
    assert any("does not write the tools" in note for note in counted(body, body).notes)
    assert not any("does not write the tools" in note for note in counted(body, body, family="qwen25").notes)
    with pytest.raises(TemplateError, match=r"x: the chat template of 'mistral_v1' refuses this request"):
        counted(chat(RULES, ASKED), chat(RULES, ASKED), family="mistral_v1")


def test_a_model_is_named_and_only_its_tokenizer_is_read(tmp_path: Path) -> None:
    counter().tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    report = explain_miss(chat(RULES, ASKED), chat(RULES + "x", ASKED), model=tmp_path)
    assert report.unit == "tokens"
    assert any(str(tmp_path) in note and "blocks of 16" in note for note in report.notes)
    bare = counter().tokenizer
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TemplateError, match="has no chat template"):
        explain_miss(chat(RULES, ASKED), model=tmp_path / "bare")


def test_an_own_model_has_the_price_of_an_own_table(tmp_path: Path) -> None:
    made = tmp_path / "own-model"
    counter().tokenizer.save_pretrained(made)
    (made / "config.json").write_text('{"model_type": "llama"}')
    prices = tmp_path / "prices.json"
    row = '{"model": "own-model", "input": 2, "read": 0, "source": "our power bill", "date": "2026-11-01"}'
    prices.write_text(f'{{"rows": [{row}]}}')
    report = explain_miss(chat("15:01 " + RULES, ASKED), chat("15:02 " + RULES, ASKED), model=made, prices=prices)
    assert report.money == pytest.approx(report.lost * 2 / 1e6)
