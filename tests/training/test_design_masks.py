"""Who reads whom under design: each rule with a witness for and against, and the forward that follows from it, exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from conftest import tiny_model, tokenizer
from programmable_kv.scenarios.grammar import Gate, Scenario
from training.design.batches import batches, hidden_states, predicted
from training.design.blocks import Blocks, training_rule_sets, write
from training.design.dialogues import Dialogue, Exchange, training_dialogue, under_design, with_errata
from training.design.masks import allowed, visible
from training.design.parts import PLAIN, TURNS, Encoding, TokenSequence, Writer

PROMPT = (
    "You are the clerk.\n\nstatus: {status}\ntier: {tier}\n\nBe polite.\nIf status is open, wait.\n"
    "With tier gold and status open, call.\nTier silver means mail.\nAnswer briefly."
)
GATE = Gate("status", "a call", {"open": "wait", "closed": "deny"})


def dialogue(*edits: tuple[str, str], status: str = "open", tier: str = "gold", spaced: bool = False) -> Dialogue:
    """One question, the edits, and another question."""
    scenario = Scenario("none", PROMPT, {"status": status, "tier": tier}, (GATE,), {"tier": ("gold", "silver")})
    first = Exchange((), (), "What now?", "wait", GATE)
    return Dialogue(scenario, (first, Exchange(tuple(edits), ("",) * len(edits), "And now?", "deny", GATE)), 2, spaced)


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return Encoding(tokenizer("byte-level"))


def find(sequence: TokenSequence, text: str, number: int = 0) -> range:
    """The indices of the tokens that spell a text, the `number`th time it is written."""
    made = tokenizer("byte-level")
    spelled = [made.decode([int(token)]) for token in sequence.ids]
    found = -1
    for first in range(len(spelled)):
        together = ""
        for last in range(first, len(spelled)):
            together += spelled[last]
            if together == text:
                found += 1
                if found == number:
                    return range(first, last + 1)
            if len(together) >= len(text):
                break
    raise AssertionError(f"{text!r} is not written {number + 1} times")


def reads(sequence: TokenSequence, query: range, key: range) -> bool:
    """Whether all tokens of the one read all of the other; all or none of them must."""
    found = {allowed(sequence, q, k) for q in query for k in key}
    assert len(found) == 1
    return found.pop()


def test_before_an_edit(encoding: Encoding) -> None:
    sequence = under_design(dialogue(("status", "closed")), encoding)
    opening, polite, briefly = (
        find(sequence, text) for text in ("You are the clerk.", "Be polite.", "Answer briefly.")
    )
    status, tier = find(sequence, "open"), find(sequence, "gold")
    alone, both, other = (
        find(sequence, text)
        for text in (
            "If status is open, wait.\n",
            "With tier gold and status open, call.\n",
            "Tier silver means mail.\n",
        )
    )
    asked = find(sequence, "What now?")
    # Plain text reads plain text, and neither fields nor readers.
    assert reads(sequence, polite, opening)
    assert not any(reads(sequence, briefly, unseen) for unseen in (status, tier, alone, both, other))
    # A field reads the plain text before it, and no other field.
    assert reads(sequence, tier, opening)
    assert not reads(sequence, tier, status)
    # A reader reads its fields, plain text, and earlier readers that share a field with it.
    assert reads(sequence, alone, status)
    assert reads(sequence, alone, polite)
    assert not reads(sequence, alone, tier)
    assert reads(sequence, both, status)
    assert reads(sequence, both, tier)
    assert reads(sequence, both, alone)
    assert reads(sequence, other, both)
    assert not reads(sequence, other, alone)
    assert not reads(sequence, other, status)
    # Turns read everything.
    assert all(reads(sequence, asked, seen) for seen in (opening, status, tier, alone, both, other, briefly))


def test_after_an_edit(encoding: Encoding) -> None:
    sequence = under_design(dialogue(("status", "closed")), encoding)
    first, then = find(sequence, "What now?"), find(sequence, "And now?")
    old, new = find(sequence, "open"), find(sequence, "closed")
    alone = [find(sequence, "If status is open, wait.\n", number) for number in range(2)]
    other = [find(sequence, "Tier silver means mail.\n", number) for number in range(2)]
    tier, briefly = find(sequence, "gold"), find(sequence, "Answer briefly.")
    # What is new is read, what is old is not; the tier's own reader read a reader that is written again.
    assert all(reads(sequence, then, seen) for seen in (new, alone[1], other[1], tier, briefly, first))
    assert not any(reads(sequence, then, dead) for dead in (old, alone[0], other[0]))
    assert reads(sequence, first, old)
    assert reads(sequence, alone[1], new)
    assert not reads(sequence, alone[1], old)
    assert reads(sequence, other[1], tier)
    # A second copy stands where the first stood: it reads neither what stands behind it nor the turns.
    for a, b in zip(alone[0], alone[1], strict=True):
        assert sequence.positions[a] == sequence.positions[b]
    assert not reads(sequence, alone[1], briefly)
    assert not reads(sequence, alone[1], first)
    assert not sequence.learned[list(alone[1])].any()
    # The first copies are dead, once and for all.
    assert all(sequence.dead[index] == new[0] for index in (*old, *alone[0], *other[0]))


def test_an_edit_writes_only_what_read_the_field(encoding: Encoding) -> None:
    sequence = under_design(dialogue(("tier", "silver")), encoding)
    find(sequence, "With tier gold and status open, call.\n", 1)
    find(sequence, "Tier silver means mail.\n", 1)
    with pytest.raises(AssertionError, match="not written 2 times"):
        find(sequence, "If status is open, wait.\n", 1)


def test_a_value_shorter_than_its_place_leaves_a_hole(encoding: Encoding) -> None:
    closed, opened = (under_design(dialogue(status=status), encoding) for status in ("closed", "open"))
    tails = [sequence.positions[find(sequence, "Be polite.")[0]] for sequence in (closed, opened)]
    assert tails[0] == tails[1]
    assert len(closed) != len(opened)


@pytest.mark.parametrize("spaced", [False, True])
def test_the_space_before_a_value_belongs_to_it_or_not(encoding: Encoding, spaced: bool) -> None:
    sequence = under_design(dialogue(spaced=spaced), encoding)
    (value,) = (find(sequence, " open" if spaced else "open"),)
    assert len(set(sequence.part[list(value)])) == 1
    assert sequence.part[value[0]] not in (PLAIN, TURNS)
    assert sequence.part[value[0] - 1] == PLAIN


def test_skills_read_themselves_only(encoding: Encoding) -> None:
    blocks = Blocks("House rules:\n", ("If open, wait.\n", "If closed, deny.\n"), (("What?", "wait"),))
    alone, in_one = (write(blocks, encoding, "rule sets", alone=way) for way in (True, False))
    places = [find(alone, text) for text in ("House rules:", "If open, wait.\n", "If closed, deny.\n", "What?")]
    opening, first, second, asked = places
    assert not reads(alone, first, opening)
    assert not reads(alone, second, first)
    assert all(reads(alone, asked, seen) for seen in (opening, first, second))
    assert allowed(alone, second[-1], second[0])
    opening, first, second, asked = (
        find(in_one, text) for text in ("House rules:", "If open, wait.\n", "If closed, deny.\n", "What?")
    )
    assert reads(in_one, first, opening)
    assert reads(in_one, second, first)


def test_nobody_reads_what_comes_later(encoding: Encoding) -> None:
    writer = Writer()
    writer.add(encoding.ids("a b c d"), TURNS)
    sequence = writer.finish("conversations")
    for query in range(len(sequence)):
        for key in range(len(sequence)):
            assert allowed(sequence, query, key) == (key <= query)


def test_masks_of_a_batch_are_the_reference(encoding: Encoding) -> None:
    drawn = [
        under_design(dialogue(("status", "closed"), ("tier", "silver")), encoding),
        write(training_rule_sets(random.Random(1)), encoding, "rule sets alone", alone=True),
    ]
    (batch,) = batches(drawn, 10**6)
    columns = [torch.from_numpy(column).long() for column in (batch.part, batch.positions, batch.dead)]
    mask = visible(*columns, torch.from_numpy(batch.reads))
    for row, sequence in enumerate(sorted(drawn, key=len, reverse=True)):
        n = len(sequence)
        q, k = np.indices((n, n))
        expected = (k <= q) & (sequence.positions[k] <= sequence.positions[q]) & (sequence.dead[k] > q)
        expected &= sequence.reads[sequence.part[q], sequence.part[k]]
        assert np.array_equal(mask[row, 0, :n, :n].numpy(), expected)
        for query, key in random.Random(0).choices([(a, b) for a in range(n) for b in range(n)], k=400):
            assert bool(mask[row, 0, query, key]) == allowed(sequence, query, key)
        assert mask[row, 0, n:].sum() == mask.shape[-1] - n  # padding sees itself
        assert not mask[row, 0, :n, n:].any()


def states_of(sequence: TokenSequence) -> torch.Tensor:
    with torch.no_grad():
        (batch,) = batches([sequence], 10**6)
        return hidden_states(tiny_model("llama"), batch)[0, : len(sequence)]


def test_a_value_changes_no_plain_token(encoding: Encoding) -> None:
    """In numbers, exactly: the states of plain text and of unrelated readers; and a reader's do change."""
    ways = [under_design(dialogue(tier=tier), encoding) for tier in ("gold", "silv")]
    states = [states_of(sequence) for sequence in ways]
    moved = 0
    for text in ("You are the clerk.", "Be polite.", "If status is open, wait.\n", "Answer briefly."):
        kept = [state[list(find(sequence, text))] for sequence, state in zip(ways, states, strict=True)]
        assert torch.equal(*kept), text
        moved += 1
    related = [
        state[list(find(sequence, "Tier silver means mail.\n"))] for sequence, state in zip(ways, states, strict=True)
    ]
    assert moved == 4
    assert not torch.allclose(*related)
    causal = [states_of(with_errata(dialogue(tier=tier), encoding)) for tier in ("gold", "silv")]
    assert not torch.allclose(causal[0][-1], causal[1][-1])


def test_an_edit_is_what_the_new_value_would_have_been(encoding: Encoding) -> None:
    """The second copies have the states that a sequence has which begins with the new value: exact by construction."""
    edited = under_design(dialogue(("status", "closed")), encoding)
    begun = under_design(dialogue(status="closed"), encoding)
    before, after = states_of(begun), states_of(edited)
    for text in ("closed", "If status is open, wait.\n", "With tier gold and status open, call.\n"):
        again = 0 if text == "closed" else 1
        torch.testing.assert_close(after[list(find(edited, text, again))], before[list(find(begun, text))])


def test_a_skill_changes_no_other(encoding: Encoding) -> None:
    def written(first: str) -> TokenSequence:
        blocks = Blocks("House rules:\n", (first, "If closed, deny.\n"), (("What?", "wait"),))
        return write(blocks, encoding, "rule sets", alone=True)

    ways = [written("If open, wait.\n"), written("If wait, open.\n")]  # as many tokens
    kept = [states_of(way)[list(find(way, "If closed, deny.\n"))] for way in ways]
    assert torch.equal(*kept)
    asked = [states_of(way)[list(find(way, "What?"))] for way in ways]
    assert not torch.allclose(*asked)


def test_batches_change_no_loss(encoding: Encoding) -> None:
    """Padding and company leave a sequence's losses as they are alone."""
    drawn = [under_design(training_dialogue(random.Random(seed)), encoding) for seed in range(3)]
    model = tiny_model("llama", max_position_embeddings=4096)
    with torch.no_grad():
        apart = sorted(float(predicted(model, batch).loss.sum()) for batch in batches(drawn, 1))
        together = batches(drawn, 10**6)
        assert sum(len(batch.ids) for batch in together) == 3
        said = [predicted(model, batch) for batch in together]
        whole = sum(float(each.loss.sum()) for each in said)
    assert whole == pytest.approx(sum(apart), rel=1e-6)  # the losses are float32
