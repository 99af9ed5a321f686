"""The experiments, by name."""

from __future__ import annotations

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.experiments.attribution import ATTRIBUTION
from programmable_kv.lab.experiments.blast_radius import BLAST_RADIUS
from programmable_kv.lab.experiments.boundary import BOUNDARY
from programmable_kv.lab.experiments.conclusion import CONCLUSION
from programmable_kv.lab.experiments.diagnosis import DIAGNOSIS
from programmable_kv.lab.experiments.dissociation import DISSOCIATION
from programmable_kv.lab.experiments.dose import DOSE
from programmable_kv.lab.experiments.errata import ERRATA
from programmable_kv.lab.experiments.experiment import Experiment
from programmable_kv.lab.experiments.families import FAMILIES
from programmable_kv.lab.experiments.knock_out import KNOCK_OUT
from programmable_kv.lab.experiments.line_reads import LINE_READS
from programmable_kv.lab.experiments.locality import LOCALITY
from programmable_kv.lab.experiments.memory import MEMORY
from programmable_kv.lab.experiments.path_closure import PATH_CLOSURE
from programmable_kv.lab.experiments.prediction import PREDICTION
from programmable_kv.lab.experiments.prevention import PREVENTION
from programmable_kv.lab.experiments.reasoning import REASONING
from programmable_kv.lab.experiments.seam import SEAM
from programmable_kv.lab.experiments.sparse_features import SPARSE_FEATURES
from programmable_kv.lab.experiments.timing import TIMING
from programmable_kv.lab.experiments.where import WHERE

EXPERIMENTS = {
    each.name: each
    for each in (
        BLAST_RADIUS,
        LOCALITY,
        WHERE,
        KNOCK_OUT,
        DISSOCIATION,
        PREVENTION,
        PREDICTION,
        SEAM,
        BOUNDARY,
        ERRATA,
        LINE_READS,
        ATTRIBUTION,
        PATH_CLOSURE,
        CONCLUSION,
        SPARSE_FEATURES,
        TIMING,
        DOSE,
        REASONING,
        DIAGNOSIS,
        FAMILIES,
        MEMORY,
    )
}


def experiment(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        InvalidArgumentError: no experiment has this name.
    """
    if name not in EXPERIMENTS:
        raise InvalidArgumentError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
