"""Latency figures and their intervals."""

from __future__ import annotations

import json
import math
import random

import pytest

from llmops_assets.errors import DataError
from llmops_assets.evidence import latency
from llmops_assets.evidence.latency import LatencySummary, RequestTimes
from llmops_assets.spec import LatencyObjective


def times(*seconds: float) -> list[RequestTimes]:
    """Requests that took so long; first token after half, 5 tokens."""
    return [RequestTimes.of(s / 2, [s / 8] * 4, s) for s in seconds]


def summary(requests: list[RequestTimes], errors: int = 0) -> LatencySummary:
    level = latency.level(4, requests, ["status 503"] * errors, duration=10.0)
    return LatencySummary(source="built-in", confidence=0.95, levels=(level,))


def test_percentiles_are_numpys() -> None:
    """Figures are compared with AIPerf's, which interpolates linearly, too."""
    requests = times(*[float(n) for n in range(1, 102)])
    random.Random(0).shuffle(requests)
    found = summary(requests).levels[0]
    assert (found.end_to_end.p50, found.end_to_end.p95) == (51.0, 96.0)
    assert found.end_to_end.p99 == pytest.approx(100.0)
    assert (found.end_to_end.mean, found.end_to_end.n) == (51.0, 101)
    assert found.time_to_first_token.p50 == pytest.approx(25.5)
    assert found.inter_token_latency.p95 == pytest.approx(12.0)
    assert found.end_to_end.too_few_requests == ()
    assert found.request_throughput == pytest.approx(10.1)
    assert found.output_token_throughput == pytest.approx(50.5)


@pytest.mark.parametrize(
    ("n", "missing"),
    [
        (0, ("p50", "p95", "p99")),
        (1, ("p50", "p95", "p99")),
        (2, ("p95", "p99")),
        (19, ("p95", "p99")),
        (20, ("p99",)),
        (99, ("p99",)),
        (100, ()),
    ],
)
def test_percentile_beyond_all_requests_is_marked(n: int, missing: tuple[str, ...]) -> None:
    """The p99 of 20 requests is their slowest by another name."""
    found = summary(times(*[1.0] * n)).levels[0].end_to_end
    assert found.too_few_requests == missing
    for name in ("p50", "p95", "p99"):
        assert (getattr(found, name) is None) == (name in missing)


def test_goodput_counts_requests_that_keep_every_bound() -> None:
    """One bound that is not asked of, and slow answers are good ones."""
    objective = LatencyObjective(time_to_first_token=1.0, inter_token_latency=0.1, end_to_end=2.0)
    answered = [
        RequestTimes.of(1.0, [0.1, 0.1], 2.0),  # on the bounds is within them
        RequestTimes.of(1.1, [0.1], 1.9),
        RequestTimes.of(0.5, [0.05, 0.25], 1.0),
        RequestTimes.of(0.5, [0.1], 2.1),
        RequestTimes.of(0.5, [], 0.5),  # a single token has nothing between tokens
    ]
    level = latency.level(2, answered, ["refused"] * 5, duration=4.0, objective=objective)
    assert level.goodput is not None
    assert level.goodput.requests_per_second == pytest.approx(0.5)
    assert (level.goodput.share.value, level.goodput.share.n) == (0.2, 10)
    assert level.inter_token_latency.n == 4
    assert level.error_reasons == {"refused": 5}
    assert summary(answered).levels[0].goodput is None


def test_interval_holds_the_true_percentile() -> None:
    """The confidence that verdicts state is the one they have."""
    generator = random.Random(0)
    true = -math.log(1 - 0.95)
    runs = 150
    held = 0
    for _ in range(runs):
        requests = [generator.expovariate(1.0) for _ in range(100)]
        bounds = latency._bounds(requests, 0.95)["p95"]
        assert bounds.low is not None
        assert bounds.high is not None
        held += bounds.low <= true <= bounds.high
    assert held >= 0.92 * runs


def test_in_process_measurements_have_the_same_keys() -> None:
    """Engine validation asks one prompt after the other; its time is what the answers took."""
    found = latency.summarize_in_process(times(*[0.5] * 20), LatencyObjective(end_to_end=1.0))
    level = found.at(1)
    assert level is not None
    assert level.duration == pytest.approx(10.0)
    assert level.request_throughput == pytest.approx(2.0)
    assert level.output_token_throughput == pytest.approx(10.0)
    assert level.goodput is not None
    assert level.goodput.requests_per_second == pytest.approx(2.0)
    text = json.dumps(found.model_dump(mode="json"), allow_nan=False)
    assert LatencySummary.model_validate_json(text) == found


def test_same_concurrency_twice_is_refused() -> None:
    """Which of the two would a bound be judged by?"""
    from datetime import UTC, datetime

    from llmops_assets.serving.load import ClientOverhead, LoadResult

    result = LoadResult(
        url="u", model="m", concurrency=1, max_tokens=1, warm_up=0, seed=0,
        time=datetime.now(UTC), duration=1.0, requests=(),
        client=ClientOverhead(delay_p50=0, delay_p99=0, cpu_share=0),
    )  # fmt: skip
    with pytest.raises(DataError, match="twice"):
        latency.summarize([result, result])
