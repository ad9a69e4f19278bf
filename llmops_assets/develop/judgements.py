"""How the gates of the Develop phase judge. Plain functions of artifacts and thresholds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.spec import AccuracyGate


def judge_leakage(training: Path, evaluation: Path) -> Judgement:
    """No prompt of the evaluation data occurs in the training data."""
    from llmops_assets.develop.data import leakage

    found = leakage(training, evaluation)
    return Judgement(
        passed=found.rows == 0,
        measured={"leaked_rows": found.rows, "examples": list(found.examples)},
        threshold={"leaked_rows": 0},
        reason=f"{found.rows} rows of the evaluation data occur in the training data.",
    )


def judge_checkpoint(checkpoint: Path) -> Judgement:
    """Formats are safe, weights are finite, the directory is whole."""
    from llmops_assets.develop.checkpoints import inspect

    report = inspect(checkpoint)
    return Judgement(
        passed=not report.problems,
        measured={"problems": list(report.problems), "parameters": report.parameters},
        threshold={"problems": []},
        reason="; ".join(report.problems)
        or f"{report.parameters} finite parameters in safetensors, and nothing else.",
    )


def judge_accuracy(metrics: Path, gate: AccuracyGate) -> Judgement:
    """Exact match overall and of the worst slice, from a metrics file's JSON.

    Args:
        metrics: JSON with `rows`, `exact_match` and `slices: {name: {rows, exact_match}}`.
    """
    found: Mapping[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    slices = {name: values["exact_match"] for name, values in found["slices"].items()}
    # A NaN compares as neither less nor more, so `min` may pass over it: it is the worst.
    worst = min(slices, key=lambda name: (slices[name] == slices[name], slices[name]))
    overall = found["exact_match"]
    return Judgement(
        passed=overall >= gate.exact_match and slices[worst] >= gate.every_slice,
        measured={"exact_match": overall, "every_slice": slices, "rows": found["rows"]},
        threshold={"exact_match": gate.exact_match, "every_slice": gate.every_slice},
        reason=f"Exact match is {overall:.4f} over {found['rows']} rows, "
        f"and {slices[worst]:.4f} in the worst slice, {worst}.",
    )
