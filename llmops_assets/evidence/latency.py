"""How fast a model answers.

Figures mean what they mean in NVIDIA's AIPerf (its `docs/metrics-reference.md`):

- `time_to_first_token`: from sending a request to its first token.
- `inter_token_latency`: of one request, the time from its first to its last token, divided
  by the number of tokens after the first. Requests with one token have none.
- `end_to_end`: from sending a request to the end of its answer.
- `request_throughput`, `output_token_throughput`: what was answered, per second from the
  first request to the end of the last answer.
- `goodput`: requests per second that kept every bound of an objective.

All times are seconds. Where a request got no answer, it has no times: figures are of the
answered ones. Bounds of percentiles are not: there a failed request was slower than any
other, so nobody gets faster by failing. `latency_judgement` decides by them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from llmops_assets.errors import DataError
from llmops_assets.evidence.statistics import Estimate, Record, proportion
from llmops_assets.serving.load import ClientOverhead, LoadResult
from llmops_assets.spec import SHARES, LatencyObjective, Percentile

CONFIDENCE = 0.95
MOST_REASONS = 5


@dataclass(frozen=True)
class RequestTimes:
    """One answered request, seconds; `inter_token_latency` is None with a single token."""

    time_to_first_token: float
    inter_token_latency: float | None
    end_to_end: float
    output_tokens: int

    @classmethod
    def of(
        cls,
        time_to_first_token: float,
        inter_token_latencies: Sequence[float],
        end_to_end: float,
        output_tokens: int | None = None,
    ) -> RequestTimes:
        """From the latency of each token after the first."""
        tokens = len(inter_token_latencies)
        return cls(
            time_to_first_token=time_to_first_token,
            inter_token_latency=math.fsum(inter_token_latencies) / tokens if tokens else None,
            end_to_end=end_to_end,
            output_tokens=tokens + 1 if output_tokens is None else output_tokens,
        )


class Bounds(Record):
    """Where a percentile lies, at a confidence: between two of the measured values.

    A distribution-free interval from order statistics (Conover, Practical Nonparametric
    Statistics, 1999, section 3.2), over all requests; failed ones are slower than any.
    It supposes that requests do not depend on each other, which queueing breaks somewhat.
    """

    low: float | None = Field(description="None: a failed request, so above any bound.")
    high: float | None = Field(description="None: too few requests, or a failed one.")


class Distribution(Record):
    """Percentiles of answered requests, seconds, by linear interpolation.

    (`numpy.percentile`, method `linear`, number 7 of Hyndman and Fan 1996.)
    """

    n: int = Field(ge=0)
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    too_few_requests: tuple[Percentile, ...] = Field(
        description="Percentiles without a value: n is below 1 / (1 - share), so there is no "
        "request beyond them."
    )
    bounds: dict[Percentile, Bounds]


class Goodput(Record):
    """Requests that kept an objective."""

    objective: LatencyObjective
    requests_per_second: float
    share: Estimate = Field(description="Of all requests, failed ones included.")


class ConcurrencyLevel(Record):
    """What was measured with so many requests under way at once."""

    concurrency: int = Field(ge=1)
    requests: int = Field(ge=0, description="Measured ones, failed ones included.")
    errors: int = Field(ge=0)
    error_reasons: dict[str, int] = Field(description="The most frequent ones.")
    duration: float = Field(ge=0, description="Seconds.")
    time_to_first_token: Distribution
    inter_token_latency: Distribution
    end_to_end: Distribution
    request_throughput: float = Field(description="Answered requests per second.")
    output_token_throughput: float = Field(description="Tokens of answered requests per second.")
    goodput: Goodput | None = Field(description="None without an objective.")
    client: ClientOverhead | None = Field(description="How late the client was, where known.")


class LatencySummary(Record):
    """Every level that was measured."""

    source: Literal["built-in", "aiperf", "in-process"]
    confidence: float = Field(gt=0, lt=1, description="Of all bounds and intervals.")
    levels: tuple[ConcurrencyLevel, ...]

    def at(self, concurrency: int) -> ConcurrencyLevel | None:
        """The level of a concurrency; None if it was not measured."""
        return next((level for level in self.levels if level.concurrency == concurrency), None)


def summarize(
    results: Iterable[LoadResult],
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
) -> LatencySummary:
    """What the built-in load generator measured, one result per concurrency.

    Raises:
        DataError: two results are of the same concurrency.
    """
    return LatencySummary(
        source="built-in",
        confidence=confidence,
        levels=_distinct(
            level(
                result.concurrency,
                [
                    RequestTimes.of(
                        # An answer without any token is there when it ends.
                        request.end_to_end
                        if request.time_to_first_token is None
                        else request.time_to_first_token,
                        request.inter_token_latencies,
                        request.end_to_end,
                        request.output_tokens,
                    )
                    for request in result.requests
                    if request.error is None
                ],
                [request.error for request in result.requests if request.error is not None],
                duration=result.duration,
                objective=objective,
                confidence=confidence,
                client=result.client,
            )
            for result in results
        ),
    )


def summarize_in_process(
    requests: Sequence[RequestTimes],
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
) -> LatencySummary:
    """What was measured without a server, one prompt after the other."""
    return LatencySummary(
        source="in-process",
        confidence=confidence,
        levels=(
            level(
                1,
                requests,
                duration=math.fsum(request.end_to_end for request in requests),
                objective=objective,
                confidence=confidence,
            ),
        ),
    )


def level(
    concurrency: int,
    answered: Sequence[RequestTimes],
    errors: Sequence[str] = (),
    *,
    duration: float,
    objective: LatencyObjective | None = None,
    confidence: float = CONFIDENCE,
    client: ClientOverhead | None = None,
) -> ConcurrencyLevel:
    """The figures of one concurrency.

    Args:
        concurrency: requests under way at once.
        answered: the requests with a whole answer.
        errors: why each of the others has none.
        duration: seconds from the first request to the end of the last answer.
        objective: what a request must keep to count as good.
        confidence: of bounds and intervals, as 0.95.
        client: how late the client was.
    """
    failed = len(errors)
    good = sum(kept(request, objective) for request in answered) if objective else 0
    latencies = [request.inter_token_latency for request in answered]
    return ConcurrencyLevel(
        concurrency=concurrency,
        requests=len(answered) + failed,
        errors=failed,
        error_reasons=dict(Counter(errors).most_common(MOST_REASONS)),
        duration=duration,
        time_to_first_token=_distribution(
            [request.time_to_first_token for request in answered], failed, confidence
        ),
        inter_token_latency=_distribution(
            [latency for latency in latencies if latency is not None], failed, confidence
        ),
        end_to_end=_distribution([request.end_to_end for request in answered], failed, confidence),
        request_throughput=_per_second(len(answered), duration),
        output_token_throughput=_per_second(
            sum(request.output_tokens for request in answered), duration
        ),
        goodput=objective
        and Goodput(
            objective=objective,
            requests_per_second=_per_second(good, duration),
            share=proportion(good, len(answered) + failed, confidence),
        ),
        client=client,
    )


def kept(request: RequestTimes, objective: LatencyObjective) -> bool:
    """Whether a request kept every bound; one without a second token keeps that on them."""
    return (
        _within(request.time_to_first_token, objective.time_to_first_token)
        and _within(request.inter_token_latency, objective.inter_token_latency)
        and _within(request.end_to_end, objective.end_to_end)
    )


def _distribution(values: Sequence[float], failed: int, confidence: float) -> Distribution:
    import numpy as np

    n = len(values)
    found: dict[Percentile, float | None] = {
        name: float(np.percentile(values, 100 * share)) if n * (1 - share) >= 1 - 1e-9 else None
        for name, share in SHARES.items()
    }
    return Distribution(
        n=n,
        mean=float(np.mean(values)) if n else None,
        p50=found["p50"],
        p95=found["p95"],
        p99=found["p99"],
        too_few_requests=tuple(name for name, value in found.items() if value is None),
        bounds=_bounds([*values, *[math.inf] * failed], confidence),
    )


def _bounds(values: Sequence[float], confidence: float) -> dict[Percentile, Bounds]:
    """Bounds of each percentile; what no request bounds from below is at least 0."""
    from scipy.stats import quantile_test

    if not values:
        return {}
    found: dict[Percentile, Bounds] = {}
    for name, share in SHARES.items():
        interval = quantile_test(values, p=share).confidence_interval(confidence)
        # NaN where no order statistic is far enough out, infinity where a failed request is.
        low, high = float(interval.low), float(interval.high)
        found[name] = Bounds(
            low=None if math.isinf(low) else 0.0 if math.isnan(low) else low,
            high=high if math.isfinite(high) else None,
        )
    return found


def _within(seconds: float | None, bound: float | None) -> bool:
    return seconds is None or bound is None or seconds <= bound


def _per_second(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


def _distinct(levels: Iterable[ConcurrencyLevel]) -> tuple[ConcurrencyLevel, ...]:
    found = tuple(levels)
    concurrencies = [level.concurrency for level in found]
    if len(set(concurrencies)) < len(concurrencies):
        raise DataError(
            "A concurrency was measured twice",
            expected="one result per concurrency",
            found=f"concurrencies {concurrencies}",
            cure="summarize one measurement at a time",
        )
    return found
