"""Gates are only as honest as these intervals, so their error rates are measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import binom

from llmops_assets.errors import DataError, SpecError
from llmops_assets.evidence.statistics import (
    BOOTSTRAP_MINIMUM_ROWS,
    Comparison,
    Decision,
    Estimate,
    Interval,
    Sample,
    compare_paired,
    decide_at_least,
    decide_at_most,
    decide_gap,
    estimate_of,
    largest_gap,
    proportion,
)

if TYPE_CHECKING:
    from llmops_assets.evidence.statistics import Rows

PASSED, FAILED, UNDECIDED = Decision.PASSED, Decision.FAILED, Decision.UNDECIDED
COMPARISONS = 1000


def bounds(estimate: Estimate) -> tuple[float, float]:
    assert estimate.interval is not None
    return estimate.interval.low, estimate.interval.high


def paired(losses: int, gains: int, n: int) -> tuple[Sample, Sample]:
    """Candidate and baseline of `n` rows that differ in so many."""
    candidate, baseline = np.ones(n), np.ones(n)
    candidate[:losses] = 0
    baseline[losses : losses + gains] = 0
    return Sample(candidate), Sample(baseline)


def compared(candidate: Sample, baseline: Sample, margin: float = 0.0) -> Comparison:
    return compare_paired(candidate, baseline, margin=margin, confidence=0.95, seed=0)


def test_proportion_is_wilsons() -> None:
    """The published example of Newcombe 1998 (81 of 263), and the ends that a share has."""
    estimate = proportion(81, 263, 0.95)
    assert estimate.value == 81 / 263
    assert bounds(estimate) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert bounds(proportion(10, 10, 0.95))[1] == 1
    assert bounds(proportion(10, 10, 0.95))[0] == pytest.approx(10 / (10 + 1.959964**2))


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_an_error(successes: int, n: int) -> None:
    """A counting mistake must not become a measurement."""
    with pytest.raises(DataError, match="between 0 and n = 5"):
        proportion(successes, n, 0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_is_checked(confidence: float) -> None:
    """95 instead of 0.95 must say so, from whichever function."""
    for call in (
        lambda: proportion(1, 2, confidence),
        lambda: estimate_of(Sample([0.5] * 50), confidence, 0),
        lambda: compare_paired(*paired(0, 0, 9), margin=0, confidence=confidence, seed=0),
        lambda: largest_gap({"a": (1, 2)}, confidence, 1),
    ):
        with pytest.raises(SpecError, match="between 0 and 1"):
            call()


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (0.9, 1.0, PASSED, UNDECIDED),
        (0.8, 0.9, UNDECIDED, PASSED),
        (math.nextafter(0.9, 0), 1.0, UNDECIDED, UNDECIDED),
        (0.5, math.nextafter(0.9, 0), FAILED, PASSED),
        (math.nextafter(0.9, 1), 1.0, PASSED, FAILED),
    ],
)
def test_decisions_at_the_bounds(
    low: float, high: float, at_least: Decision, at_most: Decision
) -> None:
    """Exactly at the threshold of 0.9 is on the right side, whichever that is."""
    interval = Interval(low=low, high=high, confidence=0.95, method="none", n=9)
    estimate = Estimate(value=low, interval=interval, n=9)
    assert decide_at_least(estimate, 0.9) is at_least
    assert decide_at_most(estimate, 0.9) is at_most


@pytest.mark.parametrize("threshold", [-math.inf, 0.0, math.inf, math.nan])
@pytest.mark.parametrize(
    "scores", [[], [math.nan] * 50, [0.5] * 49 + [math.nan], [1.0] * 49 + [math.inf], [0.5, 0.25]]
)
def test_nothing_known_passes_nothing(scores: list[float], threshold: float) -> None:
    """No rows, NaN, infinity or hardly any rows: neither gate may open, at any threshold."""
    estimate = estimate_of(Sample(scores), 0.95, 0)
    assert estimate.interval is None
    assert estimate.note
    assert decide_at_least(estimate, threshold) is UNDECIDED
    assert decide_at_most(estimate, threshold) is UNDECIDED


def test_evidence_is_plain_json() -> None:
    """Verdicts are canonical JSON, which has neither NaN nor NumPy's numbers nor infinity."""
    for evidence in (
        estimate_of(Sample(np.linspace(0, 9, 50)), 0.95, 0),
        estimate_of(Sample([math.nan]), 0.95, 0),
        compared(*paired(3, 1, 50)),
        largest_gap({"de": (5, 9), "fr": (9, 9)}, 0.95, 5),
    ):
        text = json.dumps(evidence.model_dump(mode="json"), allow_nan=False)
        assert type(evidence).model_validate_json(text) == evidence


def test_means_of_zeros_and_ones_are_proportions() -> None:
    """A table of answers that are right or wrong needs no resampling."""
    assert estimate_of(Sample([True, False, True]), 0.95, 0) == proportion(2, 3, 0.95)


def test_bootstrap_is_repeatable_and_right() -> None:
    """A gate judged again must find the same; and for a mean, theory says how wide."""
    scores = np.random.default_rng(0).normal(5, 2, 400)
    estimate = estimate_of(Sample(scores), 0.95, seed=1)
    assert estimate == estimate_of(Sample(scores), 0.95, seed=1)
    assert estimate != estimate_of(Sample(scores), 0.95, seed=2)
    expected = 1.96 * scores.std() / 20
    assert bounds(estimate) == pytest.approx(
        (scores.mean() - expected, scores.mean() + expected), abs=0.03
    )
    wider, narrower = bounds(estimate_of(Sample(scores), 0.99, 1)), bounds(estimate)
    assert wider[0] < narrower[0] < narrower[1] < wider[1]


def test_bootstrap_of_skewed_losses_errs_seldom_enough() -> None:
    """Few bad rows make a perplexity: a sample without them must not pass too easily."""
    generator = np.random.default_rng(4)
    true = math.exp(0.1 * math.exp(0.5))
    false_passes = 0
    for seed in range(200):
        tokens = generator.integers(2, 20, 150)
        losses = 0.1 * tokens * generator.lognormal(0, 1, 150)

        def statistic(
            rows: Rows, losses: np.ndarray = losses, tokens: np.ndarray = tokens
        ) -> float:
            return math.exp(losses[rows].sum() / tokens[rows].sum())

        estimate = estimate_of(Sample(losses, statistic, resamples=400), 0.95, seed)
        false_passes += decide_at_most(estimate, true) is PASSED
    # Nominally 5; with so heavy a tail it is 12, and plain percentiles make 17.
    assert false_passes <= 14


def test_a_statistic_is_not_a_mean_of_rows() -> None:
    """A loss per token weighs long rows more; the interval must be about that number."""
    generator = np.random.default_rng(2)
    tokens = generator.integers(1, 50, 200)
    losses = generator.gamma(2.0, tokens)

    def per_token(rows: Rows) -> float:
        return float(losses[rows].sum() / tokens[rows].sum())

    estimate = estimate_of(Sample(losses, per_token), 0.95, 0)
    low, high = bounds(estimate)
    assert estimate.value == pytest.approx(losses.sum() / tokens.sum())
    assert low < losses.sum() / tokens.sum() < high < losses.mean()


def test_perfection_is_not_certainty() -> None:
    """Resamples of equal rows are equal: 40 perfect rows must not prove 0.99, 400 must."""
    for n, expected in ((40, UNDECIDED), (400, PASSED)):
        perfect = Sample(np.ones(n), lambda rows: 1.0)
        assert decide_at_least(estimate_of(perfect, 0.95, 0), 0.99) is expected
        halves = Sample(np.full(n, 0.5))
        assert decide_at_least(estimate_of(halves, 0.95, 0), 0.495) is expected


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_statistic_that_never_varies_is_not_certain(value: float) -> None:
    """Rows vary, and the statistic does not see it: its interval has a width all the same."""
    scores = [float(row % 2) for row in range(30)]
    sample = Sample(scores, lambda rows: value)
    interval = estimate_of(sample, 0.95, 0).interval
    assert interval is not None
    assert interval.low < value < interval.high
    comparison = compare_paired(sample, sample, margin=0, confidence=0.95, seed=0)
    assert comparison.decision is Decision.UNDECIDED


def test_large_data_are_resampled_within_bounds() -> None:
    """An evaluation of a million rows must not hold its gate for minutes, nor all memory."""
    calls = 0

    def statistic(rows: Rows) -> float:
        nonlocal calls
        calls += 1
        return 1.0

    estimate_of(Sample(np.arange(300_000.0), statistic), 0.95, 0)
    assert calls <= 410


def test_tango_agrees_with_published_values() -> None:
    """21 pairs, 1 against 7: -0.517 to -0.026 in Fagerland, Lydersen and Laake (2014)."""
    regression = compared(*paired(1, 7, 21)).regression
    assert regression.value == -6 / 21
    assert bounds(regression) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("losses", "gains"), [(0, 0), (5, 0), (3, 9), (40, 0), (1, 39)])
def test_tango_is_symmetric_and_within_what_is_possible(losses: int, gains: int) -> None:
    """Swapping the models must turn the sign only; a difference of shares is within 1."""
    low, high = bounds(compared(*paired(losses, gains, 40)).regression)
    turned = bounds(compared(*paired(gains, losses, 40)).regression)
    assert (low, high) == pytest.approx((-turned[1], -turned[0]), abs=1e-12)
    assert -1 <= low < (losses - gains) / 40 + 1e-12
    assert 1 >= high > (losses - gains) / 40 - 1e-12


def test_error_rates_of_the_paired_comparison() -> None:
    """Exact rates over all outcomes: the guarantee that a verdict states is kept.

    A false alarm is a failed candidate that is as good as the baseline; a false pass is
    one that is worse by just more than the margin.
    """
    for n in (30, 100, 300):
        most = min(n, 40)
        outcomes = [(b, g) for b, g in product(range(most + 1), repeat=2) if b + g <= n]
        found = [bounds(compared(*paired(b, g, n)).regression) for b, g in outcomes]
        losses, gains = np.array(outcomes).T
        lows, highs = np.array(found).T
        for disagreement in (0.5 / n, 1 / n, 3 / n, 8 / n):
            for margin in (0.0, 0.5 / n, 2 / n, 4 / n, 6 / n, 8 / n):
                equal = binom.pmf(losses, n, disagreement) * binom.pmf(
                    gains, n - losses, disagreement / (1 - disagreement)
                )
                assert equal[lows > margin].sum() <= 0.05
                worse = binom.pmf(losses, n, disagreement + margin) * binom.pmf(
                    gains, n - losses, disagreement / (1 - disagreement - margin)
                )
                assert worse[highs <= margin].sum() <= 0.05


@pytest.mark.parametrize("kind", ["right or wrong", "loss"])
def test_false_alarms_of_identical_models(kind: str) -> None:
    """1,000 comparisons of a model with itself, each sampled anew: at most 5 % alarms."""
    generator = np.random.default_rng(6)
    alarms = 0
    for seed in range(COMPARISONS):
        if kind == "right or wrong":
            ability = generator.beta(4, 1, 300)
            candidate, baseline = generator.random((2, 300)) < ability
        else:
            difficulty = generator.lognormal(0, 1, 100)
            candidate, baseline = difficulty * generator.lognormal(0, 0.5, (2, 100))
        comparison = compare_paired(
            Sample(candidate, resamples=400),
            Sample(baseline, resamples=400),
            margin=0.0,
            confidence=0.95,
            seed=seed,
            higher_is_better=kind != "loss",
        )
        assert comparison.false_alarm_rate == 0.05
        alarms += comparison.decision is FAILED
    # Some must occur, or the comparison could not see anything.
    assert 5 <= alarms <= COMPARISONS * 0.05


def test_a_real_drop_is_caught() -> None:
    """5 points lost in 600 rows is a regression; at most one in ten may be overlooked."""
    generator = np.random.default_rng(7)
    decisions = []
    for _ in range(100):
        baseline = generator.random(600) < 0.95
        candidate = baseline & (generator.random(600) >= 0.05 / 0.95)
        decisions.append(compared(Sample(candidate), Sample(baseline), margin=0.02).decision)
    assert decisions.count(FAILED) >= 90
    assert PASSED not in decisions


def test_a_real_drop_of_a_loss_is_caught_in_the_right_direction() -> None:
    """Lower is better for a loss: the same data say failed one way, passed the other."""
    generator = np.random.default_rng(8)
    baseline = generator.lognormal(0, 1, 300)
    candidate = baseline * generator.lognormal(0.2, 0.2, 300)
    worse, better = (
        compare_paired(
            *samples, margin=0.05, confidence=0.95, seed=0, higher_is_better=False
        )
        for samples in (
            (Sample(candidate), Sample(baseline)),
            (Sample(baseline), Sample(candidate)),
        )
    )  # fmt: skip
    assert worse.decision is FAILED
    assert worse.regression.value == pytest.approx((candidate - baseline).mean())
    assert better.decision is PASSED
    assert better.regression.value == pytest.approx((baseline - candidate).mean())


@pytest.mark.parametrize(
    ("n", "losses", "margin", "decision"),
    [
        (10, 0, 0.02, UNDECIDED),
        (10, 1, 0.02, UNDECIDED),
        (180, 0, 0.02, UNDECIDED),
        (200, 0, 0.02, PASSED),
        (600, 2, 0.02, PASSED),
        (600, 12, 0.02, UNDECIDED),
        (600, 40, 0.02, FAILED),
        (600, 0, 0.0, UNDECIDED),
    ],
)
def test_a_sample_decides_only_what_it_can(
    n: int, losses: int, margin: float, decision: Decision
) -> None:
    """Models that agree on every row pass with enough rows, and never by a width of zero."""
    assert compared(*paired(losses, 0, n), margin).decision is decision


def test_agreement_of_numbers_is_not_certainty_either() -> None:
    """Differences that are all or nearly all 0 have resamples without any width."""
    generator = np.random.default_rng(9)
    for n, decision in ((BOOTSTRAP_MINIMUM_ROWS, UNDECIDED), (600, PASSED)):
        scores = generator.uniform(0.5, 1.0, n)
        assert compared(Sample(scores), Sample(scores), 0.02).decision is decision
        other = scores.copy()
        other[:2] = 0.25
        assert compared(Sample(other), Sample(scores), 0.02).decision is decision
        same = [Sample(scores, lambda rows, s=scores: float(s[rows].mean()))] * 2
        assert compared(same[0], same[1], 0.02).decision is decision


@pytest.mark.parametrize(
    ("candidate", "baseline"),
    [([], []), ([math.nan] * 50, [1.0] * 50), ([1.0] * 50, [0.5] * 49 + [math.nan])],
)
def test_comparisons_of_nothing_known_are_undecided(
    candidate: list[float], baseline: list[float]
) -> None:
    """A diverged model must not pass for as good as the one that serves."""
    comparison = compared(Sample(candidate), Sample(baseline), 1.0)
    assert comparison.decision is UNDECIDED
    assert comparison.regression.note


def test_comparisons_need_the_same_rows_and_the_same_measure() -> None:
    """Pairing row 1 of one table with row 1 of a shorter one would compare nothing."""
    with pytest.raises(DataError, match="3 rows, as the baseline"):
        compared(Sample([1.0, 0.0]), Sample([1.0, 0.0, 1.0]))
    with pytest.raises(DataError, match="one of each"):
        compared(Sample([0.5] * 50), Sample([0.5] * 50, lambda rows: 0.5))


def test_largest_gap_of_two_slices_is_newcombes() -> None:
    """With one pair there is nothing to correct: his published 56/70 against 48/80."""
    gap = largest_gap({"a": (48, 80), "b": (56, 70)}, 0.95, 50)
    assert (gap.best, gap.worst, gap.estimate.n) == ("b", "a", 150)
    assert gap.estimate.value == pytest.approx(0.2)
    assert bounds(gap.estimate) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_looking_at_many_slices_raises_no_false_alarm() -> None:
    """The best of ten equal slices always looks better than the worst of them."""
    generator = np.random.default_rng(10)
    simulations, failed, alone = 100, 0, 0
    for _ in range(simulations):
        counts = generator.binomial(200, 0.9, 10)
        slices = {f"slice {i}": (int(count), 200) for i, count in enumerate(counts)}
        gap = largest_gap(slices, 0.95, 100)
        failed += decide_gap(gap, 0.0) is FAILED
        assert gap.best is not None and gap.worst is not None
        pair = {name: slices[name] for name in (gap.best, gap.worst)}
        alone += decide_gap(largest_gap(pair, 0.95, 100), 0.0) is FAILED
    assert failed <= 0.05 * simulations
    # The very danger: best and worst judged as if nobody had chosen them.
    assert alone > 0.3 * simulations


def test_gaps_beyond_the_threshold_seldom_pass() -> None:
    """One slice 0.1 below five others, threshold just below 0.1: at most 5 % may pass."""
    generator = np.random.default_rng(11)
    passed = 0
    for _ in range(100):
        shares = [0.8] + [0.9] * 5
        counts = [int(generator.binomial(150, share)) for share in shares]
        slices = {f"slice {i}": (count, 150) for i, count in enumerate(counts)}
        passed += decide_gap(largest_gap(slices, 0.95, 100), 0.099) is PASSED
    assert passed <= 0.05 * 100


def test_a_biased_slice_fails_and_fair_slices_pass() -> None:
    """What the gate is for, at sizes a team can collect."""
    fair = {"de": (980, 1000), "en": (985, 1000), "fr": (978, 1000)}
    assert decide_gap(largest_gap(fair, 0.95, 100), 0.05) is PASSED
    biased = largest_gap({**fair, "sw": (700, 1000)}, 0.95, 100)
    assert biased.worst == "sw"
    assert decide_gap(biased, 0.05) is FAILED


def test_small_slices_are_listed_and_block_a_pass() -> None:
    """Leaving out the slice with hardly any rows must not be a way through the gate."""
    fair = {"de": (980, 1000), "en": (985, 1000)}
    gap = largest_gap({**fair, "fr": (3, 20), "it": (0, 0)}, 0.95, 100)
    assert gap.undecided == ("fr", "it")
    assert bounds(gap.estimate) == bounds(largest_gap(fair, 0.95, 100).estimate)
    assert decide_gap(gap, 0.05) is UNDECIDED
    # It takes nothing from a slice that is known to be bad.
    bad = largest_gap({**fair, "sw": (700, 1000), "fr": (3, 20)}, 0.95, 100)
    assert decide_gap(bad, 0.05) is FAILED


@pytest.mark.parametrize("slices", [{}, {"de": (9, 9)}, {"de": (9, 9), "fr": (0, 0)}])
def test_one_slice_has_no_gap(slices: dict[str, tuple[int, int]]) -> None:
    """Nothing to compare is not fairness, not even with a minimum size of 0."""
    gap = largest_gap(slices, 0.95, 0)
    assert gap.estimate.note
    assert decide_gap(gap, 1.0) is UNDECIDED


def test_importing_is_cheap() -> None:
    """Dagster's definitions import this module, and must not wait for SciPy."""
    code = (
        "import sys, llmops_assets.evidence.statistics, llmops_assets.develop.scoring;"
        "sys.exit(', '.join({'numpy', 'scipy', 'pandas', 'sklearn'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
