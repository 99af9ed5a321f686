"""Training conversations: only the assistant's answers are learned, and a seed decides everything."""

from __future__ import annotations

import random

import pytest

from programmable_kv.scenarios.phrasings import Stage
from training.conversation import conversation


@pytest.mark.parametrize(
    "stage", ["pair", "short", "mixed", "wide", "hop", "full", "topics", "hard", "settle", "obey", "looked_up"]
)
def test_conversations_teach_answers_only(stage: Stage) -> None:
    for seed in range(60):
        pieces = conversation(random.Random(seed), stage=stage)
        learned = [piece.text for piece in pieces if piece.learned]
        assert learned
        for text in learned:
            assert text.endswith(("<|im_end|>", "\n"))
            assert "[STATE UPDATE]" not in text


def test_the_same_seed_gives_the_same_conversation() -> None:
    assert conversation(random.Random(7)) == conversation(random.Random(7))
    assert conversation(random.Random(7)) != conversation(random.Random(8))
