"""Where a checkpoint comes from: what each source depends on, and how it is brought in.

A step's action covers all that decides the bytes, so it can be compared with that of
another release before anything runs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from llmops_assets.develop.history import HISTORY_FILE, read_history
from llmops_assets.develop.sources import find_source, hold_still
from llmops_assets.errors import DataError, SettingsError, SpecError
from llmops_assets.settings import Settings
from llmops_assets.spec import (
    CommandWeights,
    HuggingFaceWeights,
    ImportedWeights,
    MLflowWeights,
    ModelSpec,
    TrainedWeights,
    canonical,
)
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action, Make, Workshop
from llmops_assets.storage.store import canonical_json, content_digest, digest_of, hash_file
from llmops_assets.tools import ToolRunner, module_command
from llmops_assets.versions import versions_of

CHECKPOINT_MEDIA_TYPE = "application/vnd.llmops.checkpoint.huggingface.v1"

MLFLOW_CREDENTIALS = (
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip
HUB_CREDENTIALS = ("HF_TOKEN",)
NETWORK = (
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""How a network is reached that is not open; only what fetches gets to know."""

NOT_CODE = {"__pycache__", ".git"}
"""Folders that change without the code: what Python compiled, what git keeps."""


@dataclass(frozen=True)
class Step:
    """How a checkpoint is made.

    `make` runs what the action describes; `fetched` is a folder that holds the bytes
    already, and that nothing needs once they are published.
    """

    action: Action
    make: Make
    fetched: Path | None = None


Tools = Callable[[Workshop], ToolRunner]
"""Gives the runner whose tools work in a workshop."""


def checkpoint_action(spec: ModelSpec, training_data: str, repository: Path) -> Action:
    """The action of weights that are trained, known before anything runs.

    Args:
        spec: with `weights` of source `train` or `command`.
        training_data: digest of the artifact.
        repository: folder of the release's code.

    Raises:
        SpecError: code of a command is missing or outside of the repository, or the weights
            are not trained.
    """
    weights = spec.weights
    inputs = {"training_data": training_data}
    if isinstance(weights, TrainedWeights):
        parameters = {"weights": canonical(weights), "max_tokens": _max_tokens(spec)}
        versions = {"train": "1", **versions_of("torch", "transformers", "tokenizers")}
        return Action("checkpoint", CHECKPOINT_MEDIA_TYPE, inputs, parameters, versions)
    if isinstance(weights, CommandWeights):
        parameters = {"weights": canonical(weights), "code": code_digests(weights, repository)}
        return Action("checkpoint", CHECKPOINT_MEDIA_TYPE, inputs, parameters, {"command": "1"})
    raise _other_source(spec, "train or command", "imported_action")


def imported_action(spec: ModelSpec, content: str | None = None) -> Action:
    """The action of weights that are taken as they are.

    Args:
        spec: with `weights` of source `path`, `mlflow` or `huggingface`.
        content: `content_digest` of the bytes. For the Hub none is needed, as the revision
            names them.

    Raises:
        SpecError: the weights are not imported.
    """
    weights = spec.weights
    if isinstance(weights, ImportedWeights):
        parameters: dict[str, Any] = {"content": content}
    elif isinstance(weights, MLflowWeights):
        model = weights.model or spec.name
        parameters = {"model": model, "version": weights.version, "content": content}
    elif isinstance(weights, HuggingFaceWeights):
        parameters = {"repository": weights.repository, "revision": weights.revision}
    else:
        raise _other_source(spec, "path, mlflow or huggingface", "checkpoint_action")
    return Action(
        asset="checkpoint",
        media_type=CHECKPOINT_MEDIA_TYPE,
        parameters=parameters,
        versions={"import": "1"},
    )


def trained(
    spec: ModelSpec, training_data: ArtifactHandle, repository: Path, tools: Tools, threads: int
) -> Step:
    """Weights trained by `develop/train.py`."""

    def make(workshop: Workshop) -> Mapping[str, Any]:
        run = tools(workshop).run(
            "training",
            module_command(
                "llmops_assets.develop.train",
                "--training-data", training_data.path,
                "--parameters", json.dumps(canonical(spec.weights)),
                "--max-tokens", str(_max_tokens(spec)),
                "--output", workshop.output,
                "--work", workshop.scratch / "resume",
                "--threads", str(threads),
            ),
        )  # fmt: skip
        return {"training_seconds": run.seconds, "final_loss": read_history(workshop.output)[-1][1]}

    return Step(checkpoint_action(spec, training_data.digest, repository), make)


def trained_by_command(
    spec: ModelSpec,
    weights: CommandWeights,
    training_data: ArtifactHandle,
    repository: Path,
    tools: Tools,
) -> Step:
    """Weights that a trainer of the spec's own writes.

    Raises:
        SpecError: code of the command is missing or outside of the repository.
    """
    from llmops_assets.develop.data import DATA_FILE

    action = checkpoint_action(spec, training_data.digest, repository)

    def make(workshop: Workshop) -> Mapping[str, Any]:
        from llmops_assets.develop.checkpoints import import_checkpoint

        environment = _named_environment(weights.environment)
        written = workshop.output.with_name("written")
        work = workshop.scratch / "work"
        work.mkdir(exist_ok=True)
        places = {
            "training_data": training_data.path / DATA_FILE, "output": written, "work": work
        }  # fmt: skip
        run = tools(workshop).run(
            "the trainer",
            [_filled(part, places) for part in weights.command],
            # The checkout is no place to write to.
            {"PYTHONDONTWRITEBYTECODE": "1", **environment},
            folder=repository,
            secrets=environment.values(),
        )
        _hold_code_still(weights, repository, action.parameters["code"])
        if not written.is_dir():
            raise DataError(
                "The trainer ended without an error and wrote no checkpoint",
                expected=f"a Hugging Face directory at {{output}}, here {written}",
                cure=f"read {run.log}, and have the trainer write there",
            )
        import_checkpoint(written, workshop.output)
        return {"training_seconds": run.seconds, "parameters": _sound(workshop.output)}

    return Step(action, make)


def from_path(
    spec: ModelSpec, weights: ImportedWeights, settings: Settings, repository: Path
) -> Step:
    """Weights from a local Hugging Face directory.

    Raises:
        DataError: it is missing, or where specs may not take from.
    """
    source = find_source(settings, weights.path, repository)
    action = imported_action(spec, content_digest(source))
    return Step(action, _taken_from(source, action, str(source)))


def from_mlflow(
    spec: ModelSpec, weights: MLflowWeights, url: str, folder: Path, tools: Tools
) -> Step:
    """Weights of a version in MLflow's registry.

    MLflow promises no digest, so they are fetched first, unless an attempt that was killed
    did so: the action names their content.

    Args:
        url: of MLflow.
        folder: of this release alone; kept from one attempt to the next.

    Raises:
        ToolError: they cannot be fetched.
    """
    model = weights.model or spec.name
    fetched, scratch = folder / "checkpoint", folder / "scratch"
    if not fetched.exists():
        environment, secrets = _fetching(MLFLOW_CREDENTIALS)
        # MLflow's own retries take minutes.
        retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
        tools(Workshop(scratch, fetched)).run(
            "fetching from MLflow",
            module_command(
                "llmops_assets.develop.fetch", "mlflow",
                "--url", url,
                "--model", model,
                "--version", str(weights.version),
                "--work", scratch / "download",
                "--output", fetched,
            ),
            {
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                **retries,
                **environment,
            },
            secrets=secrets,
        )  # fmt: skip
    action = imported_action(spec, content_digest(fetched))
    origin = f"models:/{model}/{weights.version} of MLflow"
    return Step(action, _taken_from(fetched, action, origin), fetched=folder)


def from_huggingface(spec: ModelSpec, weights: HuggingFaceWeights, tools: Tools) -> Step:
    """Weights from the Hugging Face Hub."""

    def make(workshop: Workshop) -> Mapping[str, Any]:
        environment, secrets = _fetching(
            (*HUB_CREDENTIALS, "HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"),
            HUB_CREDENTIALS,
        )
        tools(workshop).run(
            "fetching from the Hugging Face Hub",
            module_command(
                "llmops_assets.develop.fetch", "huggingface",
                "--repository", weights.repository,
                "--revision", weights.revision,
                "--work", workshop.scratch / "hub",
                "--output", workshop.output,
            ),
            {
                # The one tool that may ask the Hub.
                "HF_HUB_OFFLINE": "0",
                "TRANSFORMERS_OFFLINE": "0",
                # Files instead of links, and all of it where a killed attempt's is found.
                "HF_HUB_DISABLE_SYMLINKS": "1",
                "HF_HOME": str(workshop.scratch / "home"),
                "HF_HUB_DOWNLOAD_TIMEOUT": "60",
                "HF_HUB_ETAG_TIMEOUT": "60",
                **environment,
            },
            secrets=secrets,
        )  # fmt: skip
        return {"imported_from": f"{weights.repository} at {weights.revision}"}

    return Step(imported_action(spec), make)


def code_digests(weights: CommandWeights, repository: Path) -> dict[str, str]:
    """Digest of each of a command's files and folders, by their paths in the spec.

    Raises:
        SpecError: one is missing or outside of the repository, or holds a link that is.
    """
    return {path.as_posix(): _code_digest(path, repository) for path in weights.code}


def training_history(checkpoint: Path) -> list[tuple[int, float]] | None:
    """Optimiser steps and loss, if the trainer left a `history.json` such as ours."""
    path = checkpoint / HISTORY_FILE
    if not path.is_file():
        return None
    try:
        points = TypeAdapter(list[_Point]).validate_json(path.read_bytes())
    except ValidationError:
        return None  # another trainer may use the name for something else
    return [(point.step, point.loss) for point in points] or None


class _Point(BaseModel):
    step: int
    loss: float


def _max_tokens(spec: ModelSpec) -> int:
    return spec.constraints.max_input_tokens + spec.constraints.max_output_tokens


def _other_source(spec: ModelSpec, expected: str, function: str) -> SpecError:
    return SpecError(
        f"The weights of {spec.name} have another source",
        expected=expected,
        found=spec.weights.source,
        cure=f"use {function}",
    )


def _taken_from(source: Path, action: Action, origin: str) -> Make:
    def make(workshop: Workshop) -> Mapping[str, Any]:
        from llmops_assets.develop.checkpoints import import_checkpoint

        import_checkpoint(source, workshop.output)
        hold_still(workshop.output, action.parameters["content"])
        return {"imported_from": origin}

    return make


def _fetching(
    names: Iterable[str], secret: Iterable[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """What of our environment a fetch gets, and the values that may not be seen."""
    environment = _set(names) | _set(NETWORK)
    return environment, list(_set(names if secret is None else secret).values())


def _set(names: Iterable[str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _named_environment(names: Iterable[str]) -> dict[str, str]:
    environment = _set(names)
    if missing := sorted(set(names) - set(environment)):
        raise SettingsError(
            "The trainer needs environment variables that are not set",
            expected="those of weights.environment in the model's spec",
            found="no " + ", no ".join(missing),
            cure="set them where Dagster's runs start, or take them out of the spec",
        )
    return environment


def _filled(part: str, places: Mapping[str, Path]) -> str:
    """A part of a command line with paths in the place of `{name}`; other braces stay."""
    pattern = "|".join(places)
    return re.sub(rf"\{{({pattern})\}}", lambda found: str(places[found[1]]), part)


def _code_digest(path: Path, repository: Path) -> str:
    place = repository / path
    files = {
        file.relative_to(place).as_posix(): hash_file(file)
        for file in _code_files(place, repository.resolve())
    }
    if not files:
        raise SpecError(
            f"The command's code {path} is not in the repository",
            expected=f"a file, or a folder with files, below {repository}",
            found="nothing",
            cure="commit it, or correct weights.code in the model's spec",
        )
    return digest_of(canonical_json(files))


def _code_files(place: Path, repository: Path) -> Iterator[Path]:
    """The files that a path of a command's code means, each found to be in the repository."""
    for entry in (place, *sorted(place.rglob("*"))):
        if NOT_CODE & set(entry.relative_to(place).parts):
            continue
        inside = entry.resolve().is_relative_to(repository)
        if not inside or (entry.is_symlink() and not entry.is_file()):
            raise SpecError(
                f"The command's code holds {entry}, which is not of the repository",
                expected=f"files below {repository}, and links to such files",
                found=f"it leads to {entry.resolve()}",
                cure="put it into the repository itself, or correct weights.code in the spec",
            )
        if entry.is_file():
            yield entry


def _hold_code_still(weights: CommandWeights, repository: Path, digests: Mapping[str, str]) -> None:
    if (found := code_digests(weights, repository)) != digests:
        raise DataError(
            "The trainer's code changed while it ran",
            expected=digests,
            found=found,
            cure="have it write to {work} and {output} only; then materialize again",
        )


def _sound(checkpoint: Path) -> int:
    """Number of a checkpoint's parameters.

    What has problems is not published: the same action would give it to every release
    until somebody changes the code.

    Raises:
        DataError: it has problems.
    """
    from llmops_assets.develop.checkpoints import inspect

    report = inspect(checkpoint)
    if report.problems:
        raise DataError(
            "The trainer wrote no usable checkpoint",
            expected="a Hugging Face directory with safetensors and without code or pickles",
            found="; ".join(report.problems),
            cure="have it write only what `save_pretrained` of model and tokenizer writes",
        )
    return report.parameters
