"""The committed records were computed from the data that the code draws now, so new rows can be compared with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from leaves import leaves
from programmable_kv import records
from programmable_kv.bench import serve, serve_vllm, serve_vllm_decisions, vllm_splice
from programmable_kv.bench.agent import policies
from programmable_kv.demo.demo import VALUES, policy
from programmable_kv.lab import (
    adapter,
    blocks,
    by_design,
    edit_modes,
    lens_peer,
    long_readers,
    mentions,
    obedience,
    readers,
    stock_readers,
)
from programmable_kv.lab.composing.experiment import texts_of
from programmable_kv.lab.composing.suites.catalogue import Catalogue
from programmable_kv.lab.composing.suites.composing import Composing
from programmable_kv.lab.composing.suites.prefaces import Prefaces
from programmable_kv.lab.experiments import summaries
from programmable_kv.lab.experiments.cases import cases as experiment_cases
from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.lab.experiments.runs import summary_of
from programmable_kv.lab.statistics.many_tests import benjamini_hochberg
from programmable_kv.lab.toy.emergence import probed_policies
from programmable_kv.records import digest_of, read_record
from programmable_kv.scenarios.held_out import held_out_scenarios
from scripts.summarise_records import SUITES, records_of
from training import emergence as along_training

RESULTS = Path(__file__).parent.parent.parent / "results"


def scenario_texts(count: int, seed: int) -> Iterable[str]:
    return (scenario.text() for scenario in held_out_scenarios(count, seed))


def suite_texts(kind: type[Any], settings: dict[str, Any]) -> Iterable[str]:
    return texts_of(kind(**{each.name: settings[each.name] for each in fields(kind)}).groups())


DRAWN: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
    "adapter-held-out": lambda settings: scenario_texts(settings["scenarios"], adapter.SEED),
    "edit-modes": lambda settings: scenario_texts(settings["scenarios"], edit_modes.SEED),
    "readers": lambda settings: (case.text() for case in readers.cases(settings["count"])),
    "mentions": lambda settings: (case.text() for _, case in mentions.cases(settings["count"])),
    "long-readers": lambda settings: (case.text() for case in readers.cases(settings["count"], long_readers.KINDS)),
    "by-design-embedded": lambda settings: map(
        by_design._text, by_design.drawn(settings["count"], settings.get("policies"))
    ),
    "blocks": lambda settings: (case.text() for case in blocks.cases(settings["count"])),
    "blocks-qwen2-5-coder-1-5b-instruct-q4-k-m": lambda settings: (
        case.text() for case in blocks.cases(settings["count"], everyday=settings["everyday"])
    ),
    "agent": lambda settings: (scenario.text() for scenario in policies(settings["instances"])),
    "agent-long": lambda settings: (scenario.text() for scenario in policies(settings["instances"])),
    "serve": lambda settings: serve.texts(settings["sizes_kb"]),
    "serve-vllm": lambda settings: serve_vllm.texts(serve_vllm.policies_of(settings)),
    "serve-vllm-decisions": lambda settings: serve_vllm_decisions.texts(settings["count"]),
    "serve-vllm-skills": lambda settings: vllm_splice.texts(settings["lines"]),
    "vllm-splice": lambda settings: vllm_splice.texts(settings["lines"]),
    "vllm-splice-qwen2-5-coder-0-5b": lambda settings: vllm_splice.texts(settings["lines"]),
    "lens-peer": lambda settings: (case.text() for case in lens_peer.drawn(settings["count"])),
    "obedience": lambda settings: (each.text() for each in obedience.policies(settings["scenarios"])),
    "edit-ttft": lambda _: [policy(), *VALUES.values()],
    "compose-embedded": lambda settings: suite_texts(Composing, settings),
    "preface-embedded": lambda settings: suite_texts(Prefaces, settings),
    "emergence": lambda _: (str(policy.ids()) for policy in probed_policies()),
    "catalogue-embedded": lambda settings: suite_texts(Catalogue, settings),
}
# The records of the embedded model, of `embedded-plain`, or of both.
DRAWN = {
    name + of: draw
    for name, draw in DRAWN.items()
    for of in ("", "-plain", "-embedded-plain", "-design", "-readers")
    if (RESULTS / f"{name}{of}.json").exists()
}
for name, draw in (("along-adapter", experiment_cases), ("along-training", along_training.drawn)):
    for path in RESULTS.glob(f"{name}.json"):
        DRAWN[path.stem] = lambda settings, draw=draw: (case.text() for case in draw(settings["scenarios"]))  # type: ignore[misc]
for suite in ("stock-readers", "visibilities"):
    for path in RESULTS.glob(f"{suite}-*.json"):
        DRAWN[path.stem] = lambda settings: (case.text() for _, case in stock_readers.cases(settings["count"]))
for name in EXPERIMENTS:
    for path in RESULTS.glob(f"{name}*.json"):
        DRAWN[path.stem] = lambda settings, name=name: (  # type: ignore[misc]
            case.text()
            for _, case in EXPERIMENTS[name].cases(settings["scenarios"], everyday=settings.get("everyday", False))
        )


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_the_data_of_a_record_is_drawn_again(name: str) -> None:
    record = read_record(RESULTS / f"{name}.json")
    assert digest_of(DRAWN[name](record.settings)) == record.data_digest, (
        f"{name} was computed from other texts: raise the experiment's version and make the record again"
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (name, path)
        for name in sorted(EXPERIMENTS.keys() - {"attribution", "prediction"})
        for path in records_of(name, RESULTS)
    ],
    ids=lambda it: it.stem if isinstance(it, Path) else "",
)
def test_the_summary_of_a_record_follows_from_its_rows(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what is resampled: the intervals of means, and two experiments that would take long."""
    monkeypatch.setattr(summaries, "RESAMPLES", 2)
    record = read_record(path)
    again = _exact(summary_of(EXPERIMENTS[name], record.rows))
    assert again == pytest.approx(_exact(record.model_dump(mode="json")["summary"]))


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in SUITES for path in records_of(name, RESULTS)],
    ids=lambda it: it.stem if isinstance(it, Path) else "",
)
def test_the_summary_of_a_suite_follows_from_its_rows(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the intervals that are resampled, which take long."""
    monkeypatch.setattr(records, "RESAMPLES", 2)
    record = read_record(path)
    assert _exact(SUITES[name](record.rows)) == pytest.approx(_exact(record.model_dump(mode="json")["summary"]))


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_a_record(name: str) -> None:
    assert records_of(name, RESULTS)


def _exact(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary's figures by path, without the ends of intervals that are resampled."""
    found = dict(leaves(summary))
    resampled = {path.removesuffix("method") for path, value in found.items() if "bootstrap" in str(value)}
    ends = {interval + end for interval in resampled for end in ("low", "high")}
    return {path: value for path, value in found.items() if path not in ends}


@pytest.mark.parametrize("path", records_of("prediction", RESULTS), ids=lambda path: path.stem)
def test_the_tests_of_predictions_are_adjusted_for_each_other(path: Path) -> None:
    predicted: Any = read_record(path).summary["predicted"]
    tests = [kind for edit in predicted.values() for kind in edit.get("kinds", {}).values()]
    adjusted = benjamini_hochberg([test["p"] for test in tests])
    assert [test["p_adjusted"] for test in tests] == pytest.approx(adjusted)


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    longer = list(scenario_texts(5, 1))
    assert longer[:3] == list(scenario_texts(3, 1))
    assert longer != list(scenario_texts(5, 2))
