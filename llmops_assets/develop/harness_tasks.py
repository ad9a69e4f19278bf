"""Tasks of EleutherAI's lm-evaluation-harness that a repository holds as YAML files.

The harness runs whatever such a file names: functions of Python files beside it, metrics
and data sets from the internet. Files are therefore read here, as plain data, and the
harness gets only keys that run nothing, with data from files of the same repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from llmops_assets.errors import DataError, SpecError
from llmops_assets.spec import HarnessMetric, canonical
from llmops_assets.storage.store import canonical_json, digest_of, hash_file
from llmops_assets.versions import versions_of

YAML_SUFFIXES = (".yaml", ".yml")
FORMATS = ("json", "parquet", "csv")
"""What `dataset_path` may be: the formats of files that the harness can read."""
KEYS = frozenset(
    {
        "task", "task_alias", "tag", "metadata", "output_type", "metric_list",
        "dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split",
        "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
        "num_fewshot", "fewshot_split", "fewshot_config", "fewshot_delimiter",
        "generation_kwargs", "gen_prefix", "filter_list",
    }
)  # fmt: skip
"""Keys of a task that only describe it; the harness knows more, which run code."""
DATASET_KEYS = frozenset({"data_files", "field", "delimiter"})
METRIC_CODE = "hf_evaluate"
"""Key of a metric that makes the harness download the metric's code."""


@dataclass(frozen=True)
class TaskFile:
    """A task from a YAML file.

    Attributes:
        configuration: for the harness, `include` merged and `data_files` absolute.
        files: the file itself, what it includes, and its data.
    """

    configuration: Mapping[str, Any]
    files: tuple[Path, ...]


def is_file(task: str) -> bool:
    """Whether a spec's task is a YAML file rather than the name of one of the harness's."""
    return task.endswith(YAML_SUFFIXES)


def read_task(task: str, repository: Path) -> TaskFile:
    """Reads a task's YAML file.

    Args:
        task: the file, relative to the repository's root.
        repository: folder of the spec's repository; nothing outside is read.

    Raises:
        SpecError: a file is missing, outside the repository or no valid YAML, or the task
            asks for code, for data from elsewhere, or for keys that are not known.
    """
    path = _inside(Path(task), repository, repository)
    files: list[Path] = []
    configuration = _read(path, repository, files)
    if not isinstance(configuration.get("task"), str):
        raise SpecError(
            f"The harness task {path} has no name",
            expected="task: and a name",
            found=repr(configuration.get("task")),
            cure="give it one",
        )
    if configuration.get("dataset_path") not in FORMATS or not _data_files(configuration):
        raise SpecError(
            f"The harness task {path} has no data of its own",
            expected=f"dataset_path: {' or '.join(FORMATS)}, and dataset_kwargs: data_files: with "
            "files relative to the YAML file",
            found=f"dataset_path: {configuration.get('dataset_path')}",
            cure="put the data into the repository",
        )
    return TaskFile(configuration, tuple(files))


def tool_arguments(metrics: Sequence[HarnessMetric], repository: Path, folder: Path) -> list[str]:
    """What an evaluation gets on its command line, so that it runs these tasks, too.

    Args:
        folder: where the metrics are written for it.
    """
    if not metrics:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "harness-metrics.json"
    file.write_text(json.dumps([canonical(metric) for metric in metrics]), encoding="utf-8")
    return ["--harness", str(file), "--repository", str(repository)]


def add_tool_options(parser: argparse.ArgumentParser) -> None:
    """The options that `tool_arguments` fills."""
    parser.add_argument("--harness", type=Path, help="JSON array of the spec's harness metrics")
    parser.add_argument("--repository", type=Path, help="folder of the spec's repository")


def read_metrics(file: Path | None) -> tuple[HarnessMetric, ...]:
    """The metrics that `tool_arguments` wrote; none without a file."""
    if file is None:
        return ()
    return TypeAdapter(tuple[HarnessMetric, ...]).validate_json(file.read_bytes())


def task_digests(metrics: Iterable[HarnessMetric], repository: Path) -> list[str]:
    """`task_digest` of each."""
    return [task_digest(metric, repository) for metric in metrics]


def hold_tasks_still(
    metrics: Iterable[HarnessMetric], repository: Path, digests: Sequence[str]
) -> None:
    """Checks that tasks are what they were when their digests were taken.

    Raises:
        DataError: one changed while it was run; what was measured has no name.
    """
    if (actual := task_digests(metrics, repository)) != list(digests):
        raise DataError(
            "A task of the harness changed while it was run",
            expected=digests,
            found=actual,
            cure="wait until nobody writes there, then materialize the asset again",
        )


def task_digest(metric: HarnessMetric, repository: Path) -> str:
    """Digest of all that the metric's scores depend on, but for the model.

    For a task of the harness itself that is its name and the harness's version; the data
    it takes from the machine's Hugging Face cache are not covered.

    Raises:
        SpecError: as `read_task`.
    """
    files = read_task(metric.task, repository).files if is_file(metric.task) else ()
    root = repository.resolve()
    return digest_of(
        canonical_json(
            {
                "metric": canonical(metric),
                "files": {file.relative_to(root).as_posix(): hash_file(file) for file in files},
                **versions_of("lm_eval"),
            }
        )
    )


def _read(path: Path, repository: Path, files: list[Path]) -> dict[str, Any]:
    """A file's configuration, what it includes below its own keys; notes what it rests on."""
    if path in files:
        raise SpecError(
            f"The harness task {path} includes itself",
            expected="files that include each other in one direction",
            found=" > ".join(file.name for file in [*files, path]),
            cure="take one include out",
        )
    files.append(path)
    own = _plain_yaml(path)
    included = own.pop("include", [])
    configuration: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        inner = _inside(Path(str(name)), path.parent, repository)
        configuration |= _read(inner, repository, files)
    _check_keys(path, own)
    if "dataset_kwargs" in own:
        data_files = _absolute(own["dataset_kwargs"].get("data_files"), path, repository)
        own["dataset_kwargs"] = {**own["dataset_kwargs"], "data_files": data_files}
        files.extend(file for file in map(Path, _names(data_files)) if file not in files)
    return configuration | own


def _plain_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(
            f"The harness task {path} cannot be read",
            expected="YAML of plain values; !function and other tags run code, so they are refused",
            found=error,
            cure="write templates instead of functions, or a metric of your own as "
            "`function: package.module:name` in the spec",
        ) from error
    if not isinstance(content, dict):
        raise SpecError(
            f"The harness task {path} is not a task",
            expected="a mapping of keys",
            found=type(content).__name__,
            cure="see the harness's guide to task files",
        )
    return content


def _check_keys(path: Path, configuration: Mapping[str, Any]) -> None:
    data = configuration.get("dataset_kwargs", {})
    metrics = configuration.get("metric_list", [])
    if (
        not isinstance(data, dict)
        or not isinstance(metrics, list)
        or not all(isinstance(metric, dict) for metric in metrics)
    ):
        raise SpecError(
            f"The harness task {path} is malformed",
            expected="dataset_kwargs: a mapping, and metric_list: a list of mappings",
            found=f"{type(data).__name__} and {type(metrics).__name__}",
            cure="see the harness's guide to task files",
        )
    unknown = [
        *(str(key) for key in configuration.keys() - KEYS),
        *(f"dataset_kwargs.{key}" for key in data.keys() - DATASET_KEYS),
        *(f"metric_list.{METRIC_CODE}" for metric in metrics if METRIC_CODE in metric),
    ]
    if unknown:
        raise SpecError(
            f"The harness task {path} asks for what a repository's task may not",
            expected=f"keys among {', '.join(sorted(KEYS))}",
            found=", ".join(sorted(unknown)),
            cure="take it out: it could run code or fetch data that nobody reviewed",
        )


def _data_files(configuration: Mapping[str, Any]) -> object:
    return configuration.get("dataset_kwargs", {}).get("data_files")


def _absolute(data_files: object, path: Path, repository: Path) -> Any:
    """The same structure with paths that the harness finds from anywhere."""
    if isinstance(data_files, dict):
        return {split: _absolute(files, path, repository) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(file, path, repository) for file in data_files]
    if not isinstance(data_files, str):
        raise SpecError(
            f"The harness task {path} does not say where its data are",
            expected="dataset_kwargs: data_files: a file, a list of files, or one by split",
            found=repr(data_files),
            cure="name files relative to the YAML file",
        )
    return str(_inside(Path(data_files), path.parent, repository))


def _names(data_files: Any) -> Iterator[str]:
    if isinstance(data_files, str):
        yield data_files
        return
    for files in data_files.values() if isinstance(data_files, dict) else data_files:
        yield from _names(files)


def _inside(name: Path, folder: Path, repository: Path) -> Path:
    """The file that a name means, links followed.

    Raises:
        SpecError: it is not a file, or outside the repository.
    """
    found = (folder / name).resolve()
    if not found.is_relative_to(repository.resolve()) or not found.is_file():
        raise SpecError(
            f"A harness task names {name}, which is not in the repository",
            expected=f"a file below {repository}",
            found=f"{found}, " + ("no file" if not found.is_file() else "a file elsewhere"),
            cure="correct the name, or put the file into the repository",
        )
    return found
