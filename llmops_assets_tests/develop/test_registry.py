"""The registry, against a real MLflow: every call may be repeated, and nothing doubles."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from mlflow.tracking import MlflowClient

from llmops_assets.develop.registration import judge_registered, register
from llmops_assets.develop.registry import RELEASE_TAG, LossPoint, MLflowRegistry
from llmops_assets.errors import RegistryError

from ..conftest import free_port
from ..release_rig import MODEL, Rig

pytestmark = pytest.mark.timeout(120)
# More than the 1,000 metrics that one `log-batch` request may have (MLflow REST API).
STEPS = 1100
HISTORY = [LossPoint(step, 4.0 / (step + 1)) for step in range(STEPS)]
PARAMETERS = {"steps": STEPS, "learning_rate": 0.002}
TAGS = {"llmops.checkpoint": "sha256:" + "1" * 64, "llmops.spec_commit": "c" * 40}


@pytest.fixture
def registry(mlflow_url: str) -> MLflowRegistry:
    return MLflowRegistry(mlflow_url, timeout_seconds=30)


@pytest.fixture
def client(mlflow_url: str) -> MlflowClient:
    return MlflowClient(tracking_uri=mlflow_url, registry_uri=mlflow_url)


def runs(client: MlflowClient, model: str) -> list[str]:
    experiment = client.get_experiment_by_name(model)
    assert experiment is not None
    return [run.info.run_id for run in client.search_runs([experiment.experiment_id])]


def test_a_release_has_one_version_with_its_tags(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """The version names the directory in Triton; a retried step must not make another."""
    first = registry.register("single", "single.v1", TAGS, {"layers": []})
    again = registry.register("single", "single.v1", TAGS, {"layers": []})
    second = registry.register("single", "single.v2", TAGS, {"layers": []})
    assert first == again
    assert (first.version, second.version) == (1, 2)
    assert first.tags == {**TAGS, RELEASE_TAG: "single.v1"}
    assert registry.find("single", "single.v1") == first
    version = client.get_model_version("single", "1")
    assert version.run_id is not None
    assert client.get_run(version.run_id).info.status == "FINISHED"


def test_unknown_releases_are_not_found(registry: MLflowRegistry) -> None:
    """Neither an unknown model nor another release's version may stand in."""
    registry.register("known", "known.v1", TAGS, {})
    assert registry.find("unknown", "unknown.v1") is None
    assert registry.find("known", "known.v2") is None


def test_loss_curve_is_complete_and_not_doubled(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """MLflow appends: a repeated step would draw a curve that jumps back."""
    page = registry.log_training("curve", "curve.v1", PARAMETERS, HISTORY)
    # The last digits differ when damaged weights are trained again.
    again = [LossPoint(point.step, point.loss + 1e-9) for point in HISTORY]
    assert registry.log_training("curve", "curve.v1", PARAMETERS, again) == page
    (run,) = runs(client, "curve")
    assert run in page
    points = client.get_metric_history(run, "training_loss")
    assert [(p.step, p.value) for p in sorted(points, key=lambda p: p.step)] == [
        (p.step, p.loss) for p in HISTORY
    ]
    assert client.get_run(run).data.params == {"steps": str(STEPS), "learning_rate": "0.002"}


def test_curve_cut_off_by_a_kill_is_completed(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """The next run logs what is missing."""
    registry.log_training("cut", "cut.v1", PARAMETERS, HISTORY[:7])
    registry.log_training("cut", "cut.v1", PARAMETERS, HISTORY[:20])
    (run,) = runs(client, "cut")
    assert sorted(p.step for p in client.get_metric_history(run, "training_loss")) == list(
        range(20)
    )


def test_evaluation_training_and_version_share_the_releases_run(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """A data scientist looks at one page for a release."""
    registry.log_training("shared", "shared.v1", PARAMETERS, HISTORY[:3])
    for _ in range(2):
        registry.log_evaluation("shared", "shared.v1", {"exact_match": 0.97, "loss": 0.1})
    registry.register("shared", "shared.v1", TAGS, {})
    (run,) = runs(client, "shared")
    assert client.get_run(run).data.metrics["exact_match"] == 0.97
    assert len(client.get_metric_history(run, "exact_match")) == 1
    assert client.get_model_version("shared", "1").run_id == run


def test_two_versions_of_one_release_are_an_error(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """Somebody registered by hand; picking one of them would be a guess."""
    registry.register("twice", "twice.v1", TAGS, {})
    run = client.get_model_version("twice", "1").run_id
    client.create_model_version(
        "twice", source=f"runs:/{run}/checkpoint", run_id=run, tags={RELEASE_TAG: "twice.v1"}
    )
    with pytest.raises(RegistryError, match=r"versions \[1, 2\]"):
        registry.find("twice", "twice.v1")
    with pytest.raises(RegistryError, match=r"versions \[1, 2\]"):
        registry.register("twice", "twice.v1", TAGS, {})


@pytest.mark.parametrize(
    "call",
    [
        lambda registry: registry.find("m", "m.v1"),
        lambda registry: registry.log_evaluation("m", "m.v1", {"loss": 1.0}),
        lambda registry: registry.register("m", "m.v1", {}, {}),
    ],
)
def test_server_that_is_down_is_found_quickly(call: Callable[[MLflowRegistry], object]) -> None:
    """MLflow's own retries would hold the run for minutes."""
    registry = MLflowRegistry(f"http://127.0.0.1:{free_port()}", timeout_seconds=2)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="llmops status"):
        call(registry)
    assert time.monotonic() - started < 20


def test_registered_bytes_gate_asks_the_registry(
    rig: Rig, registry: MLflowRegistry, client: MlflowClient
) -> None:
    """Tags in MLflow can be edited by anybody; the gate must see what they are now."""
    release = "parrot.v1"
    rig.freeze(release)
    for asset in ("training_data", "evaluation_data", "checkpoint", "evaluation"):
        rig.publish(release, asset, {"a": asset})
    column = rig.platform.column(release)
    result, page = register(rig.platform.columns, registry, release, column)
    column = rig.platform.column(release)
    judgement = judge_registered(registry, release, column)
    assert judgement.passed, judgement.reason
    assert judgement.measured == judgement.threshold
    assert page.startswith("http")
    assert result.inputs["checkpoint"] == column["checkpoint"].digest

    version = str(result.facts["version"])
    client.set_model_version_tag(MODEL, version, "llmops.checkpoint", "sha256:" + "0" * 64)
    assert not judge_registered(registry, release, column).passed
    client.delete_model_version(MODEL, version)
    assert not judge_registered(registry, release, column).passed
