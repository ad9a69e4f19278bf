"""Gates of Develop: a yes needs evidence; what is unknown, or too little, is not one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from llmops_assets.develop.baseline import Baseline
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.judgements import (
    PREDICTIONS_FILE,
    Results,
    judge_fairness,
    judge_leakage,
    judge_metrics,
    judge_regression,
)
from llmops_assets.errors import DataError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import NOTHING_SERVES
from llmops_assets.spec import FairnessGate, MetricRule, ModelSpec, parse_spec

from ..release_rig import SPEC, predictions_table

PASSED, FAILED, UNDECIDED = Decision.PASSED, Decision.FAILED, Decision.UNDECIDED
SERVING = Baseline("parrot.v1", "sha256:" + "a" * 64, "sha256:" + "b" * 64)
GATE = {"exact_match": MetricRule(at_least=0.9, every_slice=0.8)}


def spec(metrics: str = "[exact_match, perplexity, macro_f1]", rules: str = "") -> ModelSpec:
    text = SPEC.replace("metrics: [exact_match]", f"metrics: {metrics}")
    if rules:
        text = text.replace(
            "{exact_match: {at_least: 0.9, every_slice: 0.8, regression: 0.05}}", rules
        )
    return parse_spec(text, "test")


def results(
    folder: Path,
    rows: int = 400,
    wrong: dict[str, int] | None = None,
    loss: float = 0.1,
    of: ModelSpec | None = None,
) -> Results:
    """What an evaluation with so many wrong answers leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    table = predictions_table(rows, wrong).assign(loss=loss)
    table.to_parquet(folder / PREDICTIONS_FILE)
    return Results(folder, of or spec(), folder)


@pytest.mark.parametrize(
    ("rows", "wrong", "decision"),
    [
        (400, {}, PASSED),
        (400, {"de": 10, "fr": 12}, PASSED),
        (400, {"de": 20, "fr": 20}, UNDECIDED),  # just at the threshold
        (400, {"de": 60, "fr": 60}, FAILED),
        (400, {"fr": 30}, UNDECIDED),  # 0.85 in fr
        (400, {"fr": 70}, FAILED),
        (20, {}, UNDECIDED),  # perfect, and too few
        (40, {"de": 15, "fr": 15}, FAILED),  # few are enough for a clear no
    ],
)
def test_accuracy_is_judged_by_its_interval(
    tmp_path: Path, rows: int, wrong: dict[str, int], decision: Decision
) -> None:
    """A share of a few rows is luck; only an interval on the right side is evidence."""
    judgement = judge_metrics(results(tmp_path, rows, wrong), GATE)
    assert judgement.decision is decision
    assert [(f.metric, f.slice, f.n) for f in judgement.findings] == [
        ("exact_match", None, rows),
        ("exact_match", "de", rows // 2),
        ("exact_match", "fr", rows // 2),
    ]
    assert all(f.interval is not None and f.interval.method == "Wilson" for f in judgement.findings)


def test_undecided_says_how_many_rows_would_decide(tmp_path: Path) -> None:
    """ "Not enough data" without a number sends people guessing."""
    judgement = judge_metrics(results(tmp_path / "few", 20), {"exact_match": GATE["exact_match"]})
    assert judgement.advice is not None
    assert judgement.advice.startswith("not enough data to decide: give more evaluation rows")
    needed = int(judgement.advice.partition("about ")[2].partition(" rows")[0])
    rule = {"exact_match": MetricRule(at_least=0.9)}
    assert judge_metrics(results(tmp_path / "more", 2 * needed), rule).passed
    assert not judge_metrics(results(tmp_path / "less", needed // 2), rule).passed


def test_accuracy_names_the_bad_slice(tmp_path: Path) -> None:
    """Who reads the failure must know for whom the model is bad."""
    judgement = judge_metrics(results(tmp_path, 400, {"fr": 120}), GATE)
    assert judgement.decision is FAILED
    assert "exact_match in slice fr is 0.4" in judgement.reason
    assert "slice de" not in judgement.reason
    assert judgement.measured["every_slice"] == {"exact_match": {"de": 1.0, "fr": 0.4}}
    assert judgement.measured["rows"] == 400
    assert judgement.threshold["exact_match"] == 0.9


def test_perplexity_is_at_most(tmp_path: Path) -> None:
    """The direction of a metric is its own; a high perplexity is no success."""
    rule = {"perplexity": MetricRule(at_most=2)}
    assert judge_metrics(results(tmp_path / "low", loss=0.1), rule).decision is PASSED
    assert judge_metrics(results(tmp_path / "high", loss=1.0), rule).decision is FAILED


def test_rows_without_a_number_decide_nothing(tmp_path: Path) -> None:
    """A diverged model's NaN compares as neither less nor more, and must not slip through."""
    found = results(tmp_path)
    found.predictions.loc[3, "loss"] = float("nan")
    judgement = judge_metrics(found, {"perplexity": MetricRule(at_most=2)})
    assert judgement.decision is UNDECIDED
    assert "1 of 400 rows have no finite score" in judgement.findings[0].note


def test_custom_metric_comes_from_the_repository(tmp_path: Path) -> None:
    """A team's own idea of quality is judged like any other."""
    (tmp_path / "parrot_metrics.py").write_text(
        "def brief(table):\n    return table['prediction'].str.len() <= 2\n"
    )
    custom = spec("[exact_match, {name: brief, function: 'parrot_metrics:brief'}]")
    rule = {"brief": MetricRule(at_least=0.5)}
    passed = judge_metrics(results(tmp_path, wrong={"de": 150, "fr": 150}, of=custom), rule)
    failed = judge_metrics(results(tmp_path, wrong={"de": 20, "fr": 20}, of=custom), rule)
    assert (passed.decision, failed.decision) == (PASSED, FAILED)
    assert failed.measured["brief"] == 0.1


@pytest.mark.parametrize(
    ("wrong", "minimum", "decision", "told"),
    [
        ({}, 50, PASSED, "0 "),
        ({"de": 5, "fr": 5}, 50, PASSED, "0 "),
        ({"fr": 80}, 50, FAILED, "0.4 "),
        ({"fr": 18}, 50, UNDECIDED, "0.09 "),
        ({}, 500, UNDECIDED, "unknown"),
    ],
)
def test_fairness(
    tmp_path: Path, wrong: dict[str, int], minimum: int, decision: Decision, told: str
) -> None:
    """Good on average can be useless for one language; small slices say nothing."""
    gate = FairnessGate(largest_gap=0.1, minimum_slice=minimum)
    judgement = judge_fairness(results(tmp_path, wrong=wrong), gate)
    assert judgement.decision is decision
    assert f"largest gap of exact_match is {told}" in judgement.reason
    if decision is FAILED:
        assert judgement.findings[0].note == "de is best, fr is worst"


def test_declared_slice_that_the_data_lack_is_undecided(tmp_path: Path) -> None:
    """Fair to a group that nobody asked is not known."""
    gate = FairnessGate(largest_gap=0.1, slices=("de", "fr", "it"))
    judgement = judge_fairness(results(tmp_path), gate)
    assert judgement.decision is UNDECIDED
    assert "it" in judgement.findings[0].note


def test_slices_that_nobody_compares_fail(tmp_path: Path) -> None:
    """Null is for data without slices, not a way around the gate."""
    judgement = judge_fairness(results(tmp_path), None)
    assert judgement.decision is FAILED
    assert "de, fr" in judgement.reason


def compared(tmp_path: Path, wrong: dict[str, int], rows: int = 400, margin: float = 0.02) -> Any:
    of = spec(rules=f"{{exact_match: {{at_least: 0.1, regression: {margin}}}}}")
    serving = results(tmp_path / "serving", rows, of=of)
    candidate = results(tmp_path / "candidate", rows, wrong, of=of)
    return judge_regression(candidate, SERVING, serving.directory)


@pytest.mark.parametrize(
    ("rows", "wrong", "decision"),
    [
        (400, {}, PASSED),
        (400, {"de": 40}, FAILED),
        (400, {"de": 8}, UNDECIDED),
        (40, {"de": 2}, UNDECIDED),
        (4000, {"de": 40}, PASSED),
        (4000, {"de": 160}, FAILED),
    ],
)
def test_regression_is_judged_by_its_interval(
    tmp_path: Path, rows: int, wrong: dict[str, int], decision: Decision
) -> None:
    """Significant, it fails; where the sample cannot tell, it says so and does not guess."""
    judgement = compared(tmp_path, wrong, rows)
    assert judgement.decision is decision
    assert judgement.baseline == SERVING.package
    assert judgement.measured["regression of exact_match"] == sum(wrong.values()) / rows
    assert "parrot.v1" in judgement.reason
    assert (judgement.advice is None) == (decision is not UNDECIDED)
    assert "with a probability of at most 0.05" in judgement.findings[0].note


def test_better_candidate_passes(tmp_path: Path) -> None:
    """Improvement is never a regression."""
    of = spec(rules="{exact_match: {at_least: 0.1, regression: 0}}")
    serving = results(tmp_path / "serving", wrong={"de": 60}, of=of)
    assert judge_regression(results(tmp_path / "new", of=of), SERVING, serving.directory).passed


def test_baseline_that_was_not_evaluated_decides_nothing(tmp_path: Path) -> None:
    """Without its numbers there is nothing to be no worse than."""
    of = spec(rules="{exact_match: {at_least: 0.1, regression: 0.1}}")
    judgement = judge_regression(results(tmp_path, of=of), SERVING, None)
    assert judgement.decision is UNDECIDED
    assert judgement.baseline == SERVING.package
    assert judgement.advice is not None
    assert "materialize evaluation" in judgement.advice


def test_first_release_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    """And the verdict says so, so that it is stale as soon as something serves."""
    judgement = judge_regression(results(tmp_path), None, None)
    assert judgement.passed
    assert judgement.baseline == NOTHING_SERVES


def test_other_rows_are_no_baseline(tmp_path: Path) -> None:
    """Two scores of different questions compare the questions."""
    of = spec(rules="{exact_match: {at_least: 0.1, regression: 0.1}}")
    serving = results(tmp_path / "serving", rows=402, of=of)
    with pytest.raises(DataError, match="not evaluated on the same rows"):
        judge_regression(results(tmp_path / "new", of=of), SERVING, serving.directory)


def data(folder: Path, *prompts: str) -> Path:
    folder.mkdir()
    pd.DataFrame(
        {"prompt": prompts, "completion": ["x"] * len(prompts), "slice": ["s"] * len(prompts)}
    ).to_parquet(folder / DATA_FILE)
    return folder


def test_a_single_leaked_row_fails(tmp_path: Path) -> None:
    """One row is how a leak begins to show."""
    training = data(tmp_path / "training", "one", "two")
    clean = judge_leakage(training, data(tmp_path / "clean", "three"))
    leaking = judge_leakage(training, data(tmp_path / "leaking", "three", "two"))
    assert (clean.passed, leaking.passed) == (True, False)
    assert leaking.measured == {"leaked_rows": 1, "examples": ["two"]}
