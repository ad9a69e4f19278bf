"""Metrics of every phase over all releases, as one tidy table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmops_assets.release import Release
from llmops_assets.storage.columns import Columns, Result

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("release", "model", "phase", "metric", "value", "unit", "time")

# Where each metric comes from: asset, path into its facts, unit.
FACTS: tuple[tuple[str, str, str, tuple[str | int, ...], str], ...] = (
    ("develop", "loss", "evaluation", ("loss",), "nats per token"),
    ("develop", "perplexity", "evaluation", ("perplexity",), "1"),
    ("develop", "exact_match", "evaluation", ("exact_match",), "1"),
    ("build", "engine_exact_match", "engine_validation", ("exact_match",), "1"),
    ("build", "token_agreement", "engine_validation", ("token_agreement",), "1"),
    (
        "build",
        "tokens_per_second",
        "engine_validation",
        ("latency", "levels", 0, "output_token_throughput"),
        "1/s",
    ),
    # Of the last, which is the highest, concurrency.
    (
        "build",
        "tokens_per_second_under_load",
        "engine_validation",
        ("throughput", "levels", -1, "output_token_throughput"),
        "1/s",
    ),
    ("build", "validation_gpu_time", "engine_validation", ("gpu_seconds",), "s"),
    ("build", "engine_gpu_time", "engine", ("gpu_seconds",), "s"),
    ("deploy", "load_time", "production_candidate", ("load_seconds",), "s"),
    ("operate", "requests", "service_metrics", ("requests",), "1"),
    ("operate", "latency_p99", "service_metrics", ("latency_seconds", "p99"), "s"),
    ("operate", "gpu_utilisation", "service_metrics", ("gpu_utilisation",), "1"),
    ("retire", "archive_size", "archive", ("size",), "B"),
)
# Durations of the steps that ran tools; a reused result took no time of its own.
DURATIONS: tuple[tuple[str, str, str], ...] = (
    ("develop", "training_time", "checkpoint"),
    ("build", "convert_time", "converted_weights"),
    ("build", "build_time", "engine"),
    ("deploy", "staging_time", "staging_deployment"),
    ("deploy", "route_move_time", "production_deployment"),
)


def lifecycle_table(columns: Columns) -> pd.DataFrame:
    """One row a release and metric. A metric that a release does not have has no row."""
    import pandas as pd

    rows = [row for release in _releases(columns) for row in _rows(columns, release)]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": "float64"})


def _releases(columns: Columns) -> list[str]:
    return sorted({name.split("/")[1] for name, _ in columns.store.refs("releases")})


def _rows(columns: Columns, release: str) -> Iterator[dict[str, Any]]:
    results = columns.assets(release)

    def row(phase: str, metric: str, value: float, unit: str, result: Result) -> dict[str, Any]:
        return {
            "release": release,
            "model": Release.parse(release).model,
            "phase": phase,
            "metric": metric,
            "value": value,
            "unit": unit,
            "time": result.finished,
        }

    for phase, metric, asset, path, unit in FACTS:
        if asset in results and (value := _at(results[asset].facts, path)) is not None:
            yield row(phase, metric, value, unit, results[asset])
    for phase, metric, asset in DURATIONS:
        result = results.get(asset)
        if result is not None and result.reused_from is None:
            seconds = (result.finished - result.started).total_seconds()
            yield row(phase, metric, seconds, "s", result)
    for asset in ("engine", "packaged_model"):
        if asset in results:
            size = columns.store.describe(results[asset].artifact).size
            yield row("build", f"{asset}_size", size, "B", results[asset])


def _at(facts: Any, path: tuple[str | int, ...]) -> float | None:
    for part in path:
        try:
            facts = facts[part]
        except (KeyError, IndexError, TypeError):
            return None
    number = isinstance(facts, int | float) and not isinstance(facts, bool)
    return float(facts) if number else None
