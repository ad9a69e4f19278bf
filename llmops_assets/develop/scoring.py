"""The metrics that gates judge, by name, computed from a table of predictions.

A table of predictions is described in `metrics`. What is built in:

| name | a row's score | the metric | better |
|---|---|---|---|
| `exact_match` | answer equals completion, as `correct` says | mean | higher |
| `accuracy` | the same label, but for case and white space around it | mean | higher |
| `macro_f1` | the same | mean over labels of their F1 | higher |
| `loss` | negative log-likelihood, nats | sum divided by all tokens | lower |
| `perplexity` | the same | exponential of the loss | lower |

Labels are the completions that occur; an answer that is none of them counts as wrong.

`package.module:function` names a metric of one's own. The function gets the table and
returns either one number per row, whose mean is the metric, or the metric itself, one
number. The latter is computed some hundred times, on resampled rows, to get an interval:
return one number per row where the metric is a mean. It must depend on nothing but the
table.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops_assets.develop.metrics import PREDICTION_COLUMNS, perplexity
from llmops_assets.errors import DataError, SpecError
from llmops_assets.evidence.statistics import (
    MINIMUM_RESAMPLES,
    Sample,
)
from llmops_assets.storage.store import hash_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from llmops_assets.evidence.statistics import Rows

CUSTOM_METRIC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
ROW_COLUMNS = ("prompt", "completion", "slice")
"""What two tables must share to be about the same rows."""


@dataclass(frozen=True)
class Metric:
    """A metric: its name, its direction, and how a valid table becomes a sample."""

    name: str
    higher_is_better: bool
    sample: Callable[[pd.DataFrame], Sample]
    source: str | None = None
    """Digest of the file that a metric of one's own is written in."""

    def sample_of(self, predictions: pd.DataFrame) -> Sample:
        """What the metric sees of each row.

        Raises:
            DataError: a column is missing, or a custom metric returns something else than
                one number or one per row.
        """
        _check_table(predictions)
        return self.sample(predictions)


def metric_named(
    name: str, repository: Path | None = None, higher_is_better: bool = True
) -> Metric:
    """A built-in metric, or one's own as `package.module:function`.

    Args:
        repository: folder of the spec's repository, from which modules may be imported
            beside installed packages.
        higher_is_better: direction of a metric of one's own; built-in ones know theirs.

    Raises:
        SpecError: there is no such metric, or it cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    if not CUSTOM_METRIC.fullmatch(name):
        raise SpecError(
            "A metric of the spec is not known",
            expected=f"one of {', '.join(METRICS)}, or package.module:function",
            found=repr(name),
            cure="correct its name",
        )
    function = _imported(name, repository)
    return Metric(name, higher_is_better, partial(_custom, name, function), _source(function))


def check_same_rows(candidate: pd.DataFrame, baseline: pd.DataFrame) -> None:
    """Checks that two tables are about the same rows in the same order.

    Raises:
        DataError: they are not, so nothing of them can be compared.
    """
    for column in ROW_COLUMNS:
        if candidate[column].tolist() != baseline[column].tolist():
            raise DataError(
                "Candidate and baseline were not evaluated on the same rows",
                expected=f"equal {column} in equal order, {len(baseline)} rows",
                found=f"{len(candidate)} rows with another {column}",
                cure="evaluate the baseline on the candidate's evaluation data",
            )


def _check_table(predictions: pd.DataFrame) -> None:
    missing = [column for column in PREDICTION_COLUMNS if column not in predictions.columns]
    if missing:
        raise DataError(
            "A table of predictions lacks columns",
            expected=", ".join(PREDICTION_COLUMNS),
            found=f"no {', '.join(missing)}",
            cure="evaluate again",
        )
    if predictions[list(ROW_COLUMNS)].isna().any(axis=None):
        raise DataError(
            "A table of predictions has rows that are no evaluation data",
            expected=f"a text in each of {', '.join(ROW_COLUMNS)}",
            found="null",
            cure="evaluate again on valid evaluation data",
        )


def _exact_match(predictions: pd.DataFrame) -> Sample:
    return Sample(predictions["correct"].to_numpy(dtype=float, na_value=float("nan")))


def _accuracy(predictions: pd.DataFrame) -> Sample:
    truth, answers = _labels(predictions)
    return Sample((truth == answers).astype(float))


def _macro_f1(predictions: pd.DataFrame) -> Sample:
    import numpy as np

    truth, answers = _labels(predictions)
    labels = int(truth.max(initial=-1)) + 1

    def statistic(rows: Rows) -> float:
        # scikit-learn's f1_score takes 1.5 ms, most of it checks; here it runs thousands
        # of times.
        expected = np.bincount(truth[rows], minlength=labels)
        answered = np.bincount(answers[rows] + 1, minlength=labels + 1)[1:]
        right = np.bincount(truth[rows][truth[rows] == answers[rows]], minlength=labels)
        occurs = expected > 0
        return float((2 * right[occurs] / (expected + answered)[occurs]).mean())

    return Sample((truth == answers).astype(float), statistic)


def _labels(predictions: pd.DataFrame) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Number of the label of each completion and each answer; -1: not a label."""
    import pandas as pd

    truth, labels = pd.factorize(predictions["completion"].str.strip().str.casefold(), sort=True)
    answers = pd.Index(predictions["prediction"].str.strip().str.casefold())
    return truth, pd.Index(labels).get_indexer(answers)


def _loss(predictions: pd.DataFrame) -> Sample:
    loss = predictions["loss"].to_numpy(dtype=float, na_value=float("nan"))
    tokens = predictions["tokens"].to_numpy(dtype=float, na_value=float("nan"))
    return Sample(loss, lambda rows: float(loss[rows].sum() / tokens[rows].sum()))


def _perplexity(predictions: pd.DataFrame) -> Sample:
    mean = _loss(predictions)
    assert mean.statistic is not None
    of_rows = mean.statistic
    return Sample(mean.scores, lambda rows: perplexity(of_rows(rows)))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", True, _exact_match),
        Metric("accuracy", True, _accuracy),
        Metric("macro_f1", True, _macro_f1),
        Metric("loss", False, _loss),
        Metric("perplexity", False, _perplexity),
    )
}
"""The built-in metrics, by name."""


def _custom(
    name: str, function: Callable[[pd.DataFrame], Any], predictions: pd.DataFrame
) -> Sample:
    import numpy as np

    found = function(predictions)
    if isinstance(found, Real) and not isinstance(found, bool):

        def statistic(rows: Rows) -> float:
            return float(function(predictions.iloc[rows].reset_index(drop=True)))

        # What such a metric sees of a row is not known; which rows are right is near it.
        return Sample(_exact_match(predictions).scores, statistic, resamples=MINIMUM_RESAMPLES)
    scores = np.asarray(found)
    if scores.shape != (len(predictions),) or scores.dtype.kind not in "biuf":
        raise DataError(
            f"The metric {name} returned something else than numbers",
            expected=f"one number, or {len(predictions)} numbers, one per row",
            found=f"{type(found).__name__} of shape {scores.shape} and type {scores.dtype}",
            cure="mend the metric's function",
        )
    return Sample(scores.astype(float))


def _source(function: Callable[..., Any]) -> str | None:
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return None if file is None else hash_file(Path(file))


def _imported(name: str, repository: Path | None) -> Callable[[pd.DataFrame], Any]:
    module_name, _, function_name = name.partition(":")
    if repository is not None and str(repository.resolve()) not in sys.path:
        # Behind installed packages, so that none of its files shadows one; and to stay, as
        # a metric may import its own modules only when it is called.
        sys.path.append(str(repository.resolve()))
    try:
        _check_origin(name, module_name.partition(".")[0], repository)
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise SpecError(
            f"The metric {name} cannot be imported",
            expected=f"a module {module_name} in {_places(repository)}",
            found=f"{type(error).__name__}: {error}",
            cure="correct the name, mend the module, or install what it needs",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SpecError(
            f"The metric {name} is not a function",
            expected=f"a function {function_name} in {module.__file__}",
            found="nothing of that name" if function is None else type(function).__name__,
            cure="correct the name after the colon",
        )
    return function


def _check_origin(name: str, package: str, repository: Path | None) -> None:
    """Refuses modules from the working directory or wherever else Python happens to look."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    # A package without an __init__.py has no file, but may have several folders.
    places = [found.origin or ""] if found.has_location else found.submodule_search_locations
    allowed = [Path(folder).resolve() for folder in site.getsitepackages()]
    if repository is not None:
        allowed.append(repository.resolve())
    if places and all(
        any(Path(place).resolve().is_relative_to(folder) for folder in allowed) for place in places
    ):
        return
    raise SpecError(
        f"The metric {name} comes from a place that is not reviewed with the spec",
        expected=f"a module in {_places(repository)}",
        found=", ".join(places or []) or found.origin,
        cure="move it into the spec's repository, or make it an installed package",
    )


def _places(repository: Path | None) -> str:
    return f"{repository} or an installed package" if repository else "an installed package"
