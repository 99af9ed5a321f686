"""Which tokens can be loaded, compared with the same rules applied token by token."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidRequestError
from programmable_kv.vllm_plugin.matching import Piece, Placed, blocks_of, loadable, place, slots_of, stages


@st.composite
def prompts(draw: st.DrawFn) -> tuple[tuple[Placed, ...], int]:
    """Skills in ascending order in a prompt, some of them adjacent, and the prompt's length."""
    placed: list[Placed] = []
    at = 0
    for number in range(draw(st.integers(0, 4))):
        at += draw(st.sampled_from([0, 0, 1, 5, 40]))
        size = draw(st.integers(1, 30))
        placed.append(Placed(f"skill {number}", Span(at, at + size), draw(st.sampled_from([0, 0, 1, 4, 50]))))
        at += size
    return tuple(placed), at + draw(st.integers(1 if not placed else 0, 9))


def is_loadable(placed: tuple[Placed, ...], token: int, length: int) -> bool:
    """The rule for one token: it is in a skill after the seam, and is not the prompt's last token."""
    return token < length - 1 and any(each.tokens.start + each.seam <= token < each.tokens.stop for each in placed)


@given(prompts(), st.integers(0, 60))
def test_one_run_is_loaded_up_to_the_first_token_that_no_skill_holds(
    prompt: tuple[tuple[Placed, ...], int], computed: int
) -> None:
    placed, length = prompt
    computed = min(computed, length)
    expected = computed
    while is_loadable(placed, expected, length):
        expected += 1
    pieces = loadable(placed, computed, length)
    assert (pieces[-1].stop if pieces else computed) == expected
    assert all(one.stop == other.start for one, other in pairwise(pieces))
    for piece in pieces:
        (skill,) = [each for each in placed if each.key == piece.key]
        assert skill.tokens.start + piece.tokens.start == piece.start
        assert len(piece.tokens) > 0


@given(prompts(), st.sampled_from([1, 8, 16, 32]))
def test_after_all_stages_only_what_no_skill_holds_was_computed(
    prompt: tuple[tuple[Placed, ...], int], block: int
) -> None:
    """This acts as vLLM: whole blocks stay cached, what can be loaded is loaded, the rest of the stage is computed."""
    placed, length = prompt
    computed: list[int] = []
    cached = 0
    sent = stages(placed, length, block)
    assert list(sent) == sorted(set(sent))
    assert sent[-1] == length
    for stage in sent:
        pieces = loadable(placed, cached, stage)
        reached = pieces[-1].stop if pieces else cached
        computed += range(reached, stage)
        cached = stage // block * block
    needed = [token for token in range(length) if not is_loadable(placed, token, length)]
    extra = set(computed) - set(needed)
    assert set(needed) <= set(computed)
    # A stage ends at the end of a block: at most one block of each skill is computed beyond need.
    for each in placed:
        assert len(extra & set(each.tokens.range)) <= block


def test_a_gap_is_crossed_in_two_stages() -> None:
    placed = (Placed("head", Span(0, 24)), Placed("policy", Span(30, 200), 4))
    assert loadable(placed, 0, 220) == (Piece("head", Span(0, 24), 0),)
    assert stages(placed, 220, 16) == (48, 220)
    assert loadable(placed, 48, 220) == (Piece("policy", Span(18, 170), 48),)


def test_a_seam_is_left_to_vllm() -> None:
    placed = (Placed("policy", Span(0, 64), 4),)
    assert loadable(placed, 0, 100) == ()
    assert loadable(placed, 3, 100) == ()
    assert loadable(placed, 4, 100) == (Piece("policy", Span(4, 64), 4),)


def test_the_last_token_of_a_prompt_is_never_loaded() -> None:
    placed = (Placed("policy", Span(0, 64)),)
    assert loadable(placed, 0, 64) == (Piece("policy", Span(0, 63), 0),)
    assert loadable(placed, 63, 64) == ()


PROMPT = [1, 2, 3, 10, 11, 12, 4, 10, 11, 12, 5]


@pytest.mark.parametrize(("start", "after", "expected"), [(3, 0, 3), (None, 0, 3), (None, 4, 7), (7, 6, 7)])
def test_a_skill_is_found_by_its_tokens(start: int | None, after: int, expected: int) -> None:
    assert place("k", [10, 11, 12], PROMPT, start, after=after) == Span(expected, expected + 3)


@pytest.mark.parametrize(
    ("ids", "start", "after", "said"),
    [
        ([10, 11, 13], None, 0, "are not in the prompt"),
        ([10, 11, 13], 3, 0, "token 2 of 3 differs"),
        ([10, 11, 12], 4, 0, "token 0 of 3 differs"),
        ([4, 10, 11, 12, 5, 6], 6, 0, "token 5 of 6 differs"),
        ([10, 11, 12], 3, 5, "in the order of the prompt"),
        ([10, 11, 12], 400, 0, "token 0 of 3 differs"),
    ],
)
def test_a_skill_that_does_not_stand_there_is_refused(ids: list[int], start: int | None, after: int, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        place("k", ids, PROMPT, start, after=after)


def test_a_match_inside_of_tokens_is_none() -> None:
    """0x00010000, 0x00020000 hold the bytes of 0x00000001 between them."""
    with pytest.raises(InvalidRequestError):
        place("k", [0x0001], [0x00010000, 0x00020000, 7], None)


def test_tokens_are_found_in_their_blocks() -> None:
    blocks = [9, 4, 7]
    assert blocks_of(blocks, Span(15, 33), 16) == [9, 4, 7]
    assert blocks_of(blocks, Span(16, 32), 16) == [4]
    assert slots_of(blocks, Span(14, 18), 16) == [9 * 16 + 14, 9 * 16 + 15, 4 * 16, 4 * 16 + 1]
