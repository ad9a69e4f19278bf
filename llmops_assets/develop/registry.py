"""The model registry: where a release gets its version number and data scientists look.

`ModelRegistry` is what the platform needs of one; MLflow implements it here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmops_assets.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

RELEASE_TAG = "llmops.release"


@dataclass(frozen=True)
class LossPoint:
    """Training loss after a number of optimiser steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    model: str
    version: int
    tags: Mapping[str, str]
    url: str


class ModelRegistry(Protocol):
    """Registers releases and keeps their training and evaluation for people to see.

    Every call may be repeated: a release has one run and at most one version.
    """

    def log_training(
        self, model: str, release: str, parameters: Mapping[str, Any], history: Sequence[LossPoint]
    ) -> str:
        """Records the loss curve. Returns the page that shows it.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...

    def log_evaluation(self, model: str, release: str, metrics: Mapping[str, float]) -> str:
        """Records metrics by name. Returns the page that shows them.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...

    def register(
        self, model: str, release: str, tags: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> Registered:
        """The release's version, made on the first call.

        Args:
            tags: digests of the checkpoint and data, the spec's commit.
            manifest: the checkpoint's file list, kept beside the version.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...

    def find(self, model: str, release: str) -> Registered | None:
        """The release's version as the registry holds it now.

        Raises:
            RegistryError: the registry does not answer, or holds several.
        """
        ...


class MLflowRegistry:
    """`ModelRegistry` on an MLflow server."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._url = url.rstrip("/")
        self._timeout_seconds = timeout_seconds

    def log_training(
        self, model: str, release: str, parameters: Mapping[str, Any], history: Sequence[LossPoint]
    ) -> str:
        from mlflow.entities import Metric, Param

        with self._client() as client:
            run = self._run(client, model, release)
            # Metrics are appended by MLflow, so a repeated call must not write again.
            logged = {metric.step for metric in client.get_metric_history(run, "training_loss")}
            client.log_batch(
                run,
                metrics=[
                    Metric("training_loss", point.loss, timestamp=0, step=point.step)
                    for point in history
                    if point.step not in logged
                ],
                params=[Param(name, str(value)) for name, value in parameters.items()],
            )
            return self._run_url(client, run)

    def log_evaluation(self, model: str, release: str, metrics: Mapping[str, float]) -> str:
        from mlflow.entities import Metric

        with self._client() as client:
            run = self._run(client, model, release)
            logged = client.get_run(run).data.metrics
            client.log_batch(
                run,
                metrics=[
                    Metric(name, value, timestamp=0, step=0)
                    for name, value in metrics.items()
                    if name not in logged
                ],
            )
            return self._run_url(client, run)

    def register(
        self, model: str, release: str, tags: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> Registered:
        with self._client() as client:
            found = self._version(client, model, release)
            if found is None:
                run = self._run(client, model, release)
                client.log_dict(run, dict(manifest), "checkpoint/manifest.json")
                if not client.search_registered_models(f"name = '{model}'"):
                    client.create_registered_model(model)
                found = client.create_model_version(
                    model,
                    source=f"runs:/{run}/checkpoint",
                    run_id=run,
                    tags={**tags, RELEASE_TAG: release},
                )
                client.set_terminated(run, status="FINISHED")
            return self._registered(found)

    def find(self, model: str, release: str) -> Registered | None:
        with self._client() as client:
            found = self._version(client, model, release)
            return None if found is None else self._registered(found)

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        import os

        # MLflow reads these when it sends a request; its own retries take minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(self._timeout_seconds)))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            yield MlflowClient(tracking_uri=self._url, registry_uri=self._url)
        except MlflowException as error:
            raise RegistryError(
                f"MLflow at {self._url} did not do what was asked",
                found=error,
                cure="check with `llmops status` that MLflow runs, then materialize again",
            ) from error

    def _run(self, client: MlflowClient, model: str, release: str) -> str:
        """The release's run in the model's experiment, made on the first call."""
        experiment = client.get_experiment_by_name(model)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(model)
        runs = client.search_runs([experiment_id], f"tags.`{RELEASE_TAG}` = '{release}'")
        if runs:
            return runs[0].info.run_id
        run = client.create_run(experiment_id, run_name=release, tags={RELEASE_TAG: release})
        return run.info.run_id

    def _version(self, client: MlflowClient, model: str, release: str) -> ModelVersion | None:
        found = client.search_model_versions(
            f"name = '{model}' and tags.`{RELEASE_TAG}` = '{release}'"
        )
        if len(found) > 1:
            raise RegistryError(
                f"MLflow holds several versions of {model} for one release",
                expected=f"one version tagged {RELEASE_TAG}={release}",
                found=f"versions {sorted(int(version.version) for version in found)}",
                cure="delete the wrong ones in MLflow, or make a new release",
            )
        return found[0] if found else None

    def _registered(self, version: ModelVersion) -> Registered:
        return Registered(
            model=version.name,
            version=int(version.version),
            tags=dict(version.tags),
            url=f"{self._url}/#/models/{version.name}/versions/{version.version}",
        )

    def _run_url(self, client: MlflowClient, run: str) -> str:
        experiment_id = client.get_run(run).info.experiment_id
        return f"{self._url}/#/experiments/{experiment_id}/runs/{run}"
