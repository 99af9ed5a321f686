"""Prompts put together from tokens and stored skills, and the requests that send them, played through the scheduler's half."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugged import BLOCK, Plugged, plugged

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.vllm_plugin.composing import Composition
from programmable_kv.vllm_plugin.scheduling import Request


@pytest.fixture(scope="module")
def plug(tmp_path_factory: pytest.TempPathFactory) -> Plugged:
    return plugged(tmp_path_factory.mktemp("plugged"))[0]


def sent(plug: Plugged, composition: Composition) -> list[tuple[int, int, int]]:
    """Every request of a composition, as vLLM would take it: its length, and how many tokens were cached and loaded."""
    cached = 0
    found = []
    for number, body in enumerate(composition.requests("tenant", BLOCK)):
        name = str(number)
        request = Request(name, body["prompt"], body["cache_salt"], body.get("kv_transfer_params"))
        loaded = plug.scheduling.matched(request, cached)
        told = plug.scheduling.finished(name)
        assert told is None or not told["skills"]["why"], told
        found.append((len(body["prompt"]), cached, loaded))
        cached = len(body["prompt"]) // BLOCK * BLOCK
    return found


def test_skills_side_by_side_are_one_request(plug: Plugged) -> None:
    refunds, returns = plug.store.entry("refunds"), plug.store.entry("returns")
    composition = Composition.of([refunds, returns, [7, 8, 9]])
    total = len(refunds.unit.ids) + len(returns.unit.ids)
    assert composition.ids == (*refunds.unit.ids, *returns.unit.ids, 7, 8, 9)
    assert sent(plug, composition) == [(total + 3, 0, total)]
    (body,) = composition.requests("tenant", BLOCK)
    assert body["cache_salt"] == "composed:tenant"
    assert "max_tokens" not in body


def test_an_early_request_that_ends_where_a_skill_begins_asks_for_one_token_too(plug: Plugged) -> None:
    composition = Composition.of([list(range(40, 40 + BLOCK)), plug.store.entry("refunds"), [7, 8, 9]])
    first, last = composition.requests("tenant", BLOCK)
    assert (len(first["prompt"]), first["max_tokens"]) == (BLOCK, 1)
    assert "max_tokens" not in last


def test_text_before_a_skill_takes_one_more_request(plug: Plugged) -> None:
    refunds = plug.store.entry("refunds")
    text = list(range(40, 60))
    composition = Composition.of([text, refunds, [7, 8, 9]])
    stop = 20 + len(refunds.unit.ids)
    assert sent(plug, composition) == [(32, 0, 0), (stop + 3, 32, stop - 32)]
    first, last = composition.requests("tenant", BLOCK)
    assert first["max_tokens"] == 1
    assert "max_tokens" not in last
    assert "kv_transfer_params" not in first, "the skill is not whole in it"


def test_a_seam_between_skills_takes_one_more_request(plug: Plugged) -> None:
    refunds, returns = plug.store.entry("refunds"), plug.store.entry("returns")
    composition = Composition.of([refunds, returns, [7, 8, 9]], seam=2)
    length = len(refunds.unit.ids)
    total = length + len(returns.unit.ids)
    until = -(-(length + 2) // BLOCK) * BLOCK
    assert sent(plug, composition) == [(until, 0, length), (total + 3, until, total - until)]


@pytest.mark.parametrize("salt", ["", "a@b", "a/b", "a\\b", "a\0b", "a" * 120])
def test_a_salt_is_one_that_vllm_takes(plug: Plugged, salt: str) -> None:
    with pytest.raises(InvalidArgumentError, match="a salt must have"):
        Composition.of([plug.store.entry("refunds")]).requests(salt, BLOCK)


def test_a_block_has_a_size(plug: Plugged, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1 token"):
        Composition.of([plug.store.entry("refunds")]).requests("tenant", 0)
