"""Metrics decide gates, so they are checked against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from llmops_assets.develop.metrics import (
    SliceMetrics,
    is_exact_match,
    latency,
    measure,
    perplexity,
    with_times,
)
from llmops_assets.evidence.latency import LatencySummary, RequestTimes, summarize_in_process

TIMES = (
    RequestTimes.of(0.1, [0.2, 0.4], end_to_end=0.8),
    None,
    RequestTimes.of(0.3, [], end_to_end=0.4),
    None,
)


@pytest.fixture
def predictions() -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "slice": ["fr", "en", "en", "en"],
            "correct": [True, True, False, True],
            # Tokens differ, so a mean of the rows' means would be another number.
            "loss": [1.0, 2.0, 9.0, 0.0],
            "tokens": [1, 2, 2, 3],
        }
    )
    return with_times(table, TIMES)


def test_measure(predictions: pd.DataFrame) -> None:
    """Slices must be told apart, and the loss is per token, not per row."""
    metrics = measure(predictions)
    assert metrics.rows == 4
    assert metrics.exact_match == 0.75
    assert metrics.slices == {"en": SliceMetrics(3, 2 / 3), "fr": SliceMetrics(1, 1.0)}
    assert metrics.loss == pytest.approx(12 / 8)
    assert metrics.perplexity == pytest.approx(math.exp(1.5))
    level = metrics.latency.levels[0]
    assert (level.concurrency, level.requests, level.errors) == (1, 2, 0)
    assert level.end_to_end.p50 == pytest.approx(0.6)
    assert level.time_to_first_token.p50 == pytest.approx(0.2)
    # An answer of one token has no time between tokens, and must not count as 0.
    assert (level.inter_token_latency.n, level.inter_token_latency.mean) == (1, pytest.approx(0.3))
    assert level.output_token_throughput == pytest.approx((3 + 1) / (0.8 + 0.4))


def test_metrics_are_plain_json(predictions: pd.DataFrame) -> None:
    """NumPy's numbers look like Python's until a JSON encoder refuses them."""
    found = json.loads(json.dumps(measure(predictions).as_json(), allow_nan=False))
    assert found["slices"]["en"] == {"rows": 3, "exact_match": 2 / 3}
    assert LatencySummary.model_validate(found["latency"]) == measure(predictions).latency


def test_latency_is_judged_again_from_a_file(predictions: pd.DataFrame, tmp_path: Path) -> None:
    """Confidence and objective are policy: changing them must not need another measurement."""
    predictions.to_parquet(tmp_path / "predictions.parquet")
    read = pd.read_parquet(tmp_path / "predictions.parquet")
    measured = [request for request in TIMES if request is not None]
    assert latency(read, confidence=0.99) == summarize_in_process(measured, confidence=0.99)


def test_perplexity_of_a_broken_model_is_a_number() -> None:
    """Gates and MLflow take no infinity; a hopeless model must fail its gate, not crash."""
    assert perplexity(0.0) == 1.0
    assert math.isfinite(perplexity(5000.0))


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("2024-03-03", True), (" 2024-03-03\n", True), ("2024-03-0", False), ("2024-03-031", False)],
)
def test_exact_match_is_exact(prediction: str, right: bool) -> None:
    """A prefix of the answer is a wrong answer."""
    assert is_exact_match(prediction, "2024-03-03") is right
