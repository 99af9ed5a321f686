"""Training sequences are written as the model's chat template writes chats, whichever it is."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_model, tokenizer
from programmable_kv.errors import TrainingError
from programmable_kv.scenarios.vocabulary import held_out_domains
from training.design.__main__ import main
from training.design.blocks import held_out_facts, write
from training.design.chat_format import CHATML, ChatFormat
from training.design.dialogues import held_out_dialogue, rewritten, with_errata
from training.design.mixture import plain
from training.design.model import require_full_reach
from training.design.parts import Encoding

TEMPLATES = Path(__file__).parent.parent / "templates"
CHATS = ("chatml", "llama3", "phi3", "granite")


def templated(name: str) -> Any:
    made = copy.deepcopy(tokenizer("byte-level"))
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return made


def said(sequence: Any, made: Any) -> str:
    return str(made.decode(sequence.ids.tolist()))


def test_the_embedded_models_own_format(embedded: Any) -> None:
    assert ChatFormat.of(embedded.tokenizer) == CHATML


@pytest.mark.parametrize("name", CHATS)
def test_a_sequence_is_what_the_template_renders(name: str) -> None:
    made = templated(name)
    encoding = Encoding(made, ChatFormat.of(made))
    dialogue = held_out_dialogue(random.Random(4), held_out_domains()[0], gates=1, two_hop=None)
    values = dict(dialogue.scenario.values)
    for exchange in dialogue.exchanges:
        values |= exchange.edits
    messages = [{"role": "system", "content": dialogue.scenario.prompt.format_map(values)}]
    for exchange in dialogue.exchanges:
        messages += [{"role": "user", "content": exchange.asked}, {"role": "assistant", "content": exchange.answer}]
    rendered = made.apply_chat_template(messages, tokenize=False)
    # Some templates put one more token behind a whole conversation.
    assert rendered.startswith(said(rewritten(dialogue, encoding), made).strip())


@pytest.mark.parametrize("name", CHATS)
def test_only_answers_and_their_ends_are_learned(name: str) -> None:
    made = templated(name)
    encoding = Encoding(made, ChatFormat.of(made))
    dialogue = held_out_dialogue(random.Random(2), held_out_domains()[1], gates=1, two_hop=False)
    sequence = with_errata(dialogue, encoding)
    learned = str(made.decode(sequence.ids[sequence.learned].tolist()))
    assert learned == "".join(exchange.answer + encoding.chat.answer_ends for exchange in dialogue.exchanges)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("alone", [True, False])
def test_pieces_in_the_first_question_are_in_that_message(name: str, alone: bool) -> None:
    made = templated(name)
    encoding = Encoding(made, ChatFormat.of(made))
    blocks = held_out_facts(random.Random(1), held_out_domains()[2])
    text = said(write(blocks, encoding, "facts", alone=alone), made)
    asked, answer = blocks.asked[0]
    messages = [
        {"role": "system", "content": blocks.opening},
        {"role": "user", "content": blocks.found + "".join(blocks.pieces) + asked},
        {"role": "assistant", "content": answer},
    ]
    if not blocks.found:
        messages[:2] = [
            {"role": "system", "content": blocks.opening + "".join(blocks.pieces)},
            {"role": "user", "content": asked},
        ]
    ended = answer + encoding.chat.answer_ends
    rendered = made.apply_chat_template(messages, tokenize=False)
    assert text.partition(ended)[:2] == rendered.partition(ended)[:2]
    assert ended in rendered


@pytest.mark.parametrize("name", CHATS)
def test_conversations_of_the_first_training_too(name: str) -> None:
    made = templated(name)
    encoding, chatml = Encoding(made, ChatFormat.of(made)), Encoding(made)
    for number in range(12):
        other, own = (plain(random.Random(number), each) for each in (encoding, chatml))
        text, before = (said(one, made) for one in (other, own))
        if "<|im_start|>" not in before:
            assert text == before, "plain text has no messages"
            continue
        assert name == "chatml" or "<|im_start|>" not in text
        assert text.count(encoding.chat.answer_ends) >= before.count("<|im_start|>assistant")


def test_what_cannot_be_written_is_refused() -> None:
    bare = copy.deepcopy(tokenizer("byte-level"))
    bare.chat_template = None
    with pytest.raises(TrainingError, match="no chat template"):
        ChatFormat.of(bare)
    with pytest.raises(TrainingError, match="cannot write this model's chats"):
        ChatFormat.of(templated("gemma"))
    thinking = templated("chatml")
    thinking.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(TrainingError, match="asks for an answer"):
        ChatFormat.of(thinking)
    assert ChatFormat.of(templated("llama3")).trims
    assert not ChatFormat.of(templated("chatml")).trims
    with pytest.raises(TrainingError, match="window"):
        require_full_reach(tiny_model("gemma3_text", dtype=torch.float32))


def test_a_new_adapter_for_another_model_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another architecture, another chat format, no adapter to begin with: trained, exported, and loaded as any other."""
    from peft import PeftModel

    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("qwen2", dtype=torch.float32).save_pretrained(base)
    templated("llama3").save_pretrained(base)
    arguments = [
        "--base", str(base), "--out", str(out), "--rank", "4", "--device", "cpu", "--steps", "2", "--sequences-per-step", "2",
        "--longest", "900", "--replay-windows", "1", "--score-count", "0",
    ]  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())
    with pytest.raises(SystemExit):
        main([*arguments, "--adapter", str(out)])
    assert main([*arguments[:5], "8", *arguments[6:]]) == 1
    assert "adapter of rank 4" in capsys.readouterr().err
