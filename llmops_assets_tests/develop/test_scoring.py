"""Metrics by name: their numbers, their directions, and whose code may compute them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from llmops_assets.develop.metrics import measure
from llmops_assets.develop.scoring import METRICS, Metric, check_same_rows, metric_named
from llmops_assets.errors import DataError, SpecError
from llmops_assets.evidence.statistics import (
    Comparison,
    Decision,
    Estimate,
    compare_paired,
    decide_at_least,
    decide_at_most,
    estimate_of,
    proportion,
)
from llmops_assets.spec import BUILT_IN_METRICS

LABELS = np.array(["spam", "ham", "eggs"])


def table(rows: int = 300, right: float = 0.9, seed: int = 0) -> pd.DataFrame:
    """Predictions of labels; the same seed gives the same rows, whatever is right."""
    rows_of, of = np.random.default_rng(0), np.random.default_rng(seed + 1)
    completion = LABELS[rows_of.choice(3, rows, p=[0.6, 0.3, 0.1])]
    prediction = np.where(of.random(rows) < right, completion, LABELS[of.choice(3, rows)])
    tokens = rows_of.integers(1, 9, rows)
    return pd.DataFrame(
        {
            "prompt": [f"mail {row}" for row in range(rows)],
            "completion": completion,
            "slice": LABELS[rows_of.choice(3, rows)],
            "prediction": prediction,
            "correct": prediction == completion,
            "loss": tokens * of.gamma(1.0, 1 - right + 0.01, rows),
            "tokens": tokens,
            "latency_seconds": 0.01,
            "time_to_first_token_seconds": 0.005,
            "inter_token_latency_seconds": 0.005,
            "output_tokens": 2,
        }
    )


def higher_is_better(metric: Metric) -> bool:
    return BUILT_IN_METRICS.get(metric.name, "error" not in metric.name)


def score(predictions: pd.DataFrame, metric: Metric, *, confidence: float, seed: int) -> Estimate:
    return estimate_of(metric.sample_of(predictions), confidence, seed)


def compare(
    candidate: pd.DataFrame,
    baseline: pd.DataFrame,
    metric: Metric,
    *,
    margin: float,
    confidence: float,
    seed: int,
) -> Comparison:
    samples = metric.sample_of(candidate), metric.sample_of(baseline)
    check_same_rows(candidate, baseline)
    return compare_paired(
        *samples,
        margin=margin,
        confidence=confidence,
        seed=seed,
        higher_is_better=higher_is_better(metric),
    )


def decide(metric: Metric, estimate: Estimate, threshold: float) -> Decision:
    return (decide_at_least if higher_is_better(metric) else decide_at_most)(estimate, threshold)


def scored(predictions: pd.DataFrame, name: str, repository: Path | None = None) -> Estimate:
    return score(predictions, metric_named(name, repository), confidence=0.95, seed=0)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spec's repository; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loaded = dict(sys.modules)
    folder = tmp_path / "repository"
    folder.mkdir()
    yield folder
    for name in set(sys.modules) - set(loaded):
        del sys.modules[name]


def test_metrics_are_those_of_the_evaluation() -> None:
    """A gate must judge the very number that the evaluation shows."""
    predictions = table()
    metrics = measure(predictions)
    exact = scored(predictions, "exact_match")
    assert exact == proportion(int(predictions["correct"].sum()), 300, 0.95)
    assert exact.value == metrics.exact_match
    assert scored(predictions, "loss").value == pytest.approx(metrics.loss)
    assert scored(predictions, "perplexity").value == pytest.approx(metrics.perplexity)


def test_accuracy_is_of_labels() -> None:
    """A label in capitals or with a line break is that label; a longer word is not."""
    predictions = table(4)
    predictions["completion"] = ["spam", "Ham", "eggs", "spam"]
    predictions["prediction"] = ["SPAM\n", "ham", "eggsy", None]
    assert scored(predictions, "accuracy") == proportion(2, 4, 0.95)


def test_macro_f1_is_scikit_learns() -> None:
    """The counting is our own for speed, so a kept library checks it, junk answers included."""
    predictions = table(right=0.7)
    predictions.loc[:20, "prediction"] = "I would say it is spam"
    predictions.loc[21:25, "prediction"] = " HAM"
    normalised = predictions["prediction"].str.strip().str.casefold()
    expected = f1_score(
        predictions["completion"], normalised, labels=LABELS.tolist(), average="macro"
    )
    estimate = scored(predictions, "macro_f1")
    assert estimate.value == pytest.approx(expected)
    assert estimate.interval is not None
    assert 0.02 < expected - estimate.interval.low < 0.12
    assert 0.02 < estimate.interval.high - expected < 0.12


def test_macro_f1_sees_the_rare_label() -> None:
    """A model that never says the rare label is accurate, and macro F1 is there to tell."""
    predictions = table(right=1.0)
    rare = predictions["completion"] == "eggs"
    predictions.loc[rare, "prediction"] = "ham"
    accuracy, macro_f1 = scored(predictions, "accuracy"), scored(predictions, "macro_f1")
    assert accuracy.value is not None and macro_f1.value is not None
    assert accuracy.value > 0.85
    assert macro_f1.value < 0.67


def test_macro_f1_of_a_label_with_one_row() -> None:
    """Resamples often miss it; its F1 of 0/0 must not make the whole metric unknown."""
    predictions = table()
    predictions.loc[0, "completion"] = "quarantine"
    assert scored(predictions, "macro_f1").interval is not None


@pytest.mark.parametrize("name", ["exact_match", "accuracy", "macro_f1", "loss", "perplexity"])
def test_regressions_are_caught_in_each_metrics_direction(name: str) -> None:
    """A worse model must fail and a better one pass, whichever way the metric points."""
    good, bad = table(right=0.97), table(right=0.75, seed=1)
    metric = METRICS[name]

    def decision(candidate: pd.DataFrame, baseline: pd.DataFrame, margin: float) -> Decision:
        return compare(
            candidate, baseline, metric, margin=margin, confidence=0.95, seed=0
        ).decision  # fmt: skip

    assert decision(bad, good, 0.02) is Decision.FAILED
    assert decision(good, bad, 0.02) is Decision.PASSED
    assert decision(good, good, 0.02) is Decision.PASSED
    assert decision(good.head(8), good.head(8), 0.02) is Decision.UNDECIDED


@pytest.mark.parametrize(
    ("name", "lenient", "strict"),
    [("exact_match", 0.5, 0.99), ("macro_f1", 0.5, 0.99), ("perplexity", 2.0, 1.01)],
)
def test_thresholds_follow_the_direction(name: str, lenient: float, strict: float) -> None:
    """A perplexity that is far below its threshold is good, an accuracy is not."""
    estimate = scored(table(), name)
    assert decide(METRICS[name], estimate, lenient) is Decision.PASSED
    assert decide(METRICS[name], estimate, strict) is Decision.FAILED


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows_decide_nothing(name: str, rows: int) -> None:
    """An empty evaluation must be an undecided gate, not a crash and not a pass."""
    estimate = scored(table().head(rows), name)
    threshold = 0.9 if BUILT_IN_METRICS[name] else 1.5
    assert decide(METRICS[name], estimate, threshold) is Decision.UNDECIDED


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_a_diverged_model_passes_nothing(name: str) -> None:
    """One NaN among the losses makes the metric unknown, however good the others are."""
    predictions = table()
    predictions.loc[7, "loss"] = math.nan
    estimate = scored(predictions, name)
    assert "1 of 300 rows" in estimate.note
    assert decide(METRICS[name], estimate, 1e9) is Decision.UNDECIDED


def test_a_table_must_be_whole() -> None:
    """A missing column or a row without a completion is a broken evaluation."""
    with pytest.raises(DataError, match="no tokens"):
        scored(table().drop(columns="tokens"), "exact_match")
    predictions = table()
    predictions.loc[3, "completion"] = None
    with pytest.raises(DataError, match="null"):
        scored(predictions, "accuracy")


def test_a_comparison_is_about_the_same_rows() -> None:
    """Rows in another order have equal counts, and pairing them would still be nonsense."""
    good = table()
    shuffled = good.sample(frac=1, random_state=0).reset_index(drop=True)
    for other in (shuffled, good.head(200)):
        with pytest.raises(DataError, match="same rows"):
            compare(good, other, METRICS["exact_match"], margin=0, confidence=0.95, seed=0)


def test_custom_metrics(repository: Path) -> None:
    """A team's own metric comes from its repository, per row or as one number."""
    package = repository / "team_metrics"
    package.mkdir()
    (package / "mail.py").write_text(
        "def right(table):\n"
        "    from team_metrics.helper import rightness\n"
        "    return rightness(table)\n"
        "def error_rate(table):\n"
        "    return 1 - table['correct'].mean()\n"
    )
    (package / "helper.py").write_text("def rightness(table):\n    return table['correct']\n")
    predictions = table()
    exact = scored(predictions, "exact_match")
    assert scored(predictions, "team_metrics.mail:right", repository) == exact
    errors = metric_named("team_metrics.mail:error_rate", repository)
    estimate = score(predictions, errors, confidence=0.95, seed=0)
    assert exact.value is not None and exact.interval is not None
    assert estimate.value == pytest.approx(1 - exact.value)
    assert estimate.interval is not None
    assert estimate.interval.low == pytest.approx(1 - exact.interval.high, abs=0.012)
    assert decide(errors, estimate, 0.5) is Decision.PASSED
    worse = table(right=0.7, seed=3)
    assert (
        compare(worse, predictions, errors, margin=0.02, confidence=0.95, seed=0).decision
        is Decision.FAILED
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact-match", "one of exact_match, "),
        ("../evil:metric", "one of exact_match, "),
        ("no_such_module:metric", "No module named 'no_such_module'"),
        ("broken:metric", "SyntaxError"),
        ("needy:metric", "No module named 'not_installed'"),
        ("whole:missing", "a function missing"),
        ("whole:number", "Found: int"),
        ("os:system", "not reviewed with the spec"),
        ("sys:exit", "not reviewed with the spec"),
        ("stray:metric", "not reviewed with the spec"),
    ],
)
def test_metrics_that_cannot_be_used(
    repository: Path, tmp_path: Path, name: str, message: str
) -> None:
    """Each mistake says what it is; code from outside the repository never runs."""
    (repository / "broken.py").write_text("def metric(:\n")
    (repository / "needy.py").write_text("import not_installed\n")
    (repository / "whole.py").write_text("number = 3\n")
    stray = tmp_path / "working_directory"
    stray.mkdir()
    (stray / "stray.py").write_text("raise SystemExit('stray code ran')\n")
    sys.path.insert(0, str(stray))
    with pytest.raises(SpecError, match=message):
        metric_named(name, repository)


def test_the_repository_shadows_no_installed_package(repository: Path) -> None:
    """A repository's tabulate.py must not become everybody's tabulate."""
    (repository / "tabulate.py").write_text("raise SystemExit('shadowed')\n")
    metric_named("tabulate:tabulate", repository)
    assert "site-packages" in str(sys.modules["tabulate"].__file__)


@pytest.mark.parametrize(
    "returned", ["[1.0, 2.0]", "'0.9'", "None", "True", "table['prompt']", "[[1.0]] * len(table)"]
)
def test_custom_metrics_return_numbers(repository: Path, returned: str) -> None:
    """A wrong length or a text must name the metric, not fail somewhere in NumPy."""
    (repository / "odd_metric.py").write_text(f"def metric(table):\n    return {returned}\n")
    with pytest.raises(DataError, match="odd_metric:metric returned"):
        scored(table(), "odd_metric:metric", repository)
