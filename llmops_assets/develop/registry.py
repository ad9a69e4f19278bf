"""The model registry: where a release gets its version number and data scientists look.

`ModelRegistry` is what the platform needs of one; MLflow implements it here. Another one
is named by the setting `registry`, see docs/registries.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from llmops_assets.errors import RegistryError, SettingsError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.entities.paged_list import PagedList
    from mlflow.tracking import MlflowClient

    from llmops_assets.settings import Settings

T = TypeVar("T")

RELEASE_TAG = "llmops.release"
"""Names a version's release; versions that this platform registers have it from the start."""
MODELS_PER_CALL = 100
NEEDLESS_VERSIONS_PER_CALL = 50
VERSIONS_PER_CALL = 1000
LISTED_MODELS_PER_CALL = 1000  # the most that MLflow allows
LISTED_WEBHOOKS_PER_CALL = 100
MODELS_ASKED_ONE_BY_ONE = 20


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


class Readiness(StrEnum):
    """Whether a version's files are all in the registry."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"
    """They never will be."""


@dataclass(frozen=True)
class ListedVersion:
    """A version that somebody registered, with or without this platform."""

    model: str
    version: int
    readiness: Readiness
    registered_by: str | None
    release: str | None
    """The release that registered or adopted it; None for other people's versions."""


@runtime_checkable
class ModelRegistry(Protocol):
    """Registers releases and keeps their training and evaluation for people to see.

    Every call may be repeated: a release has one run and at most one version. Versions are
    numbers that grow within a model and are not used again.
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
        self,
        model: str,
        release: str,
        tags: Mapping[str, str],
        manifest: Mapping[str, Any],
        version: int | None = None,
    ) -> Registered:
        """The release's version, made on the first call.

        Args:
            model: the registered model's name.
            release: the release's key, kept as the version's tag `RELEASE_TAG`.
            tags: digests of the checkpoint and data, the spec's commit.
            manifest: the checkpoint's file list, kept beside the version.
            version: the version that the release was made from; it gets the tags, and no
                other one is made.

        Raises:
            RegistryError: the registry does not answer, `version` does not exist or is
                another release's, or the release has another version.
        """
        ...

    def find(self, model: str, release: str) -> Registered | None:
        """The release's version as the registry holds it now.

        Raises:
            RegistryError: the registry does not answer, or holds several.
        """
        ...

    def registered_since(self, seen: Mapping[str, int]) -> Sequence[ListedVersion]:
        """All versions above a number in each model, in any order.

        Args:
            seen: the number by model. Models that the registry does not know have no
                versions; versions of other models are not returned.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...

    def listed(self, model: str, version: int) -> ListedVersion | None:
        """One version as it is now; None when it is not there (any more).

        Raises:
            RegistryError: the registry does not answer.
        """
        ...

    def newest(self, models: Collection[str]) -> Mapping[str, int]:
        """The highest number of each of these models; those without a version are left out.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...


@runtime_checkable
class KeepsPages(Protocol):
    """What a `ModelRegistry` may be able to do as well: keep pages beside a release."""

    def log_page(self, model: str, release: str, name: str, html: str) -> str | None:
        """Keeps a page with the release's run. Returns where a browser shows it, or None if
        the release has no run.

        Raises:
            RegistryError: the registry does not answer.
        """
        ...


def custom_registry(settings: Settings) -> ModelRegistry:
    """The registry that the setting `registry` names, when that is not MLflow.

    Raises:
        SettingsError: the setting does not lead to a `ModelRegistry`.
    """
    module, _, name = settings.registry.partition(":")
    try:
        factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            "The model registry cannot be loaded",
            expected="LLMOPS_REGISTRY=mlflow, or package.module:factory that can be imported",
            found=f"LLMOPS_REGISTRY={settings.registry}: {error}",
            cure="install the package beside llmops-assets, or correct the setting",
        ) from error
    registry = factory(settings)
    if not isinstance(registry, ModelRegistry):
        raise SettingsError(
            f"{settings.registry} gave no model registry",
            expected="an object with the methods of llmops_assets.develop.registry.ModelRegistry",
            found=type(registry).__name__,
            cure="add the missing methods; docs/registries.md has a complete example",
        )
    return registry


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
        self,
        model: str,
        release: str,
        tags: Mapping[str, str],
        manifest: Mapping[str, Any],
        version: int | None = None,
    ) -> Registered:
        with self._client() as client:
            found = self._version(client, model, release)
            if version is not None:
                adopted = self._adoptable(client, model, release, version, found)
                run = self._run(client, model, release)
                client.log_dict(run, dict(manifest), "checkpoint/manifest.json")
                # The release's name last: what `find` finds has all of its tags.
                for name, value in {**tags, RELEASE_TAG: release}.items():
                    if adopted.tags.get(name) != value:
                        client.set_model_version_tag(model, str(version), name, value)
                client.set_terminated(run, status="FINISHED")
                found = client.get_model_version(model, str(version))
            elif found is None:
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

    def registered_since(self, seen: Mapping[str, int]) -> Sequence[ListedVersion]:
        with self._client() as client:
            # By number: a page's end may have come again with the next page.
            found = {
                (version.model, version.version): version
                for models, number in _calls(seen)
                for version in map(_listed, _above(client, models, number))
                if version.version > seen[version.model]
            }
            return list(found.values())

    def listed(self, model: str, version: int) -> ListedVersion | None:
        with self._client() as client:
            found = self._existing(client, model, version)
            return None if found is None else _listed(found)

    def newest(self, models: Collection[str]) -> Mapping[str, int]:
        # MLflow takes one name or none here.
        filters = (
            [f"name = '{model}'" for model in models]
            if len(models) <= MODELS_ASKED_ONE_BY_ONE
            else [None]
        )
        newest: dict[str, int] = {}
        with self._client() as client:
            for filter_string in filters:
                for listed in _pages(
                    partial(
                        client.search_registered_models,
                        filter_string,
                        LISTED_MODELS_PER_CALL,
                        None,
                    )
                ):
                    # One version of each stage that MLflow 2 knew.
                    numbers = [int(version.version) for version in listed.latest_versions or ()]
                    if listed.name in models and numbers:
                        newest[listed.name] = max(numbers)
        return newest

    def log_page(self, model: str, release: str, name: str, html: str) -> str | None:
        with self._client() as client:
            run = self._existing_run(client, model, release)
            if run is None:
                return None
            client.log_text(run, html, name)
            return f"{self._run_url(client, run)}/artifactPath/{name}"

    def send_webhooks(self, name: str, url: str, secret: str) -> None:
        """Makes MLflow tell `url` of every new version; a second call only corrects the first.

        Args:
            name: of the webhook in MLflow.
            url: of the receiver.
            secret: what MLflow signs with.

        Raises:
            RegistryError: MLflow does not answer, or cannot read the webhooks that it has.
        """
        with self._client() as client:
            for webhook in _pages(partial(client.list_webhooks, LISTED_WEBHOOKS_PER_CALL)):
                if webhook.name == name:
                    client.update_webhook(
                        webhook.webhook_id, url=url, secret=secret, status="ACTIVE"
                    )
                    return
            client.create_webhook(
                name,
                url,
                ["model_version.created"],
                description="Wakes the sensor that makes releases of registered versions.",
                secret=secret,
            )

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
                cure="check with `llmops status` that MLflow runs, then try again: materialize, "
                "or wait for the sensor's next tick",
            ) from error

    def _existing_run(self, client: MlflowClient, model: str, release: str) -> str | None:
        experiment = client.get_experiment_by_name(model)
        if experiment is None:
            return None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{RELEASE_TAG}` = '{release}'")
        return runs[0].info.run_id if runs else None

    def _run(self, client: MlflowClient, model: str, release: str) -> str:
        """The release's run in the model's experiment, made on the first call."""
        found = self._existing_run(client, model, release)
        if found is not None:
            return found
        experiment = client.get_experiment_by_name(model)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(model)
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

    def _adoptable(
        self,
        client: MlflowClient,
        model: str,
        release: str,
        version: int,
        found: ModelVersion | None,
    ) -> ModelVersion:
        """The version that the release was made from, if it is or may become the release's.

        Args:
            found: the version that carries the release's name now.
        """
        if found is not None and int(found.version) != version:
            raise RegistryError(
                f"Another version of {model} carries the name of {release}",
                expected=f"version {version} with the tag {RELEASE_TAG}={release}, or none",
                found=f"version {found.version}",
                cure=f"remove the tag {RELEASE_TAG} from version {found.version} in MLflow, then "
                "materialize again",
            )
        existing = self._existing(client, model, version)
        if existing is None:
            raise RegistryError(
                f"The version that {release} was made from is gone",
                expected=f"version {version} of {model} in MLflow",
                cure="register the weights again: the new version becomes a release of its own",
            )
        other = existing.tags.get(RELEASE_TAG, release)
        if other != release:
            raise RegistryError(
                f"Version {version} of {model} is another release's",
                expected=f"the tag {RELEASE_TAG}={release}, or none",
                found=f"{RELEASE_TAG}={other}",
                cure=f"go on with {other}, or remove the tag in MLflow if somebody put it there "
                "by hand",
            )
        return existing

    def _existing(self, client: MlflowClient, model: str, version: int) -> ModelVersion | None:
        found = client.search_model_versions(f"name = '{model}' and version_number = {version}")
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


def _calls(seen: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
    """Groups of models for one call each, with a number that all of them are above.

    A call asks for the versions of many models above one number. Models of similar numbers
    go together, so that few versions come that were seen before.
    """
    models: list[str] = []
    lowest = needless = 0
    for model, number in sorted(seen.items(), key=lambda item: (item[1], item[0])):
        needless += number - lowest
        if models and (len(models) == MODELS_PER_CALL or needless > NEEDLESS_VERSIONS_PER_CALL):
            yield models, lowest
            models = []
        if not models:
            lowest, needless = number, 0
        models.append(model)
    if models:
        yield models, lowest


def _pages(fetch: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
    """All entries of a listing of MLflow's, which `fetch` gets a page of."""
    token = None
    while True:
        page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return


def _above(client: MlflowClient, models: Sequence[str], number: int) -> Iterator[ModelVersion]:
    """The models' versions above a number; some may come twice."""
    names = ", ".join(f"'{model}'" for model in models)
    while True:
        page = client.search_model_versions(
            f"name IN ({names}) and version_number > {number}",
            max_results=VERSIONS_PER_CALL,
            order_by=["version_number ASC"],
        )
        yield from page
        if len(page) < VERSIONS_PER_CALL:
            return
        # Not by MLflow's page token, an offset: what is deleted meanwhile would shift it
        # past a version. The last number may go on in other models.
        number = int(page[-1].version) - 1


def _listed(version: ModelVersion) -> ListedVersion:
    states = {
        "READY": Readiness.READY,
        "FAILED_REGISTRATION": Readiness.FAILED,
        "DELETED_MODEL_VERSION": Readiness.FAILED,
    }
    return ListedVersion(
        model=version.name,
        version=int(version.version),
        # Other states, such as PENDING_REGISTRATION, are on the way to one of these.
        readiness=states.get(version.status, Readiness.PENDING),
        registered_by=version.user_id or None,
        release=version.tags.get(RELEASE_TAG),
    )
