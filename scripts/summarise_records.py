"""Computes the summaries of the lab's records again from their rows: `python -m scripts.summarise_records`.

Run it after a change to the statistics. Rows, and all that is written about the run, stay as they are.
"""

from __future__ import annotations

from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.lab.experiments.runs import summary_of
from programmable_kv.records import read_record, results_folder, write_record


def main() -> None:
    """Write each record of an experiment in `results/` anew, and name those whose summary changed."""
    for name, experiment in EXPERIMENTS.items():
        for path in (results_folder() / f"{name}.json", *sorted(results_folder().glob(f"{name}-*.json"))):
            record = read_record(path)
            if record.version != experiment.version:
                print(
                    f"{path.name} is of version {record.version} of the experiment, not {experiment.version}: left as it is"
                )
                continue
            again = record.model_copy(update={"summary": summary_of(experiment, record.rows)})
            if again.model_dump(mode="json")["summary"] != record.model_dump(mode="json")["summary"]:
                write_record(again, path)
                print(path.name)


if __name__ == "__main__":
    main()
