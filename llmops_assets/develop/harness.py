"""Tasks of EleutherAI's lm-evaluation-harness as metrics of the spec: one score per document.

Of the harness are the tasks: prompts, few-shot examples, answer filters, scores. Models
are ours, see `harness_model`. A gate judges the mean over documents with its interval, so
only metrics that are a mean over documents are taken.
"""

from __future__ import annotations

import functools
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmops_assets.develop.harness_tasks import is_file, read_task, task_digest
from llmops_assets.errors import DataError, SpecError
from llmops_assets.spec import HarnessMetric
from llmops_assets.tools import report_progress
from llmops_assets.versions import versions_of

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SCORES_FILE = "harness.parquet"
SUMMARY_FILE = "harness.json"
NO_FILTER = "none"
"""What the harness calls the filter of a task that has none."""
FEW_SHOT_SEED = 1234
"""The harness's own, which published figures are made with."""


def run_tasks(model: LM, metrics: Sequence[HarnessMetric], repository: Path, output: Path) -> None:
    """Writes `harness.parquet` and `harness.json`.

    The former has columns `metric` (its name in the spec), `document` (its number in the
    task, from 0) and `score`; the latter says how they were measured.

    Args:
        model: see `harness_model`.
        metrics: what to measure; those of one task with one limit are measured together.
        repository: folder of the spec's repository, where YAML files of tasks are.
        output: directory to write to; must exist.

    Raises:
        SpecError: there is no such task or metric, the metric is not a mean over
            documents, or the task would run code that nobody reviewed.
        DataError: the task's data are not there or do not fit the task or the model.
    """
    import pyarrow
    import pyarrow.parquet

    _render_in_sandbox()
    together: dict[tuple[str, int | None], list[HarnessMetric]] = {}
    for metric in metrics:
        together.setdefault((metric.task, metric.limit), []).append(metric)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {**versions_of("lm_eval"), "metrics": {}}
    with tempfile.TemporaryDirectory() as cache:
        # All are loaded first, so that a mistake in the last does not cost the others' time.
        tasks = {key: _load(key[0], repository, Path(cache)) for key in together}
        for key, task in tasks.items():
            for metric in together[key]:
                _check_metric(metric, task)
        for done, (key, task) in enumerate(tasks.items(), start=1):
            results = _evaluate(model, task, limit=key[1])
            for metric in together[key]:
                measured = _scores(metric, results["samples"][task.task_name])
                rows.extend(
                    {"metric": metric.name, "document": document, "score": score}
                    for document, score in measured.items()
                )
                summary["metrics"][metric.name] = {
                    "task": metric.task,
                    "digest": task_digest(metric, repository),
                    "version": results["versions"].get(task.task_name),
                    "metric": metric.metric,
                    "documents": len(measured),
                    "value": math.fsum(measured.values()) / len(measured),
                }
            report_progress(phase="harness", step=done, of=len(tasks))
    schema = pyarrow.schema(
        {"metric": pyarrow.string(), "document": pyarrow.int64(), "score": pyarrow.float64()}
    )
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=schema), output / SCORES_FILE
    )
    (output / SUMMARY_FILE).write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def scores(directory: Path, name: str) -> list[float]:
    """A metric's scores as `run_tasks` wrote them to `directory`, by document.

    Raises:
        DataError: the metric was not measured there.
    """
    import pyarrow.parquet

    file = directory / SCORES_FILE
    rows = pyarrow.parquet.read_table(file).to_pylist() if file.is_file() else []
    found = {row["document"]: row["score"] for row in rows if row["metric"] == name}
    if not found:
        raise DataError(
            f"The metric {name} was not measured",
            expected=f"its scores in {file}",
            found=", ".join(sorted({row["metric"] for row in rows})) or "no scores",
            cure="evaluate again",
        )
    return [found[document] for document in sorted(found)]


def check_same_task(candidate: Path, baseline: Path, name: str) -> None:
    """Checks that two models were asked the same documents for a metric.

    Raises:
        DataError: the task has changed between the two.
    """
    digests = [
        json.loads((directory / SUMMARY_FILE).read_text("utf-8"))["metrics"][name]["digest"]
        for directory in (candidate, baseline)
    ]
    if digests[0] != digests[1]:
        raise DataError(
            f"The task of metric {name} has changed since the candidate was evaluated",
            expected=digests[0],
            found=digests[1],
            cure="make a new release: it is evaluated on the task as it is now",
        )


def _render_in_sandbox() -> None:
    """Makes the harness render templates where they cannot reach Python's internals.

    Its own environment lets a template call anything, which makes a task file a program.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline
        )
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox


def _load(name: str, repository: Path, cache: Path) -> Task:
    """The task with its data.

    Args:
        cache: where data from files are prepared; a cache of earlier runs could be stale.
    """
    import jinja2
    from datasets.exceptions import DatasetsError
    from lm_eval.api.task import ConfigurableTask

    try:
        if is_file(name):
            configuration = dict(read_task(name, repository).configuration)
            _check_metrics_are_the_harness_s(name, configuration)
            configuration["dataset_kwargs"] |= {"cache_dir": str(cache)}
            task: Task = ConfigurableTask(config=configuration)
        else:
            task = _task_named(name)
    except (DatasetsError, OSError) as error:
        raise _no_data(name, error) from error
    except (
        KeyError, ValueError, TypeError, AttributeError, IndexError, ImportError, SyntaxError,
        jinja2.TemplateError,
    ) as error:  # fmt: skip
        raise SpecError(
            f"The harness cannot make a task of {name}",
            expected="a task as the harness's guide to task files describes it",
            found=f"{type(error).__name__}: {_first_line(error)}",
            cure="correct the task, or the name in the spec",
        ) from error
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEW_SHOT_SEED)
    return task


def _no_data(name: str, error: Exception) -> DataError:
    problem = f"The data of the harness task {name} cannot be read"
    if is_file(name):
        return DataError(
            problem,
            expected="files in the format that its dataset_path names",
            found=_first_line(error),
            cure="mend the files, or correct dataset_path",
        )
    return DataError(
        problem,
        expected="them in this machine's Hugging Face cache; nothing is downloaded on the way",
        found=_first_line(error),
        cure="fetch them once by hand: python -m lm_eval run --model dummy --limit 1 --tasks "
        f"{name}; or put a YAML task with its data into the repository",
    )


def _task_named(name: str) -> Task:
    """One of the harness's own tasks.

    Raises:
        SpecError: there is none of that name, it stands for several, or is not safe to run.
    """
    manager = _harness_tasks()
    if name not in manager.all_subtasks:
        several = name in manager.all_groups or name in manager.all_tags
        raise SpecError(
            f"{name} is not a task of the harness",
            expected="the name of one task, or a YAML file of the repository",
            found="a name that stands for several tasks" if several else "no such name",
            cure="choose a name that `python -m lm_eval ls subtasks` prints",
        )
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise SpecError(
            f"The harness task {name} runs code that the model writes",
            expected="a task that only compares answers",
            found="unsafe_code: true",
            cure="choose another task",
        )
    return manager.load([name])["tasks"][name]


@functools.cache
def _harness_tasks() -> TaskManager:
    """All of the harness's own; it takes seconds to read their files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_metrics_are_the_harness_s(name: str, configuration: Mapping[str, Any]) -> None:
    """Refuses metrics that the harness would look for elsewhere, and run what it finds."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    for metric in configuration.get("metric_list", []):
        if metric.get("metric") not in metric_registry:
            raise SpecError(
                f"The harness task {name} has a metric that the harness does not have",
                expected=f"one of {', '.join(sorted(metric_registry))}",
                found=metric.get("metric"),
                cure="choose another, or write a metric of your own as "
                "`function: package.module:name` in the spec",
            )


def _check_metric(metric: HarnessMetric, task: Task) -> None:
    """Checks before hours of evaluation that there will be a score per document."""
    from lm_eval.api.metrics import mean
    from lm_eval.api.registry import metric_agg_registry

    name, _, wanted = metric.metric.partition(",")
    # The harness declares these without a type.
    aggregations: Mapping[str, Any] = cast("Any", task).aggregation()
    higher: Mapping[str, bool] = cast("Any", task).higher_is_better()
    filters = [entry["name"] for entry in task.config.filter_list or []] or [NO_FILTER]
    if name not in aggregations or (wanted or filters[0]) not in filters:
        raise SpecError(
            f"The harness task {metric.task} has no metric {metric.metric}",
            expected=" or ".join(_with_filter(key, filters) for key in aggregations),
            found=metric.metric,
            cure=f"correct `metric` of {metric.name} in the spec",
        )
    if not wanted and len(filters) > 1:
        raise SpecError(
            f"The harness task {metric.task} filters answers in several ways",
            expected=_with_filter(name, filters),
            found=metric.metric,
            cure=f"choose one as `metric` of {metric.name} in the spec",
        )
    # Without a rule of the task's own a document gets what the harness's metric needs, which
    # for f1 and its like is no number.
    own_rule = task.config.process_results is not None
    needs = mean if own_rule else metric_agg_registry.get(name, mean)
    rule = aggregations[name] if needs is mean else needs
    if rule is not mean:
        raise SpecError(
            f"The metric {metric.metric} of the harness task {metric.task} is not one of documents",
            expected="a metric that is the mean of a score per document, such as acc",
            found=f"one computed by {getattr(rule, '__name__', 'another rule')}",
            cure=f"choose another `metric` of {metric.name} in the spec",
        )
    if higher.get(name) is (not metric.higher_is_better):
        raise SpecError(
            f"The spec and the harness disagree about {metric.metric} of {metric.task}",
            expected=f"higher_is_better: {not metric.higher_is_better}",
            found=f"higher_is_better: {metric.higher_is_better}",
            cure=f"correct higher_is_better of {metric.name}; a gate would judge upside down",
        )


def _with_filter(metric: str, filters: Sequence[str]) -> str:
    if len(filters) == 1:
        return metric
    return " or ".join(f"{metric},{name}" for name in filters)


def _evaluate(model: LM, task: Task, limit: int | None) -> Mapping[str, Any]:
    import jinja2
    from lm_eval.evaluator import evaluate

    name = task.task_name
    random.seed(FEW_SHOT_SEED)  # tasks of the harness may shuffle choices
    try:
        results = evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (jinja2.TemplateError, SyntaxError, ValueError) as error:
        raise DataError(
            f"A document of the harness task {name} does not fit the task",
            expected="the columns and values that the task's templates use",
            found=f"{type(error).__name__}: {_first_line(error)}",
            cure="mend the document or the template",
        ) from error
    assert results is not None  # it is None only in other processes of several
    return results


def _scores(metric: HarnessMetric, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Score of each document by its number."""
    name, _, wanted = metric.metric.partition(",")
    found: dict[int, float] = {}
    for sample in samples:
        if wanted and sample["filter"] != wanted:
            continue
        score = sample.get(name)
        if not isinstance(score, Real) or not math.isfinite(score):
            raise DataError(
                f"The harness task {metric.task} gave a document no score",
                expected=f"a finite number as {metric.metric} of document {sample['doc_id']}",
                found=repr(score),
                cure="choose a metric that is one number per document, or mend the document",
            )
        found[int(sample["doc_id"])] = float(score)
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
