"""How the gates of the Develop phase judge. Plain functions of artifacts and thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops_assets.develop.baseline import Baseline
from llmops_assets.develop.scoring import Metric, check_same_rows, metric_named
from llmops_assets.evidence.statistics import (
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
from llmops_assets.evidence.verdicts import NOTHING_SERVES, Finding, Judgement
from llmops_assets.spec import (
    CustomMetric,
    FairnessGate,
    HarnessMetric,
    MetricBound,
    ModelSpec,
)

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS_FILE = "predictions.parquet"
SEED = 0
"""Of all resampling, so that the same bytes get the same verdict."""
MOST_ROWS = 10_000_000
AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Results:
    """What an evaluation, or an engine's validation, left: a directory with predictions.

    `repository` is where metrics of one's own are imported from.
    """

    directory: Path
    spec: ModelSpec
    repository: Path

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """The table of predictions, see `metrics`."""
        import pandas as pd

        return pd.read_parquet(self.directory / PREDICTIONS_FILE)

    @property
    def slices(self) -> list[str]:
        """Names of the slices that the data have."""
        return sorted(map(str, self.predictions["slice"].unique()))

    def sample(self, name: str, slice_name: str | None = None) -> Sample:
        """What a metric sees of each row, or of each document of a task."""
        metric = self.spec.metric(name)
        if isinstance(metric, HarnessMetric):
            from llmops_assets.develop.harness import scores

            return Sample(scores(self.directory, name))
        rows = self.predictions
        if slice_name is not None:
            rows = rows[rows["slice"] == slice_name].reset_index(drop=True)
        return self._metric(name).sample_of(rows)

    def sources(self, names: Iterable[str]) -> dict[str, Any]:
        """Digests of the files that metrics of one's own are written in, for the record."""
        custom = [name for name in names if isinstance(self.spec.metric(name), CustomMetric)]
        found = {name: self._metric(name).source for name in custom}
        return {"metric_sources": found} if found else {}

    def _metric(self, name: str) -> Metric:
        metric = self.spec.metric(name)
        if isinstance(metric, str):
            return metric_named(metric)
        assert not isinstance(metric, HarnessMetric)
        return metric_named(metric.function, self.repository, metric.higher_is_better)


def judge_leakage(training: Path, evaluation: Path) -> Judgement:
    """No prompt of the evaluation data occurs in the training data."""
    from llmops_assets.develop.data import leakage

    found = leakage(training, evaluation)
    return Judgement(
        decision=Decision.of(found.rows == 0),
        measured={"leaked_rows": found.rows, "examples": list(found.examples)},
        threshold={"leaked_rows": 0},
        reason=f"{found.rows} rows of the evaluation data occur in the training data.",
    )


def judge_checkpoint(checkpoint: Path) -> Judgement:
    """Formats are safe, weights are finite, the directory is whole."""
    from llmops_assets.develop.checkpoints import inspect

    report = inspect(checkpoint)
    return Judgement(
        decision=Decision.of(not report.problems),
        measured={"problems": list(report.problems), "parameters": report.parameters},
        threshold={"problems": []},
        reason="; ".join(report.problems)
        or f"{report.parameters} finite parameters in safetensors, and nothing else.",
    )


def judge_metrics(results: Results, rules: Mapping[str, MetricBound]) -> Judgement:
    """Every metric reaches its bound, over all rows and in every slice that must.

    Raises:
        SpecError: a metric of one's own cannot be imported.
        DataError: the predictions cannot be scored.
    """
    findings = tuple(
        finding for name, rule in rules.items() for finding in _findings(results, name, rule)
    )
    slices: dict[str, dict[str, Any]] = {}
    for finding in findings:
        if finding.slice is not None:
            slices.setdefault(finding.metric, {})[finding.slice] = finding.value
    return Judgement(
        decision=Decision.all_of(finding.decision for finding in findings),
        measured={
            **{finding.metric: finding.value for finding in findings if finding.slice is None},
            "every_slice": slices,
            "rows": len(results.predictions),
            **results.sources(rules),
        },
        threshold={
            **{name: rule.bound for name, rule in rules.items()},
            "every_slice": {
                name: rule.every_slice
                for name, rule in rules.items()
                if rule.every_slice is not None
            },
            "confidence": results.spec.gates.confidence,
        },
        reason=_reason(findings),
        findings=findings,
        advice=_advice(findings),
    )


def judge_fairness(results: Results, gate: FairnessGate | None) -> Judgement:
    """No slice is much worse than another; slices too small to say so leave it undecided."""
    if gate is None:
        found = results.slices
        return Judgement(
            decision=Decision.of(len(found) < 2),
            measured={"slices": found},
            threshold={"slices": "at most one"},
            reason="The data have no slices to compare."
            if len(found) < 2
            else f"The spec compares no slices, but the data have {', '.join(found)}.",
            advice=None if len(found) < 2 else "fix: set gates.fairness in the spec",
        )
    wanted = gate.slices or tuple(results.slices)
    counts = {name: _right(results.sample(gate.metric, name)) for name in wanted}
    gap = largest_gap(counts, results.spec.gates.confidence, gate.minimum_slice)
    finding = Finding(
        metric=f"largest gap of {gate.metric}",
        value=gap.estimate.value,
        interval=gap.estimate.interval,
        n=gap.estimate.n,
        threshold=f"{AT_MOST} {gate.largest_gap:g}",
        decision=decide_gap(gap, gate.largest_gap),
        note=gap.estimate.note
        or (f"too few rows: {', '.join(gap.undecided)}" if gap.undecided else "")
        or f"{gap.best} is best, {gap.worst} is worst",
    )
    shares = {
        name: right / rows if rows else None for name, (right, rows) in sorted(counts.items())
    }
    return Judgement(
        decision=finding.decision,
        measured={"largest_gap": gap.estimate.value, "slices": shares},
        threshold={"largest_gap": gate.largest_gap, "minimum_slice": gate.minimum_slice},
        reason=_reason((finding,)),
        findings=(finding,),
        advice=_advice((finding,)),
    )


def judge_regression(
    candidate: Results, baseline: Baseline | None, evaluated: Path | None
) -> Judgement:
    """No metric is worse than that of what serves by more than its margin, on the same rows.

    Args:
        baseline: what serves, read once; None if nothing does.
        evaluated: its evaluation on the candidate's data; None if it was not evaluated.

    Raises:
        SpecError: a metric of one's own cannot be imported.
        DataError: the predictions cannot be compared.
    """
    margins = {
        name: rule.regression
        for name, rule in candidate.spec.gates.accuracy.items()
        if rule.regression is not None
    }
    judged: dict[str, Any] = {
        "threshold": {**margins, "confidence": candidate.spec.gates.confidence},
        "baseline": NOTHING_SERVES if baseline is None else baseline.package,
    }
    if baseline is None or not margins:
        reason = "Nothing serves yet." if baseline is None else "The spec sets no margin."
        return Judgement(decision=Decision.PASSED, measured={}, reason=reason, **judged)
    if evaluated is None:
        return Judgement(
            decision=Decision.UNDECIDED,
            measured={"baseline": baseline.release},
            reason=f"{baseline.release}, which serves, was not evaluated on these data.",
            advice="materialize evaluation of this release again (`llmops release RELEASE`): it "
            "evaluates what serves, too",
            **judged,
        )
    other = Results(evaluated, candidate.spec, candidate.repository)
    check_same_rows(candidate.predictions, other.predictions)
    findings = tuple(_compared(candidate, other, name, margin) for name, margin in margins.items())
    return Judgement(
        decision=Decision.all_of(finding.decision for finding in findings),
        measured={
            **{finding.metric: finding.value for finding in findings},
            "baseline": baseline.release,
        },
        reason=f"Compared with {baseline.release}: {_reason(findings)}",
        findings=findings,
        advice=_advice(findings),
        **judged,
    )


def _findings(results: Results, name: str, rule: MetricBound) -> Iterator[Finding]:
    yield _finding(results, name, None, rule, rule.bound)
    if rule.every_slice is not None:
        for slice_name in results.slices:
            yield _finding(results, name, slice_name, rule, rule.every_slice)


def _finding(
    results: Results, name: str, slice_name: str | None, rule: MetricBound, bound: float
) -> Finding:
    confidence = results.spec.gates.confidence
    sample = results.sample(name, slice_name)
    estimate = estimate_of(sample, confidence, SEED)
    at_least = rule.at_least is not None
    decision = (decide_at_least if at_least else decide_at_most)(estimate, bound)
    return Finding(
        metric=name,
        slice=slice_name,
        value=estimate.value,
        interval=estimate.interval,
        n=estimate.n,
        threshold=f"{AT_LEAST if at_least else AT_MOST} {bound:g}",
        decision=decision,
        note=estimate.note
        or (_rows_needed(estimate, bound) if decision is Decision.UNDECIDED and at_least else ""),
    )


def _compared(candidate: Results, baseline: Results, name: str, margin: float) -> Finding:
    if isinstance(candidate.spec.metric(name), HarnessMetric):
        from llmops_assets.develop.harness import check_same_task

        check_same_task(candidate.directory, baseline.directory, name)
    comparison = compare_paired(
        candidate.sample(name),
        baseline.sample(name),
        margin=margin,
        confidence=candidate.spec.gates.confidence,
        seed=SEED,
        higher_is_better=candidate.spec.higher_is_better(name),
    )
    return Finding(
        metric=f"regression of {name}",
        value=comparison.regression.value,
        interval=comparison.regression.interval,
        n=comparison.regression.n,
        threshold=f"{AT_MOST} {margin:g}",
        decision=comparison.decision,
        note=comparison.regression.note
        or f"a candidate that is as good fails with a probability of at most "
        f"{comparison.false_alarm_rate:g}",
    )


def _right(sample: Sample) -> tuple[int, int]:
    """How many rows are right, of how many; a row without a score is not."""
    return sum(1 for score in sample.scores if score == 1), len(sample.scores)


def _reason(findings: Sequence[Finding]) -> str:
    """What did not pass; or else everything, of the slices only the worst."""
    told = [finding for finding in findings if finding.decision is not Decision.PASSED]
    if told:
        return "; ".join(_sentence(finding) for finding in told) + "."
    nearest: dict[tuple[str, bool], Finding] = {}
    for finding in findings:
        place = finding.metric, finding.slice is None
        nearest[place] = min(nearest.get(place, finding), finding, key=_room)
    return "; ".join(_sentence(finding) for finding in nearest.values()) + "."


def _room(finding: Finding) -> float:
    """How far a value that passed is from failing: the least is the worst."""
    value = math.inf if finding.value is None else finding.value
    return value if finding.threshold.startswith(AT_LEAST) else -value


def _sentence(finding: Finding) -> str:
    where = "" if finding.slice is None else f" in slice {finding.slice}"
    value = "unknown" if finding.value is None else f"{finding.value:.4g}"
    asked = (
        f"{finding.metric}{where} is {value}{_between(finding.interval)} over {finding.n} rows, "
        f"{finding.threshold} is asked"
    )
    return asked if finding.decision is Decision.PASSED else f"{asked}: {finding.decision}"


def _between(interval: Interval | None) -> str:
    return (
        ""
        if interval is None
        else f" ({interval.low:.4g} to {interval.high:.4g} at {interval.confidence:.0%})"
    )


def _advice(findings: Sequence[Finding]) -> str | None:
    """Where nothing failed and something is undecided: what would decide it."""
    found = {finding.decision for finding in findings}
    if Decision.FAILED in found or Decision.UNDECIDED not in found:
        return None
    notes = dict.fromkeys(
        finding.note for finding in findings if finding.decision is Decision.UNDECIDED
    )
    if any(finding.value is None and finding.n for finding in findings):
        return "mend what has no score: " + "; ".join(note for note in notes if note)
    return "not enough data to decide: give more evaluation rows or documents" + "".join(
        f"; {note}" for note in notes if note
    )


def _rows_needed(estimate: Estimate, bound: float) -> str:
    """How many rows would pass a share as it was measured."""
    value = estimate.value
    if value is None or value <= bound or value > 1:
        return ""
    n = estimate.n
    while n < MOST_ROWS:
        n = int(n * 1.1) + 1
        interval = proportion(min(n, round(value * n)), n, _confidence(estimate)).interval
        if interval is not None and interval.low >= bound:
            return f"about {n} rows decide a share like this one"
    return ""


def _confidence(estimate: Estimate) -> float:
    assert estimate.interval is not None
    return estimate.interval.confidence
