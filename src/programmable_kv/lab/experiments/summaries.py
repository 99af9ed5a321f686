"""Turns rows into figures: means and shares with intervals that allow for domains, and the effect of an arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any, TypeVar

from programmable_kv.records import Interval, cluster_bootstrap, clustered_wilson

Row = dict[str, Any]
Value = Callable[[Row], float | None]
Found = TypeVar("Found", bound=float)

RESAMPLES = 4000


def mean_by_domain(rows: Sequence[Row], value: Value) -> dict[str, Any]:
    """The mean of a value over the rows that have it, with an interval that resamples domains.

    If all values are True or False, it is their `share`.
    """
    clusters = _by_domain(rows, value)
    values = [each for cluster in clusters for each in cluster]
    if not values:
        return Interval(value=0.0, low=0.0, high=0.0, n=0, method="none").model_dump()
    if all(isinstance(each, bool) for each in values):
        return clustered_wilson([[bool(each) for each in cluster] for cluster in clusters]).model_dump()
    if len(clusters) < 2:
        mean = fmean(values)
        return Interval(value=mean, low=mean, high=mean, n=len(values), method="none").model_dump()
    return cluster_bootstrap(clusters, resamples=RESAMPLES).model_dump()


def share(rows: Sequence[Row], holds: Callable[[Row], bool | None]) -> dict[str, Any]:
    """The share of rows for which something holds, without the rows that give None. The interval allows for domains."""
    clusters = _by_domain(rows, holds)
    if not clusters:
        return Interval(value=0.0, low=0.0, high=1.0, n=0, method="none").model_dump()
    return clustered_wilson(clusters).model_dump()


def share_true(rows: Sequence[Row], truths: Sequence[bool | None]) -> dict[str, Any]:
    """The share of rows whose entry in `truths` is True, as `share` gives it."""
    paired = [{"domain": row["domain"], "truth": truth} for row, truth in zip(rows, truths, strict=True)]
    return share(paired, itemgetter("truth"))


def _by_domain(rows: Sequence[Row], value: Callable[[Row], Found | None]) -> list[list[Found]]:
    """The values that are not None, in a list for each domain."""
    clusters: dict[str, list[Found]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            clusters.setdefault(row["domain"], []).append(found)
    return list(clusters.values())


def arm(rows: Sequence[Row], gap: Value) -> dict[str, Any]:
    """An arm's effect: recovery (0 is the stale decision, 1 the fresh one), decisions flipped, and nats moved.

    `gap` is a row's gap after the arm's intervention, of the new value's action over the old one's. The rows' `old_gap`
    and `new_gap` are those of the two full prefills.
    """

    def recovered(row: Row) -> float | None:
        found, span = gap(row), row["new_gap"] - row["old_gap"]
        return None if found is None or not row["valid"] else (found - row["old_gap"]) / span

    def flipped(row: Row) -> bool | None:
        found = gap(row)
        return None if found is None else found > 0

    return {"recovery": mean_by_domain(rows, recovered), "flipped": share(rows, flipped), "moved": moved(rows, gap)}


def moved(rows: Sequence[Row], gap: Value) -> dict[str, Any]:
    """The mean distance in nats of the gap from the stale context's gap."""

    def nats(row: Row) -> float | None:
        found = gap(row)
        return None if found is None else abs(found - row["old_gap"])

    return mean_by_domain(rows, nats)


def at(path: str) -> Value:
    """A function that reads the number at a dotted path of a row; None if the row has none."""

    def value(row: Row) -> float | None:
        found: Any = row
        for key in path.split("."):
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        return found if isinstance(found, bool) else None if found is None else float(found)

    return value


def nested(rows: Sequence[Row], path: str) -> dict[str, Any]:
    """The means by domain of every number below a dotted path, in the same shape. List entries are keyed by index."""
    leaves = dict.fromkeys(leaf for row in rows for leaf in _leaves(_found(row, path.split("."))))
    shaped: dict[str, Any] = {}
    for leaf in leaves:
        inner = shaped
        for key in leaf[:-1]:
            inner = inner.setdefault(key, {})
        inner[leaf[-1]] = mean_by_domain(rows, partial(_number, (*path.split("."), *leaf)))
    return shaped


def _number(keys: Sequence[str], row: Row) -> float | None:
    found = _found(row, keys)
    return found if isinstance(found, bool) else None if found is None else float(found)


def _found(row: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(row, list):
            row = row[int(key)] if int(key) < len(row) else None
        else:
            row = row.get(key) if isinstance(row, Mapping) else None
    return row


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        if isinstance(each, Mapping | list):
            yield from ((str(key), *leaf) for leaf in _leaves(each))
        elif isinstance(each, int | float):
            yield (str(key),)


def rounded(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Round numbers as rows store them."""
    return {key: None if value is None else round(value, 4) for key, value in values.items()}
