"""Which requests get skills, and what each is told: every rule, with a request that breaks it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugged import BLOCK, Plugged, plugged

from programmable_kv.cache.span import Span
from programmable_kv.vllm_plugin.matching import Piece
from programmable_kv.vllm_plugin.scheduling import Load, Request

BLOCKS = list(range(20, 40))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Plugged:
    return plugged(tmp_path_factory.mktemp("plugged"))[0]


@pytest.fixture
def plug(shared: Plugged) -> Iterator[Plugged]:
    yield shared
    shared.scheduling.drain()
    shared.scheduling.finished("asked")


def prompt_of(plug: Plugged) -> list[int]:
    return [*plug.store.entry("refunds").unit.ids, *plug.store.entry("returns").unit.ids, 7, 8]


def request(plug: Plugged, **changes: Any) -> Request:
    given = Request("asked", prompt_of(plug), "composed:a", {"skills": ["refunds", "returns"]})
    return replace(given, **changes)


def count(plug: Plugged, asked: Request, computed: int = 0) -> int:
    """The answer, asked twice; the request is finished."""
    found = plug.scheduling.matched(asked, computed)
    assert plug.scheduling.matched(asked, computed) == found, "a question must not change its answer"
    return found


def test_all_skills_of_a_prompt_are_loaded(plug: Plugged) -> None:
    asked = request(plug)
    total = len(prompt_of(plug)) - 2
    assert count(plug, asked) == total
    plug.scheduling.allocated(asked, 0, total, BLOCKS)
    first, second = plug.store.entry("refunds"), plug.store.entry("returns")
    length, more = len(first.unit.ids), len(second.unit.ids)
    pieces = (Piece(first.key, Span(0, length), 0), Piece(second.key, Span(0, more), length))
    (load,) = plug.scheduling.drain()
    assert load == Load("asked", pieces, tuple(BLOCKS))
    assert pickle.loads(pickle.dumps(load)) == load, "workers may be other processes"
    assert plug.scheduling.drain() == (), "each load is handed out once"
    assert plug.scheduling.finished("asked") == {"skills": {"tokens_loaded": total, "why": ""}}
    assert plug.scheduling.finished("asked") is None


@pytest.mark.parametrize(
    ("cached", "loaded", "said"),
    [(0, 0, "0 tokens are cached, and skill"), (16, 0, "can be loaded from token 20 on"), (32, 1, ""), (400, 0, "")],
)
def test_text_before_a_skill_is_told(plug: Plugged, cached: int, loaded: int, said: str) -> None:
    asked = request(plug, prompt=[*range(20), *prompt_of(plug)])
    assert (count(plug, asked, cached) > 0) == bool(loaded)
    told = plug.scheduling.finished("asked")
    assert told is not None
    assert said in told["skills"]["why"]
    assert bool(said) == bool(told["skills"]["why"])


def test_vllm_may_take_fewer_tokens_than_it_was_offered(plug: Plugged) -> None:
    asked = request(plug)
    assert count(plug, asked, 4) > BLOCK
    plug.scheduling.allocated(asked, 4, BLOCK, BLOCKS)
    (load,) = plug.scheduling.drain()
    assert load.pieces == (Piece(plug.store.entry("refunds").key, Span(4, 4 + BLOCK), 4),)


def test_a_request_without_skills_is_left_alone(plug: Plugged, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.programmable_kv"):
        assert count(plug, request(plug, parameters=None, salt=None)) == 0
        assert count(plug, request(plug, parameters={"remote": 1}, salt="tenant")) == 0
        assert not caplog.records
        assert plug.scheduling.finished("asked") is None
        assert count(plug, request(plug, parameters=None)) == 0
    assert "it may read blocks that contain skills" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no salt": ({"salt": None}, "needs a cache_salt that begins with 'composed:'"),
    "the salt of plain requests": ({"salt": "tenant 7"}, "got 'tenant 7'"),
    "an adapter": ({"other": "the adapter french"}, "has the adapter french"),
    "no tokens": ({"prompt": None}, "has no tokens"),
    "an unknown skill": ({"parameters": {"skills": ["terms"]}}, "there is no skill called 'terms'"),
    "another order": ({"parameters": {"skills": ["returns", "refunds"]}}, "are not in the prompt"),
    "another text": ({"prompt": [1, 2, 3, 4, 5]}, "are not in the prompt"),
    "another place": ({"parameters": {"skills": [{"skill": "refunds", "start": 1}]}}, "token 0 of"),
    "no marks": ({"parameters": {"skills": 3}}, "Write kv_transfer_params="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_does_not_fit_is_computed_and_told_why(
    plug: Plugged, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    changes, said = REFUSED[name]
    asked = request(plug, **changes)
    with caplog.at_level(logging.WARNING, logger="vllm.programmable_kv"):
        assert count(plug, asked) == 0
    assert said in caplog.text
    assert len(caplog.records) == 1, "the reason is logged once"
    plug.scheduling.allocated(asked, 0, 0, BLOCKS)
    assert plug.scheduling.drain() == ()
    told = plug.scheduling.finished("asked")
    assert told is not None
    assert told["skills"]["tokens_loaded"] == 0
    assert said in told["skills"]["why"]


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    plug, _ = plugged(tmp_path)
    prompt = prompt_of(plug)
    key = plug.store.entry("refunds").key
    manifest = tmp_path / "store" / f"{key}.json"
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace("refund policy", "refund police"), encoding="utf-8"
    )
    asked = Request("asked", prompt, "composed:a", {"skills": [key]})
    assert plug.scheduling.matched(asked, 0) == 0
    told = plug.scheduling.finished("asked")
    assert told is not None
    assert "was damaged or changed by hand" in told["skills"]["why"]
