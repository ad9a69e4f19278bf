"""Gates of Develop: exactly at the threshold passes, anything unknown does not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.judgements import judge_accuracy, judge_leakage
from llmops_assets.spec import AccuracyGate

GATE = AccuracyGate(exact_match=0.9, every_slice=0.8)
NAN = math.nan


def metrics(folder: Path, overall: float, **slices: float) -> Path:
    path = folder / "metrics.json"
    content = {
        "rows": 10,
        "exact_match": overall,
        "slices": {name: {"rows": 5, "exact_match": value} for name, value in slices.items()},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("overall", "slices", "passed"),
    [
        (0.9, {"de": 0.8, "fr": 1.0}, True),
        (math.nextafter(0.9, 0), {"de": 1.0, "fr": 1.0}, False),
        (1.0, {"de": 1.0, "fr": math.nextafter(0.8, 0)}, False),
        (NAN, {"de": 1.0, "fr": 1.0}, False),
        (1.0, {"de": NAN, "fr": 1.0}, False),
        (1.0, {"de": 1.0, "fr": NAN}, False),
        (1.0, {"de": 0.9, "fr": NAN, "it": 0.85}, False),
    ],
)
def test_accuracy(tmp_path: Path, overall: float, slices: dict[str, float], passed: bool) -> None:
    """A diverged model measures NaN somewhere, and NaN compares as neither less nor more."""
    assert judge_accuracy(metrics(tmp_path, overall, **slices), GATE).passed is passed


def test_accuracy_names_the_worst_slice(tmp_path: Path) -> None:
    """Who reads the failure must know for whom the model is bad."""
    judgement = judge_accuracy(metrics(tmp_path, 0.95, de=0.97, fr=0.4, it=0.96), GATE)
    assert not judgement.passed
    assert "0.4000 in the worst slice, fr" in judgement.reason
    assert judgement.measured["every_slice"] == {"de": 0.97, "fr": 0.4, "it": 0.96}
    assert judgement.threshold == {"exact_match": 0.9, "every_slice": 0.8}
    assert set(judgement.threshold) <= set(judgement.measured)


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
