"""Computes summaries of the lab's records again from their rows: `python -m scripts.summarise_records`.

Run it after a change to the statistics. Rows, and all that is written about the run, stay as they are. It also writes
the figures of `embedded-plain` that ship with its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from programmable_kv.lab import adapter, by_design, edit_modes, long_readers, obedience, readers
from programmable_kv.lab.composing import experiment as composing
from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.lab.experiments.runs import summary_of
from programmable_kv.models.fetch import adapter_folder
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import Record, read_record, results_folder, write_record

Summarise = Callable[[list[dict[str, Any]]], dict[str, Any]]

SUITES: dict[str, Summarise] = {
    "adapter-held-out": adapter.summarise,
    "by-design": by_design.summarise,
    "catalogue": composing.summarise,
    "compose": composing.summarise,
    "edit-modes": edit_modes.summarise,
    "long-readers": long_readers.summarise,
    "obedience": obedience.summarise,
    "preface": composing.summarise,
    "readers": readers.summarise,
}
"""Suites that are not experiments of `pkv lab run`, and how each summarises its rows."""


def records_of(name: str, folder: Path) -> list[Path]:
    """The records of an experiment or a suite, on all models."""
    return sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")])


def _summarised(folder: Path) -> Iterator[tuple[Path, Record, Summarise]]:
    for name, experiment in EXPERIMENTS.items():
        for path in records_of(name, folder):
            record = read_record(path)
            if record.version == experiment.version:
                yield path, record, partial(summary_of, experiment)
            else:
                print(f"{path.name} is of another version of the experiment: left as it is")
    for name, summarise in SUITES.items():
        yield from ((path, read_record(path), summarise) for path in records_of(name, folder))


def main() -> None:
    """Write each record whose summary changes anew, and name it."""
    for path, record, summarise in _summarised(results_folder()):
        again = record.model_copy(update={"summary": summarise(record.rows)})
        if again.model_dump(mode="json")["summary"] != record.model_dump(mode="json")["summary"]:
            write_record(again, path)
            print(path.name)
    plain = read_record(results_folder() / "adapter-held-out-embedded-plain.json")
    adapter.attach_figures(adapter_folder(EMBEDDED_PLAIN), plain)


if __name__ == "__main__":
    main()
