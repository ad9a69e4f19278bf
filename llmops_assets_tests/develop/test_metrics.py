"""Metrics decide gates, so they are checked against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pandas as pd
import pytest

from llmops_assets.develop.metrics import SliceMetrics, is_exact_match, measure, perplexity


@pytest.fixture
def predictions() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "slice": ["fr", "en", "en", "en"],
            "correct": [True, True, False, True],
            # Tokens differ, so a mean of the rows' means would be another number.
            "loss": [1.0, 2.0, 9.0, 0.0],
            "tokens": [1, 2, 2, 3],
            "latency_seconds": [0.1, None, 0.3, None],
        }
    )


def test_measure(predictions: pd.DataFrame) -> None:
    """Slices must be told apart, and the loss is per token, not per row."""
    metrics = measure(predictions)
    assert metrics.rows == 4
    assert metrics.exact_match == 0.75
    assert metrics.slices == {"en": SliceMetrics(3, 2 / 3), "fr": SliceMetrics(1, 1.0)}
    assert metrics.loss == pytest.approx(12 / 8)
    assert metrics.perplexity == pytest.approx(math.exp(1.5))
    assert asdict(metrics.latency_seconds) == pytest.approx(
        {"p50": 0.2, "p95": 0.29, "p99": 0.298, "n": 2}
    )


def test_metrics_are_plain_json(predictions: pd.DataFrame) -> None:
    """NumPy's numbers look like Python's until a JSON encoder refuses them."""
    found = json.loads(json.dumps(measure(predictions).as_json(), allow_nan=False))
    assert found["slices"]["en"] == {"rows": 3, "exact_match": 2 / 3}
    assert set(found["latency_seconds"]) == {"p50", "p95", "p99", "n"}


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
