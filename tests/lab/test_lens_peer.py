"""The lab's probes against TransformerLens, if it is installed; the error if it is not; and the summary."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from conftest import tiny
from programmable_kv.errors import MissingExtraError
from programmable_kv.lab import lens_peer
from programmable_kv.lab.experiments.pair import Pair, pair_of

ROW: dict[str, Any] = {
    "tokens": 100, "later": 80, "moved": 1.0,
    "apart": {"patch": 1e-5, "knock_out": 2e-5, "lens": 3e-5},
    "seconds": {
        "patch": {"ours": 0.01, "ours_alone": 0.1, "theirs": 1.0},
        "knock_out": {"ours": 0.01, "theirs": 1.0},
        "lens": {"ours": 0.5, "theirs": 1.0},
    },
}  # fmt: skip


def test_times_are_compared_by_their_means_and_distances_by_the_largest() -> None:
    slower: Any = {**ROW, "seconds": {**ROW["seconds"], "lens": {"ours": 0.5, "theirs": 3.0}}}
    found = lens_peer.summary([ROW, slower])
    assert found["theirs_over_ours"] == {"patch": 100, "knock_out": 100, "lens": 4, "patch_alone": 10}
    assert found["milliseconds"]["lens"] == {"ours": 500, "theirs": 2000}
    assert found["equal"] == 1.0
    far: Any = {**ROW, "apart": {**ROW["apart"], "lens": 2e-4}}
    assert lens_peer.summary([ROW, far])["equal"] == 0.0
    assert lens_peer.summary([]) == {"policies": 0, "apart": {}, "milliseconds": {}, "theirs_over_ours": {}}


@pytest.mark.skipif(find_spec("transformer_lens") is not None, reason="TransformerLens is installed")
def test_without_it_the_command_says_how_to_install_it() -> None:
    with pytest.raises(MissingExtraError, match="pip install transformer-lens"):
        lens_peer.Peer.of(tiny(max_position_embeddings=8192))


def test_both_find_the_same() -> None:
    pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: an optional check")
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in lens_peer.drawn(64))
    pair = next(pair for pair in found if isinstance(pair, Pair))
    row = lens_peer.measured(pair, lens_peer.Peer.of(model))
    assert max(row["apart"].values()) < lens_peer.WITHIN
    assert row["moved"] > 10 * max(row["apart"].values())
