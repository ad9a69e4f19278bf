"""How sure a gate can be of what it measured, and what it may decide from that.

Evaluation data are a sample of the requests a model will meet, so a metric comes with the
interval that holds its true value at a stated confidence. A gate passes when the whole
interval is on the right side of its threshold, fails when the whole interval is on the
wrong side, and is undecided in between. Intervals are two-sided: each side errs with half
of `1 - confidence` nominally, and a verdict states all of it, as the methods approximate.

Rows must be independent of one another. Tokens of one answer are not: count rows, or
resample rows with a statistic that sums over their tokens.

Resampling with the bootstrap cannot see what no row shows: with 30 right answers out of 30
every resample is perfect. Where fewer than `ENOUGH_VARYING_ROWS` rows vary, an interval is
therefore widened as Wilson's is for a share with that many exceptions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmops_assets.errors import DataError, SpecError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.intp]
    Scores = Sequence[float] | npt.NDArray[Any]

RESAMPLES = 2000
MINIMUM_RESAMPLES = 400
RESAMPLED_ROWS = 50_000_000
"""Most rows drawn for one interval: large data get fewer resamples, down to the minimum."""
BATCH_ROWS = 2_000_000
"""Most rows held in memory at once while resampling."""
BOOTSTRAP_MINIMUM_ROWS = 30
"""Below this the percentiles of resamples are too narrow to be called an interval."""
ENOUGH_VARYING_ROWS = 10
"""From so many rows that vary on, resamples show the variation by themselves."""


class Decision(StrEnum):
    """What the data allow to say about a threshold."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    """Not enough data to decide; it opens no gate."""

    @classmethod
    def of(cls, holds: bool) -> Decision:
        """Of something that is known for certain."""
        return cls.PASSED if holds else cls.FAILED

    @classmethod
    def all_of(cls, decisions: Iterable[Decision]) -> Decision:
        """Failed if one is, passed only if all are; of none undecided."""
        found = set(decisions)
        if cls.FAILED in found:
            return cls.FAILED
        return cls.PASSED if found == {cls.PASSED} else cls.UNDECIDED


class Record(BaseModel):
    """Base of what goes into evidence: plain JSON, where neither NaN nor infinity exist."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Record):
    """Where the true value lies, bounds included."""

    low: float
    high: float
    confidence: float = Field(gt=0, lt=1, description="Share of samples whose interval is right.")
    method: str
    n: int = Field(ge=1, description="Rows it rests on.")

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Estimate(Record):
    """A measured value with its interval; no interval means that nothing can be decided."""

    value: float | None = Field(description="None when there is no finite value.")
    interval: Interval | None
    n: int = Field(ge=0, description="Rows.")
    note: str = Field(default="", description="Why there is no interval.")


class Comparison(Record):
    """A candidate beside a baseline on the same rows."""

    decision: Decision
    regression: Estimate = Field(
        description="By how much the candidate is worse, in units of the metric; below 0: better."
    )
    margin: float = Field(ge=0, description="The largest regression that is accepted.")
    false_alarm_rate: float = Field(
        description="At most this often a candidate that is truly as good as the baseline fails."
    )


class Gap(Record):
    """The largest difference between two slices."""

    best: str | None = Field(description="Slice with the highest share.")
    worst: str | None = Field(description="Slice with the lowest share.")
    estimate: Estimate
    undecided: tuple[str, ...] = Field(description="Slices with too few rows, not compared.")


@dataclass(frozen=True)
class Sample:
    """What a metric sees of each row, and how it sums the rows up.

    Args:
        scores: one number per row.
        statistic: the metric of the rows at the given positions (with repetitions); None
            means the mean of their scores.
        resamples: how often the statistic is computed for an interval, at most; for a
            statistic that is slow.
    """

    scores: Scores
    statistic: Callable[[Rows], float] | None = None
    resamples: int = RESAMPLES


def proportion(successes: int, n: int, confidence: float) -> Estimate:
    """A share of 1 with Wilson's score interval (Wilson 1927), which holds for any share and n.

    Args:
        successes: of `n` independent trials.
        confidence: of the two-sided interval, as 0.95.

    Raises:
        DataError: the counts are impossible.
        SpecError: the confidence is not between 0 and 1.
    """
    from scipy.stats import binomtest

    _critical_value(confidence)
    if not 0 <= successes <= n:
        raise DataError(
            "These counts are no proportion",
            expected=f"successes between 0 and n = {n}",
            found=f"{successes} successes",
            cure="look at the rows that were counted",
        )
    if n == 0:
        return Estimate(value=None, interval=None, n=0, note="there are no rows")
    bounds = binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    return Estimate(
        value=successes / n,
        interval=Interval(
            low=float(bounds.low), high=float(bounds.high),
            confidence=confidence, method="Wilson", n=n,
        ),
        n=n,
    )  # fmt: skip


def estimate_of(sample: Sample, confidence: float, seed: int) -> Estimate:
    """The metric of a sample of rows, with its interval.

    Means of scores that are all 0 or 1 get Wilson's interval, everything else that of the
    bootstrap (bias-corrected and accelerated, Efron 1987, as skewed losses need it; plain
    percentiles where that is not defined or too costly), the same for the same seed.
    Metrics that a few rows decide, as a perplexity with a heavy tail, err more often than
    stated on the side that no row shows (6 % of 200 samples of 150 log-normal losses).

    Args:
        confidence: of the two-sided interval, as 0.95.
        seed: of the resampling.

    Returns:
        Without an interval if a score or the metric is not finite, or if there are fewer
        than `BOOTSTRAP_MINIMUM_ROWS` rows to resample.

    Raises:
        SpecError: the confidence is not between 0 and 1.
    """
    import numpy as np

    _critical_value(confidence)
    scores = np.asarray(sample.scores, dtype=float)
    if unusable := _unusable(scores):
        return Estimate(value=None, interval=None, n=len(scores), note=unusable)
    if sample.statistic is None and _is_binary(scores):
        return proportion(int(scores.sum()), len(scores), confidence)
    _, counts = np.unique(scores, return_counts=True)
    return _by_bootstrap(
        scores if sample.statistic is None else sample.statistic,
        n=len(scores),
        varying=int(len(scores) - counts.max()),
        # Without variation the scores' own size is all there is to say what a row can change.
        scale=float(np.abs(scores).max()) if sample.statistic is None else None,
        confidence=confidence,
        seed=seed,
        resamples=sample.resamples,
        skewed=True,
    )


def decide_at_least(estimate: Estimate, threshold: float) -> Decision:
    """Passed when the whole interval is at or above the threshold, failed when below it."""
    interval = estimate.interval
    if interval is None:
        return Decision.UNDECIDED
    if interval.low >= threshold:
        return Decision.PASSED
    if interval.high < threshold:
        return Decision.FAILED
    return Decision.UNDECIDED


def decide_at_most(estimate: Estimate, threshold: float) -> Decision:
    """Passed when the whole interval is at or below the threshold, failed when above it."""
    interval = estimate.interval
    if interval is None:
        return Decision.UNDECIDED
    if interval.high <= threshold:
        return Decision.PASSED
    if interval.low > threshold:
        return Decision.FAILED
    return Decision.UNDECIDED


def compare_paired(
    candidate: Sample,
    baseline: Sample,
    *,
    margin: float,
    confidence: float,
    seed: int,
    higher_is_better: bool = True,
) -> Comparison:
    """Whether a candidate is worse than a baseline by more than a margin, on the same rows.

    Passed (non-inferior) when the interval of the regression excludes everything beyond
    the margin, failed when it excludes everything within it. A candidate as good as the
    baseline fails with a probability of at most `1 - confidence`.

    Differences of scores that are all 0 or 1 get Tango's score interval, which has a width
    even where both models agree on every row; others percentiles of the bootstrap of rows.

    Args:
        candidate: its scores; row for row those of the baseline.
        margin: the largest regression that is accepted, in units of the metric.
        confidence: of the two-sided interval, as 0.95.
        seed: of the resampling.
        higher_is_better: the metric's direction.

    Raises:
        DataError: the two samples have different numbers of rows.
        SpecError: the confidence is not between 0 and 1.
    """
    import numpy as np

    critical_value = _critical_value(confidence)
    worse, better = (baseline, candidate) if higher_is_better else (candidate, baseline)
    left = np.asarray(worse.scores, dtype=float)
    right = np.asarray(better.scores, dtype=float)
    if len(left) != len(right):
        raise DataError(
            "Candidate and baseline were not evaluated on the same rows",
            expected=f"{len(baseline.scores)} rows, as the baseline",
            found=f"{len(candidate.scores)} rows of the candidate",
            cure="evaluate both on the same evaluation data",
        )
    n = len(left)
    by_statistic = worse.statistic is not None
    if by_statistic != (better.statistic is not None):
        raise DataError(
            "Candidate and baseline were not measured in the same way",
            expected="both by a score per row, or both by a statistic of all rows",
            found="one of each",
            cure="mend the metric, so that it returns the same for every table",
        )
    if unusable := _unusable(left) or _unusable(right):
        regression = Estimate(value=None, interval=None, n=n, note=unusable)
    elif not by_statistic and _is_binary(left) and _is_binary(right):
        losses, gains = int((left > right).sum()), int((left < right).sum())
        low, high = _tango(losses, gains, n, critical_value)
        regression = Estimate(
            value=(losses - gains) / n,
            interval=Interval(
                low=low, high=high, confidence=confidence, method="Tango, paired", n=n
            ),
            n=n,
        )
    else:
        differences = left - right
        varying = int(np.count_nonzero(differences))
        largest = float(np.abs(differences if varying else left).max())
        regression = _by_bootstrap(
            _difference(worse.statistic, better.statistic) or differences,
            n=n,
            varying=varying,
            scale=_largest_value(worse, better, n) if by_statistic else largest,
            confidence=confidence,
            seed=seed,
            resamples=min(worse.resamples, better.resamples),
            # Differences of equal models are symmetric, and correcting for the skew that a
            # sample of them happens to have raises false alarms (3.8 to 6.8 % measured).
            skewed=False,
        )
    return Comparison(
        decision=decide_at_most(regression, margin),
        regression=regression,
        margin=margin,
        false_alarm_rate=round(1 - confidence, 12),
    )


def largest_gap(
    slices: Mapping[str, tuple[int, int]], confidence: float, minimum_slice: int
) -> Gap:
    """The largest difference of a share between two slices, with an interval of the true one.

    Looking for the largest of many differences finds one even where none is, so the lower
    bound, which is what can fail a gate, is the largest one of Newcombe's intervals (1998,
    method 10) of all pairs with Bonferroni's correction. The upper bound is the largest
    one without correction: it has to err for one pair only, the truly widest, whichever
    that is (an intersection-union test, Berger 1982).

    Args:
        slices: successes and rows of each slice, by name.
        confidence: of the two-sided interval, as 0.95.
        minimum_slice: rows below which a slice is not compared.

    Returns:
        Without an interval if fewer than two slices can be compared.

    Raises:
        DataError: the counts of a slice are impossible.
        SpecError: the confidence is not between 0 and 1.
    """
    _critical_value(confidence)
    compared = {name: counts for name, counts in slices.items() if counts[1] >= minimum_slice}
    # A slice without rows has no share, whatever the minimum.
    compared = {name: counts for name, counts in compared.items() if counts[1] > 0}
    undecided = tuple(sorted(set(slices) - set(compared)))
    n = sum(rows for _, rows in compared.values())
    shares = {name: successes / rows for name, (successes, rows) in compared.items()}
    if len(compared) < 2:
        note = f"a gap needs two slices of at least {minimum_slice} rows, found {len(compared)}"
        return Gap(
            best=max(shares, default=None),
            worst=min(shares, default=None),
            estimate=Estimate(value=None, interval=None, n=n, note=note),
            undecided=undecided,
        )
    corrected = 1 - (1 - confidence) / math.comb(len(compared), 2)
    cautious = [proportion(*counts, corrected) for counts in compared.values()]
    plain = [proportion(*counts, confidence) for counts in compared.values()]
    low = max(_newcombe(one, other)[0] for one, other in permutations(cautious, 2))
    high = max(_newcombe(one, other)[1] for one, other in permutations(plain, 2))
    best, worst = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    return Gap(
        best=best,
        worst=worst,
        estimate=Estimate(
            value=shares[best] - shares[worst],
            interval=Interval(
                low=max(low, 0.0),
                high=high,
                confidence=confidence,
                method="Newcombe, all pairs; lower bound with Bonferroni's correction",
                n=n,
            ),
            n=n,
        ),
        undecided=undecided,
    )


def decide_gap(gap: Gap, threshold: float) -> Decision:
    """Failed when the true gap is above the threshold; passed only if every slice was compared."""
    decision = decide_at_most(gap.estimate, threshold)
    if decision is Decision.PASSED and gap.undecided:
        return Decision.UNDECIDED
    return decision


def _critical_value(confidence: float) -> float:
    """Quantile of the normal distribution that leaves half of `1 - confidence` above it."""
    from scipy.stats import norm

    if not 0 < confidence < 1:
        raise SpecError(
            "A confidence is not valid",
            expected="a number between 0 and 1, both excluded",
            found=confidence,
            cure="set it to 0.95, or closer to 1 for fewer errors and more undecided gates",
        )
    return float(norm.isf((1 - confidence) / 2))


def _unusable(scores: npt.NDArray[np.float64]) -> str:
    """Why nothing can be said about these scores; empty if something can."""
    import numpy as np

    if len(scores) == 0:
        return "there are no rows"
    broken = int(np.count_nonzero(~np.isfinite(scores)))
    return f"{broken} of {len(scores)} rows have no finite score" if broken else ""


def _is_binary(scores: npt.NDArray[np.float64]) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _by_bootstrap(
    of: npt.NDArray[np.float64] | Callable[[Rows], float],
    *,
    n: int,
    varying: int,
    scale: float | None,
    confidence: float,
    seed: int,
    resamples: int,
    skewed: bool,
) -> Estimate:
    """The mean of numbers, or a statistic of row positions, with the bootstrap's interval.

    Args:
        varying: how many rows the variation comes from.
        scale: by how much one row can be worse or better; None: the value itself.
        skewed: whether to correct percentiles for bias and skew.
    """
    import numpy as np
    from scipy.stats import DegenerateDataWarning, bootstrap

    is_statistic = callable(of)
    value = float(of(np.arange(n)) if is_statistic else of.mean())
    if not math.isfinite(value):
        return Estimate(value=None, interval=None, n=n, note="the metric has no finite value")
    if n < BOOTSTRAP_MINIMUM_ROWS:
        note = f"resampling needs at least {BOOTSTRAP_MINIMUM_ROWS} rows, found {n}"
        return Estimate(value=value, interval=None, n=n, note=note)
    resample = partial(
        bootstrap,
        (np.arange(n) if is_statistic else of,),
        of if is_statistic else np.mean,
        vectorized=not is_statistic,
        batch=max(1, BATCH_ROWS // n),
        confidence_level=confidence,
    )
    drawn = min(resamples, max(MINIMUM_RESAMPLES, RESAMPLED_ROWS // n))
    resampled = resample(n_resamples=drawn, method="percentile", rng=np.random.default_rng(seed))
    low, high = map(float, resampled.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        note = "the metric has no finite value on some resamples of the rows"
        return Estimate(value=value, interval=None, n=n, note=note)
    if low == high:
        varying = 0  # whatever rows differ in, this statistic does not see it
    method = "bootstrap, percentile"
    if varying < ENOUGH_VARYING_ROWS:
        share = proportion(varying, n, confidence)
        assert share.interval is not None and share.value is not None
        spread = (share.interval.high - share.value) * (
            (abs(value) if scale is None else scale) or 1.0
        )
        low, high = min(low, value - spread), max(high, value + spread)
        method += f", widened as only {varying} rows vary"
    elif skewed and n <= drawn:
        # The correction leaves out each row once, so it at most doubles the cost.
        with warnings.catch_warnings():
            # Where it is not defined it is NaN, and the percentiles stay.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            corrected = resample(n_resamples=0, method="BCa", bootstrap_result=resampled)
        bounds = tuple(map(float, corrected.confidence_interval))
        if all(map(math.isfinite, bounds)):
            (low, high), method = bounds, "bootstrap, BCa"
    return Estimate(
        value=value,
        interval=Interval(low=low, high=high, confidence=confidence, method=method, n=n),
        n=n,
    )


def _difference(
    left: Callable[[Rows], float] | None, right: Callable[[Rows], float] | None
) -> Callable[[Rows], float] | None:
    if left is None or right is None:
        return None
    return lambda rows: left(rows) - right(rows)


def _largest_value(left: Sample, right: Sample, n: int) -> float:
    """Larger of two statistics: what a row is taken to be able to change where none differs."""
    import numpy as np

    assert left.statistic is not None and right.statistic is not None
    values = abs(left.statistic(np.arange(n))), abs(right.statistic(np.arange(n)))
    return max(values)


def _tango(losses: int, gains: int, n: int, critical_value: float) -> tuple[float, float]:
    """Score interval of a difference of two paired proportions.

    Tango, "Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design", Statistics in Medicine 17 (1998). It holds the differences
    that its test, at 0 McNemar's, does not reject, and is Wilson's where no pair differs.

    Args:
        losses: pairs of which only the baseline is right.
        gains: pairs of which only the candidate is right.
    """

    def accepted(difference: float) -> bool:
        linear = (2 * n - losses + gains) * difference - losses - gains
        constant = -gains * difference * (1 - difference)
        root = math.sqrt(max(linear**2 - 8 * n * constant, 0.0))
        # Likeliest share of gains if the true difference were this one.
        gain = (root - linear) / (4 * n)
        variance = n * (2 * gain + difference * (1 - difference))
        return (losses - gains - n * difference) ** 2 <= critical_value**2 * variance

    def bound(outside: float) -> float:
        # Halving from a point that is always inside; a root finder would take the observed
        # difference itself for the bound where its variance is 0.
        inside = observed
        for _ in range(60):
            middle = (inside + outside) / 2
            if accepted(middle):
                inside = middle
            else:
                outside = middle
        # The outer end, so that rounding never narrows the interval.
        return outside

    observed = (losses - gains) / n
    return bound(-1.0), bound(1.0)


def _newcombe(one: Estimate, other: Estimate) -> tuple[float, float]:
    """Interval of a difference of two independent proportions, from Wilson's of each.

    Newcombe, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17 (1998), method 10.
    """
    assert one.value is not None and one.interval is not None
    assert other.value is not None and other.interval is not None
    difference = one.value - other.value
    return (
        difference - math.hypot(one.value - one.interval.low, other.interval.high - other.value),
        difference + math.hypot(one.interval.high - one.value, other.value - other.interval.low),
    )
