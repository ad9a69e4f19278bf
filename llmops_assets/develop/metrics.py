"""What a table of predictions says of a model; the same for a checkpoint and its engine.

A table of predictions is a pandas `DataFrame` with these columns:

- `prompt`, `completion`, `slice`: the evaluation data's row.
- `prediction`: the answer, text.
- `correct`: whether the answer is the completion.
- `loss`: negative log-likelihood of the completion and its end token, summed, nats.
- `tokens`: how many tokens that sum is over.
- `latency_seconds`: of this prompt answered alone; null where it was not measured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

PREDICTION_COLUMNS = (
    "prompt", "completion", "slice", "prediction", "correct", "loss", "tokens", "latency_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class SliceMetrics:
    """One slice: how many rows, and the share of them answered exactly right."""

    rows: int
    exact_match: float


@dataclass(frozen=True)
class Latency:
    """Percentiles of `n` measurements, seconds."""

    p50: float
    p95: float
    p99: float
    n: int


@dataclass(frozen=True)
class Metrics:
    """Everything that gates ask of a model.

    `exact_match` is a share of 1, `loss` the mean negative log-likelihood per token of
    the completions (nats), `perplexity` its exponential.
    """

    rows: int
    exact_match: float
    slices: dict[str, SliceMetrics]
    loss: float
    perplexity: float
    latency_seconds: Latency

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def is_exact_match(prediction: str, completion: str) -> bool:
    """Whether an answer is right: equal but for white space around it."""
    return prediction.strip() == completion.strip()


def measure(predictions: pd.DataFrame) -> Metrics:
    """All metrics of a table of predictions, which must have rows and measured latencies."""
    loss = mean_loss(predictions)
    return Metrics(
        rows=len(predictions),
        exact_match=exact_match(predictions),
        slices=slice_metrics(predictions),
        loss=loss,
        perplexity=perplexity(loss),
        latency_seconds=latency(predictions["latency_seconds"]),
    )


def exact_match(predictions: pd.DataFrame) -> float:
    """Share of rows answered exactly right."""
    return float(predictions["correct"].mean())


def slice_metrics(predictions: pd.DataFrame) -> dict[str, SliceMetrics]:
    """Exact match of each slice, by the slice's name."""
    return {
        str(name): SliceMetrics(rows=len(rows), exact_match=exact_match(rows))
        for name, rows in predictions.groupby("slice", sort=True)
    }


def mean_loss(predictions: pd.DataFrame) -> float:
    """Mean negative log-likelihood per token, nats."""
    return float(predictions["loss"].sum() / predictions["tokens"].sum())


def perplexity(loss: float) -> float:
    """Exponential of a mean loss, which is capped at 700 nats to stay a finite number."""
    return math.exp(min(loss, 700.0))


def latency(seconds: pd.Series) -> Latency:
    """Percentiles of the measured values (linear interpolation); nulls are left out."""
    measured = seconds.dropna()
    p50, p95, p99 = (float(measured.quantile(share)) for share in (0.50, 0.95, 0.99))
    return Latency(p50=p50, p95=p95, p99=p99, n=len(measured))
