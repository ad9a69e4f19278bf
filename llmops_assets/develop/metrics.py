"""What a table of predictions says of a model; the same for a checkpoint and its engine.

A table of predictions is a pandas `DataFrame` with these columns:

- `prompt`, `completion`, `slice`: the evaluation data's row.
- `prediction`: the answer, text.
- `correct`: whether the answer is the completion.
- `loss`: negative log-likelihood of the completion and its end token, summed, nats.
- `tokens`: how many tokens that sum is over.
- `latency_seconds`: from this prompt's text to the end of its answer, answered alone; null
  where it was not measured.

and, for rows where that was measured, else null:

- `time_to_first_token_seconds`, `inter_token_latency_seconds`: see `evidence.latency`.
- `output_tokens`: tokens of the answer, its end token included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmops_assets.evidence.latency import (
    CONFIDENCE,
    LatencySummary,
    RequestTimes,
    summarize_in_process,
)

if TYPE_CHECKING:
    import pandas as pd

    from llmops_assets.spec import LatencyObjective

PREDICTION_COLUMNS = (
    "prompt", "completion", "slice", "prediction", "correct", "loss", "tokens", "latency_seconds",
)  # fmt: skip
TIME_COLUMNS = ("time_to_first_token_seconds", "inter_token_latency_seconds", "output_tokens")


@dataclass(frozen=True)
class SliceMetrics:
    """One slice: how many rows, and the share of them answered exactly right."""

    rows: int
    exact_match: float


@dataclass(frozen=True)
class Metrics:
    """What a table of predictions says, without the intervals that gates judge by.

    `exact_match` is a share of 1, `loss` the mean negative log-likelihood per token of
    the completions (nats), `perplexity` its exponential.
    """

    rows: int
    exact_match: float
    slices: dict[str, SliceMetrics]
    loss: float
    perplexity: float
    latency: LatencySummary

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; null for a loss or perplexity that is not a finite number."""
        likelihood = {"loss": finite(self.loss), "perplexity": finite(self.perplexity)}
        return {**asdict(self), **likelihood, "latency": self.latency.model_dump(mode="json")}


def finite(value: float) -> float | None:
    """The value, or None for what JSON has no number for: a diverged model's NaN."""
    return value if math.isfinite(value) else None


def is_exact_match(prediction: str, completion: str) -> bool:
    """Whether an answer is right: equal but for white space around it."""
    return prediction.strip() == completion.strip()


def measure(predictions: pd.DataFrame) -> Metrics:
    """All metrics of a table of predictions, which must have rows."""
    loss = mean_loss(predictions)
    return Metrics(
        rows=len(predictions),
        exact_match=exact_match(predictions),
        slices=slice_metrics(predictions),
        loss=loss,
        perplexity=perplexity(loss),
        latency=latency(predictions),
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


def latency(
    predictions: pd.DataFrame,
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
) -> LatencySummary:
    """How fast the measured rows were answered, one after the other."""
    measured = predictions[predictions["latency_seconds"].notna()]
    columns = (*TIME_COLUMNS, "latency_seconds")
    return summarize_in_process(
        [
            RequestTimes(
                time_to_first_token=float(first),
                # Null where the answer was a single token.
                inter_token_latency=None if math.isnan(between) else float(between),
                end_to_end=float(whole),
                output_tokens=int(tokens),
            )
            for first, between, tokens, whole in measured[list(columns)].itertuples(index=False)
        ],
        objective,
        confidence,
    )


def with_times(predictions: pd.DataFrame, times: Sequence[RequestTimes | None]) -> pd.DataFrame:
    """The table with `latency_seconds` and the columns of times.

    Args:
        times: of each row; None where they were not measured.
    """
    import pandas as pd

    columns = (
        pd.DataFrame(
            [
                (None,) * 4
                if request is None
                else (
                    request.end_to_end,
                    request.time_to_first_token,
                    request.inter_token_latency,
                    request.output_tokens,
                )
                for request in times
            ],
            columns=["latency_seconds", *TIME_COLUMNS],
            index=predictions.index,
        )
        .astype("float64")
        .astype({"output_tokens": "Int64"})
    )
    return pd.concat([predictions, columns], axis="columns")
