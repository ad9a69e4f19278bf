"""Whether measured latency keeps what a spec asks for: before the build, after it, in staging.

A bound is judged by the interval of its percentile, in which failed requests were slower
than any bound, and goodput by Wilson's interval of its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from llmops_assets.errors import DataError
from llmops_assets.evidence.latency import (
    Bounds,
    ConcurrencyLevel,
    Distribution,
    LatencySummary,
)
from llmops_assets.evidence.statistics import Decision, Interval, decide_at_least
from llmops_assets.evidence.verdicts import Finding, Judgement
from llmops_assets.spec import LatencyBound, LatencyObjective, requests_needed

METHOD = "order statistics"
MOST_TIMES_MORE = 100
"""What would take more than so many times the requests is not decided by more of them."""
NOTABLE_DELAY = 0.1
"""Share of a bound from which on a late client is worth a word."""


@dataclass(frozen=True)
class _Judged:
    """A finding, and what would decide it where it is undecided."""

    finding: Finding
    remedy: str | None = None


def judge_latency(
    summary: LatencySummary,
    bounds: Sequence[LatencyBound],
    *,
    confidence: float,
    objective: LatencyObjective | None = None,
    goodput: float | None = None,
) -> Judgement:
    """Every bound is kept, and at every measured concurrency enough requests are good.

    Args:
        summary: what was measured.
        bounds: of one phase, such as `gates.latency.staging`.
        confidence: of the spec's gates; what was measured must have at least this.
        objective: what makes a request good.
        goodput: the least share of good requests; None to ask for none.

    Raises:
        DataError: it was measured at a lower confidence, or for another objective.
    """
    _check(summary, confidence, objective, goodput)
    judged = [_judge_bound(summary, bound) for bound in bounds]
    if goodput is not None:
        judged += [_judge_goodput(level, goodput, summary.confidence) for level in summary.levels]
    findings = tuple(one.finding for one in judged)
    decision = Decision.all_of(finding.decision for finding in findings)
    told = [finding for finding in findings if finding.decision is not Decision.PASSED]
    return Judgement(
        decision=decision,
        measured={finding.metric: finding.value for finding in findings},
        threshold={finding.metric: finding.threshold for finding in findings},
        reason="; ".join(f"{finding.metric} {finding.note}" for finding in told)
        or "; ".join(
            f"{finding.metric} is {finding.value:.4g} over {finding.n} requests, "
            f"{finding.threshold} is asked"
            for finding in findings
        ),
        findings=findings,
        advice=_advice(summary, judged) if decision is Decision.UNDECIDED else None,
    )


def _check(
    summary: LatencySummary,
    confidence: float,
    objective: LatencyObjective | None,
    goodput: float | None,
) -> None:
    if summary.confidence < confidence:
        raise _measured_otherwise(
            f"intervals of {_percent(confidence)} confidence or more",
            f"intervals of {_percent(summary.confidence)}",
        )
    for level in summary.levels if goodput is not None else ():
        measured = None if level.goodput is None else level.goodput.objective
        if measured is None or measured != objective:
            raise _measured_otherwise(f"goodput under {objective}", f"goodput under {measured}")


def _measured_otherwise(expected: str, found: str) -> DataError:
    return DataError(
        "The latency was not measured as the spec asks for",
        expected=expected,
        found=found,
        cure="make a new release, so that it is measured again",
    )


def _judge_bound(summary: LatencySummary, bound: LatencyBound) -> _Judged:
    metric = f"{bound.percentile} of {bound.measure} at concurrency {bound.concurrency}"
    asked = f"at most {bound.at_most:.4g} s"
    measured = summary.at(bound.concurrency)
    if measured is None:
        return _Judged(
            Finding(
                metric=metric, value=None, n=0, threshold=asked, decision=Decision.UNDECIDED,
                note=f"was not measured, and {asked} is asked",
            ),
            f"measure at concurrency {bound.concurrency}",
        )  # fmt: skip
    distribution: Distribution = getattr(measured, bound.measure)
    limits = distribution.bounds.get(bound.percentile)
    n = distribution.n + measured.errors
    decision = _decide(limits, bound.at_most)
    note = (
        f"is {_in_words(limits)} at {_percent(summary.confidence)} confidence over {n} requests, "
        f"{measured.errors} of them failed, and {asked} is asked"
    )
    late = 0.0 if measured.client is None else measured.client.delay_p99
    if decision is not Decision.PASSED and late > NOTABLE_DELAY * bound.at_most:
        note += f" (on this busy machine the client itself was up to {late:.2g} s late)"
    finding = Finding(
        metric=metric,
        value=getattr(distribution, bound.percentile),
        interval=_interval(limits, summary.confidence, n),
        n=n,
        threshold=asked,
        decision=decision,
        note=note,
    )
    if decision is not Decision.UNDECIDED:
        return _Judged(finding)
    if not n and measured.requests:
        # Answers of a single token have nothing between tokens.
        return _Judged(finding, f"no answer has a second token, so ask for no {bound.measure}")
    enough = _enough_for_bound(bound, finding.value, limits, n, summary.confidence)
    if enough is not None and n < measured.requests:
        enough = math.ceil(enough * measured.requests / n)
    return _Judged(finding, _more_requests(metric, enough))


def _judge_goodput(level: ConcurrencyLevel, at_least: float, confidence: float) -> _Judged:
    assert level.goodput is not None, "checked before"
    metric = f"goodput at concurrency {level.concurrency}"
    share = level.goodput.share
    decision = decide_at_least(share, at_least)
    asked = f"at least {at_least:.4g}"
    finding = Finding(
        metric=metric,
        value=share.value,
        interval=share.interval,
        n=share.n,
        threshold=asked,
        decision=decision,
        note=(
            f"is unknown, as {share.note}, and {asked} is asked"
            if share.interval is None
            else f"is between {share.interval.low:.4g} and {share.interval.high:.4g} at "
            f"{_percent(confidence)} confidence over {share.n} requests, {level.errors} of them "
            f"failed, and {asked} is asked"
        ),
    )
    if decision is not Decision.UNDECIDED:
        return _Judged(finding)
    return _Judged(
        finding, _more_requests(metric, _enough_for_share(share.value, at_least, confidence))
    )


def _decide(limits: Bounds | None, at_most: float) -> Decision:
    if limits is None:
        return Decision.UNDECIDED
    if limits.high is not None and limits.high <= at_most:
        return Decision.PASSED
    # Without a low bound it is a failed request's, which is above any.
    return Decision.of(False) if limits.low is None or limits.low > at_most else Decision.UNDECIDED


def _interval(limits: Bounds | None, confidence: float, n: int) -> Interval | None:
    if limits is None or limits.low is None or limits.high is None:
        return None
    return Interval(low=limits.low, high=limits.high, confidence=confidence, method=METHOD, n=n)


def _in_words(limits: Bounds | None) -> str:
    if limits is None:
        return "unknown"
    if limits.low is None:
        return "that of a failed request"
    if limits.high is None:
        return f"at least {limits.low:.4g} s"
    return f"between {limits.low:.4g} s and {limits.high:.4g} s"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def _enough_for_bound(
    bound: LatencyBound, value: float | None, limits: Bounds | None, n: int, confidence: float
) -> int | None:
    """About how many requests would decide an undecided bound; None if no number would."""
    fewest = requests_needed(bound.percentile, confidence)
    if n < fewest:
        return fewest
    if value is None or limits is None or limits.low is None or limits.high is None:
        return 2 * n  # failed requests are in the way; how many there really are is not known
    distance = abs(value - bound.at_most)
    reach = limits.high - value if value <= bound.at_most else value - limits.low
    # An interval shrinks with the root of the number of requests.
    if distance == 0 or (enough := n * (reach / distance) ** 2) > MOST_TIMES_MORE * n:
        return None
    return max(n + 1, math.ceil(enough))


def _enough_for_share(value: float | None, at_least: float, confidence: float) -> int | None:
    """The requests of which this very share would be decided; None if no number would."""
    if value is None:
        return 1
    if value == at_least:
        return None
    # Where Wilson's interval ends: the score test of the threshold.
    critical_value = NormalDist().inv_cdf((1 + confidence) / 2)
    enough = at_least * (1 - at_least) * (critical_value / (value - at_least)) ** 2
    return math.ceil(enough) if enough <= MOST_TIMES_MORE**2 else None


def _more_requests(metric: str, enough: int | None) -> str:
    if enough is None:
        return f"no number of requests will, as {metric} is too close to what is asked"
    return f"measure {enough} requests or more"


def _advice(summary: LatencySummary, judged: Sequence[_Judged]) -> str:
    remedies = dict.fromkeys(one.remedy for one in judged if one.remedy is not None)
    # How many prompts are answered without a server is no choice of the spec.
    means = (
        "ask in gates.latency for a lower percentile, or for what is farther from the measured"
        if summary.source == "in-process"
        else "set gates.latency.requests, or change the bound"
    )
    return f"Not enough data to decide: {'; '.join(remedies)}. For that {means}; make a new release"
