"""The sequences of a training step. Each depends only on (seed, step, index), in whichever process it is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from programmable_kv.scenarios.phrasings import Stage
from training.conversation import conversation
from training.design.blocks import Blocks, training_facts, training_rule_sets, training_updates, write
from training.design.chat_format import CHATML
from training.design.dialogues import rewritten, training_dialogue, under_design, with_errata
from training.design.parts import TURNS, Encoding, TokenSequence, Writer
from training.design.recipe import DesignRecipe
from training.design.tools import training_tools

_STAGES: tuple[Stage, ...] = ("obey", "looked_up", "settle", "full", "full")
_BLOCKS: dict[str, Callable[[random.Random, Sequence[str] | None], Blocks]] = {
    "rule sets": training_rule_sets, "tools": training_tools, "facts": training_facts, "updates": training_updates,
}  # fmt: skip


def draw(recipe: DesignRecipe, encoding: Encoding, step: int, index: int) -> TokenSequence:
    """Draw one sequence of a step, of at most `recipe.longest` tokens."""
    for attempt in range(100):
        rng = random.Random(f"{recipe.seed}/{step}/{index}/{attempt}")
        families, weights = zip(*recipe.mixture, strict=True)
        sequence = of_family(rng.choices(families, weights)[0], rng, encoding)
        if len(sequence) <= recipe.longest and sequence.learned.any():
            return sequence
    raise AssertionError(f"no sequence of at most {recipe.longest} tokens was drawn")


def of_family(family: str, rng: random.Random, encoding: Encoding) -> TokenSequence:
    """Draw a training sequence of one family."""
    if family == "conversations":
        return plain(rng, encoding)
    if family == "design policies":
        return under_design(training_dialogue(rng, encoding.words), encoding)
    if family == "errata policies":
        return with_errata(training_dialogue(rng, encoding.words), encoding)
    if family == "rewritten policies":
        return rewritten(training_dialogue(rng, encoding.words), encoding)
    kind, _, way = family.rpartition(" alone") if family.endswith(" alone") else family.rpartition(" in one")
    assert not way
    return write(_BLOCKS[kind](rng, encoding.words), encoding, family, alone=family.endswith(" alone"))


def plain(rng: random.Random, encoding: Encoding, *, held_out: bool = False) -> TokenSequence:
    """Draw a causal conversation of the shipped adapter's training; with `held_out`, one in words that it never saw."""
    drawn = (
        conversation(rng, "held_out")
        if held_out
        else conversation(rng, stage=rng.choice(_STAGES), words=encoding.words)
    )
    writer, chat = Writer(), encoding.chat
    answered = False
    for piece in drawn:
        # In ChatML, the line break after an answer is a separate piece.
        behind = answered and piece.text == "\n"
        text = chat.between if behind else chat.of_chatml(piece.text, begins=not len(writer))
        writer.add(encoding.ids(text), TURNS, learned=piece.learned)
        answered = piece.text.endswith(CHATML.answer_ends)
    return writer.finish("conversations")
