"""One release from its spec to production: the reason why the platform exists."""

from __future__ import annotations

import httpx
import pytest

from llmops_assets.local import stack
from llmops_assets_tests.lifecycle.conftest import FirstRelease
from llmops_assets_tests.lifecycle.stack_user import (
    ANSWER,
    APPROVER,
    MODEL,
    REQUESTER,
    StackUser,
)

ASSETS = (
    "model_spec",
    "training_data",
    "data_report",
    "evaluation_data",
    "checkpoint",
    "evaluation",
    "registered_model",
    "converted_weights",
    "engine",
    "engine_validation",
    "packaged_model",
    "compliance_report",
    "staging_deployment",
    "production_approval",
    "production_candidate",
    "production_deployment",
)
LOCALES = {"en", "de", "fr", "es", "it"}


def test_production_answers(user: StackUser, first_release: FirstRelease) -> None:
    """What everything else is for: somebody asks the gateway and gets the right answer."""
    answer = user.ask()
    assert answer["text_output"] == ANSWER, answer
    for question, expected in user.known_answers.items():
        assert user.ask(question)["text_output"] == expected


@pytest.mark.parametrize("asset", ["evaluation", "engine_validation"])
def test_accuracy_of_checkpoint_and_engine(
    user: StackUser, first_release: FirstRelease, asset: str
) -> None:
    """The example must really work, and quantisation must not cost what training reached."""
    facts = user.platform.columns.get(first_release.key, asset).facts
    assert facts["exact_match"] >= 0.98
    slices = facts["slices"]
    assert set(slices) == LOCALES
    assert all(value["exact_match"] >= 0.95 for value in slices.values()), slices
    assert sum(value["rows"] for value in slices.values()) == facts["rows"] == 1000


def test_every_asset_shows_digests(user: StackUser, first_release: FirstRelease) -> None:
    """An auditor follows digests from asset to asset; Dagster's own pointers are not reliable."""
    column = user.platform.columns.assets(first_release.key)
    assert set(ASSETS) <= set(column)
    for asset in ASSETS:
        event = user.materialization(asset, first_release.key)
        result = column[asset]
        assert event.metadata["digest"].value == result.artifact, asset
        assert event.tags is not None
        assert event.tags["dagster/data_version"] == result.artifact, asset
        assert event.metadata["inputs"].value == result.inputs, asset
        for source, digest in result.inputs.items():
            assert digest == column[source].artifact, f"{source} of {asset}"
    assert column["engine"].inputs["converted_weights"] == column["converted_weights"].artifact
    assert column["packaged_model"].inputs["engine"] == column["engine"].artifact


def test_mlflow_holds_version_tags_and_loss(user: StackUser, first_release: FirstRelease) -> None:
    """Data scientists look into MLflow, not into Dagster."""
    column = user.platform.columns.assets(first_release.key)
    (version,) = _mlflow(
        user, "model-versions/search", filter=f"name='{MODEL}' and version_number=1"
    )["model_versions"]
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert tags["llmops.release"] == first_release.key
    assert tags["llmops.spec_commit"] == first_release.commit
    for asset in ("checkpoint", "training_data", "evaluation_data", "evaluation"):
        assert tags[f"llmops.{asset}"] == column[asset].artifact

    run = version["run_id"]
    loss = _mlflow(user, "metrics/get-history", run_id=run, metric_key="training_loss")["metrics"]
    steps = [point["step"] for point in loss]
    assert steps == sorted(set(steps))
    assert steps[-1] == user.spec["weights"]["steps"]
    assert loss[-1]["value"] < loss[0]["value"] / 100


def test_the_route_shows_who_and_why(user: StackUser, first_release: FirstRelease) -> None:
    """Who put this into production is asked at night, and years later by auditors."""
    route = next(
        event
        for event in user.materializations("production_route", MODEL)
        if event.metadata["actor"].value == f"run {first_release.promotion}"
    )
    assert route.metadata["serving"].value == first_release.key
    assert route.metadata["reason"].value == f"deploying {first_release.key}"
    package = user.platform.columns.get(first_release.key, "packaged_model").artifact
    assert route.metadata["package"].value == package

    approval = user.platform.columns.get(first_release.key, "production_approval").facts
    assert approval["approver"] == APPROVER
    assert approval["requested_by"] == REQUESTER
    assert approval["reason"]
    assert approval["package"] == package


def test_service_metrics_count_real_requests(user: StackUser, first_release: FirstRelease) -> None:
    """Numbers that do not move with the traffic are decoration."""
    release = user.serving().release
    user.ask()
    before = _sample(user, release)
    for _ in range(5):
        user.ask()
    after = _sample(user, release)
    assert after["release"] == release
    assert after["requests"] - before["requests"] == 5
    assert after["inferences_succeeded"] - before["inferences_succeeded"] == 5
    assert after["inference_seconds"] > before["inference_seconds"]
    assert after["latency_seconds"]["p99"] > 0
    assert not after["missing"]


def test_status_tells_what_serves(user: StackUser, first_release: FirstRelease) -> None:
    """The first thing that anybody types."""
    done = user.command("status")
    assert done.returncode == 0, done.stdout
    serving = user.serving()
    line = next(
        line for line in done.stdout.splitlines()
        if line.startswith(f"slot-production-{MODEL}-{serving.colour}")
    )  # fmt: skip
    assert f"{serving.release} version {serving.version}" in line
    assert f"port {serving.http_port}" in line


def _sample(user: StackUser, release: str) -> dict:
    outcome = user.run_job("observe", release)
    assert outcome.succeeded, outcome.failures
    return user.platform.columns.get(release, "service_metrics").facts


def _mlflow(user: StackUser, call: str, **parameters: str) -> dict:
    response = httpx.get(
        f"{stack.endpoints(user.settings).mlflow_url}/api/2.0/mlflow/{call}",
        params=parameters,
        timeout=30,
    )
    return response.raise_for_status().json()
