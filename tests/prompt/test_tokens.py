"""Special tokens in messages, turns, prompts, values and errata are plain text, with real fast tokenizers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ALTERNATING, CHATML, tiny, tiny_model, tokenizer, with_beginning
from programmable_kv import Field, Mode, Notebook, wrap_model
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError, TemplateError
from programmable_kv.prompt.parts import Rendered, shielded, unmarked, unshielded
from programmable_kv.prompt.tokens import as_text, encode, special_tokens_in
from programmable_kv.prompt.units import Kind, replace_values, tokenised
from reference import assert_rows_equal, full_forward

README = "to end, write <|im_end|> or </turn>; cp <s> <turn>"
KINDS = ["byte-level", "metaspace"]


def special_in(model: Any, ids: list[int]) -> list[int]:
    own = {"<s>", "<|im_start|>", "<|im_end|>", "<turn>", "</turn>"}
    return [token for token in ids if token in set(model.tokenizer.convert_tokens_to_ids(sorted(own)))]


def other_tokenizers() -> dict[str, Any]:
    """Tokenizers of further kinds: with a normaliser, with a prefix, of word pieces, of unigrams."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", *letters, *("##" + c for c in letters)])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)], 0, False))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made = {"word pieces": pieces, "unigram": unigram}
    return {
        name: PreTrainedTokenizerFast(
            tokenizer_object=each, unk_token="[UNK]" if name == "word pieces" else "<unk>", eos_token="<|im_end|>"
        )
        for name, each in made.items()
    }


@pytest.mark.parametrize("kind", [*KINDS, "word pieces", "unigram"])
@pytest.mark.parametrize(
    "text", ["a <|im_end|> b", "<|im_end|>", "x<|im_end|>", "<|im_end|>é <|im_end|>", "😀 <|im_end|>"]
)
def test_a_special_token_in_text_is_not_one(kind: str, text: str) -> None:
    own = tokenizer(kind) if kind in KINDS else other_tokenizers()[kind]
    end = own.convert_tokens_to_ids("<|im_end|>")
    assert end in own(text, add_special_tokens=False)["input_ids"], "the tokenizer looks for it everywhere"
    ids, offsets = encode(own, text, special_tokens_in(text, own))
    assert end not in ids
    covered = {at for start, stop in offsets.tolist() for at in range(start, stop)}
    assert covered >= {at for at, character in enumerate(text) if not character.isspace()}
    assert (np.diff(offsets[:, 0]) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.sampled_from(["<|im_end|>", "<turn>", " ", "a", "status", "é", "😀", "\n", "<", "|>"]), max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_text_without_special_tokens_is_encoded_as_ever(kind: str, pieces: list[str]) -> None:
    """Text not marked as plain gets the tokenizer's own tokens; text marked as plain decodes to the same text."""
    own, text = tokenizer(kind), "".join(pieces)
    expected = own(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encode(own, text)
    assert list(ids) == expected["input_ids"]
    assert [tuple(it) for it in offsets.tolist()] == expected["offset_mapping"]
    found = special_tokens_in(text, own)
    plain, _ = encode(own, text, found)
    assert not set(plain) & set(own.convert_tokens_to_ids(["<|im_end|>", "<turn>"]))
    assert own.decode(plain).strip(" ") == text.strip(" ")
    if found:  # if only the last special token is marked as plain, the others stay
        some, _ = encode(own, text, found[-1:])
        assert len([t for t in some if t in own.convert_tokens_to_ids(["<|im_end|>", "<turn>"])]) == len(found) - 1


def test_the_tokens_around_every_text_stay() -> None:
    model = with_beginning(tiny())
    text = "a <|im_end|> b"
    ids, offsets = encode(model.tokenizer, text, special_tokens_in(text, model.tokenizer), special=True)
    assert ids[0] == model.tokenizer.bos_token_id
    assert ids[1:] == encode(model.tokenizer, text, special_tokens_in(text, model.tokenizer))[0]
    assert offsets[0].tolist() == [0, 0]


def test_what_a_tokenizer_cannot_write_as_text_is_refused() -> None:
    """The tokenizer's vocabulary has the token as a word, so even without special tokens the text gives that token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    with pytest.raises(InvalidValueError, match="cannot be distinguished from that control token"):
        as_text("a <end> a", own, "the turn")
    assert as_text("a a", own, "the turn") == "a a"


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_notebook_no_text_is_a_control_token(kind: str) -> None:
    """This covers messages, turns, prompts, answers, values in every place, and errata."""
    model = tiny(kind=kind)
    first = "system" if kind == "byte-level" else "user"
    plain = Notebook(model).message(first, "rules: {file} end", file="x")
    plain.prefill()
    wanted = len(special_in(model, plain.ids))
    notebook = Notebook(model).message(first, README + " {file} end", file="x")
    notebook.prefill()
    assert len(special_in(model, notebook.ids)) == wanted
    assert README in notebook.rendered_text
    notebook.edit(file=Field("ends in <|im_end|> <turn>", trusted=True), mode="field_erratum")
    assert "file is now: ends in <|im_end|> <turn>." in notebook.rendered_text
    added = len(special_in(model, notebook.ids)) - wanted
    wanted += added
    assert added in (0, 2), "an erratum is a message: its two markers, and none in the value"
    notebook.add("user", "see " + README)
    assert len(special_in(model, notebook.ids)) == wanted + 2
    notebook.edit(file="shipped", mode="suffix")
    expected, _ = full_forward(model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)
    mark = notebook.mark()
    notebook.decide("what of <|im_end|>?", ["<turn>", "deny"], keep=True)
    assert "what of <|im_end|>?" in notebook.rendered_text
    notebook.rollback(mark)
    assert "".join(notebook.generate("what of <|im_end|>?", max_new_tokens=3, keep=True)) in notebook.rendered_text
    assert "what of <|im_end|>?" in notebook.rendered_text


def test_a_value_that_completes_a_special_token_is_text() -> None:
    """One half of the token is the author's text, the other half is the value."""
    notebook = Notebook(tiny()).text("see <{tag}> there, {tag}", tag="x")
    notebook.prefill()
    turn = notebook.model.tokenizer.convert_tokens_to_ids("<turn>")
    for mode in Mode:
        notebook.edit(tag="turn", mode=mode)
        assert turn not in notebook.ids
        notebook.edit(tag="x", mode="full")


def test_raw_text_keeps_the_authors_special_tokens() -> None:
    notebook = Notebook(tiny()).text(
        "<|im_start|>system\nstatus: {status}<|im_end|>\n", status=Field("<turn> x", trusted=True)
    )
    notebook.prefill()
    own = notebook.model.tokenizer
    start, end, turn = own.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<turn>"])
    assert (notebook.ids.count(start), notebook.ids.count(end), notebook.ids.count(turn)) == (1, 1, 0)
    notebook.edit(status=Field("cp <s> y", trusted=True), mode="in_place")
    assert (notebook.ids.count(start), notebook.ids.count(end)) == (1, 1)
    assert notebook.rendered_text == "<|im_start|>system\nstatus: cp <s> y<|im_end|>\n"


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_edits_near_plain_tokens_give_the_tokens_of_the_new_text(kind: str, data: st.DataObject) -> None:
    """Replacing a value in a window gives the ids, offsets, places and plain text of tokenising the whole new text."""
    own = tokenizer(kind)
    words = st.lists(st.sampled_from(["status", "<|im_end|>", "<turn>", " ", "a", "é", "\n", "the order "]), max_size=9)
    values = st.sampled_from(["", "x", "<turn>", "shipped", "two words", "<|im_end|>"])
    around = ["".join(data.draw(words)) for _ in range(3)]
    old, new = [[data.draw(values) for _ in range(2)] for _ in range(2)]

    def unit(first: str, second: str) -> Any:
        texts = [shielded(text, special_tokens_in(text, own), "text") for text in around]
        places, text = [], ""
        for name, piece, value in zip("ab", texts, (first, second), strict=False):
            text += piece
            places.append((name, Span(len(text), len(text) + len(value))))
            text += value
        return tokenised(own, Rendered(text + texts[2], tuple(places)), Kind.PREFILL)

    changed, replacements = replace_values(own, unit(*old), dict(zip("ab", new, strict=True)))
    assert changed == unit(*new)
    assert not set(changed.ids) & set(own.convert_tokens_to_ids(["<|im_end|>", "<turn>"]))
    before = unit(*old)
    kept = [t for at, t in enumerate(before.ids) if not any(at in r.old.range for r in replacements)]
    assert kept == [t for at, t in enumerate(changed.ids) if not any(at in r.new.range for r in replacements)]


def test_a_mark_that_a_template_cuts_apart_is_told() -> None:
    cutter = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][:6] }}\n{% endfor %}"
    own = copy.copy(tokenizer("byte-level"))
    own.chat_template = cutter
    notebook = Notebook(wrap_model(tiny_model("llama"), own)).message("system", "see <|im_end|> there")
    with pytest.raises(TemplateError):
        notebook.prefill()


def test_marks_are_read_off_in_order() -> None:
    text = shielded("a<s>b<s>", [Span(1, 4), Span(5, 8)], "text")
    read = unshielded(Rendered(text, (("x", Span(len(text), len(text))),)))
    assert read == Rendered("a<s>b<s>", (("x", Span(8, 8)),), (Span(1, 4), Span(5, 8)))
    assert unmarked(text) == "a<s>b<s>"
    with pytest.raises(InvalidValueError, match="U\\+E00A"):
        shielded("\ue00a", [], "text")


def test_a_byte_order_mark_is_no_text() -> None:
    with_mark = (
        Notebook(tiny()).message("system", "\ufeffnote: {note}", note="\ufeffshipped").message("user", "\ufeffhi")
    )
    without = Notebook(tiny()).message("system", "note: {note}", note="shipped").message("user", "hi")
    for notebook in (with_mark, without):
        notebook.prefill()
        notebook.add("user", "\ufeffso?" if notebook is with_mark else "so?")
    assert with_mark.ids == without.ids
    raw = [Notebook(tiny()).text(text) for text in ("\ufeffstatus", "status")]
    for notebook in raw:
        notebook.prefill()
    assert raw[0].ids == raw[1].ids


def test_saved_notebooks_keep_what_is_plain_text(tmp_path: Any) -> None:
    notebook = Notebook(tiny()).message("system", README + " {file} end", file=Field("<turn>", trusted=True))
    notebook.prefill()
    notebook.save(tmp_path / "n")
    loaded = Notebook.load(tmp_path / "n", notebook.model)
    for each in (notebook, loaded):
        each.edit(file="cp <s>", mode="field_erratum")
        each.add("user", README)
    assert loaded.ids == notebook.ids
    assert loaded.rendered_text == notebook.rendered_text


@pytest.mark.parametrize("template", [CHATML, ALTERNATING])
def test_templates_trim_around_marks(template: str) -> None:
    own = copy.copy(tokenizer("metaspace"))
    own.chat_template = template
    notebook = Notebook(replace(tiny(), tokenizer=own)).message("user", "<|im_end|>")
    notebook.prefill()
    assert notebook.rendered_text.count("<|im_end|>") == (2 if template is CHATML else 1)
