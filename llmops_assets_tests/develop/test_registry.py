"""The registry, against a real MLflow: every call may be repeated, and nothing doubles."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from llmops_assets.develop.registration import judge_registered, register
from llmops_assets.develop.registry import (
    MODELS_PER_CALL,
    NEEDLESS_VERSIONS_PER_CALL,
    RELEASE_TAG,
    ListedVersion,
    LossPoint,
    MLflowRegistry,
    ModelRegistry,
    Readiness,
    _calls,
)
from llmops_assets.errors import RegistryError, SettingsError
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings, get_settings

from ..conftest import free_port
from ..plain_mlflow import register_plainly
from ..release_rig import MODEL, Rig

pytestmark = pytest.mark.timeout(120)
# More than the 1,000 metrics that one `log-batch` request may have (MLflow REST API).
STEPS = 1100
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "registries.md"
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
        lambda registry: registry.registered_since({"m": 0}),
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
    release = "parrot.m20260101t000000"
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


def numbers(versions: Sequence[ListedVersion]) -> list[tuple[str, int]]:
    return sorted((version.model, version.version) for version in versions)


def test_a_registered_version_is_adopted(
    rig: Rig, registry: MLflowRegistry, client: MlflowClient
) -> None:
    """Another version for the same weights would start another release, and so on for ever."""
    register_plainly(client, MODEL, 2)
    release = f"{MODEL}.v{registry.newest([MODEL])[MODEL]}"
    version = release.removeprefix(f"{MODEL}.v")
    rig.freeze(release)
    for asset in ("training_data", "evaluation_data", "checkpoint", "evaluation"):
        rig.publish(release, asset, {"a": asset})
    column = rig.platform.column(release)
    for _ in range(2):
        result, page = register(rig.platform.columns, registry, release, column)
        assert result.facts["version"] == int(version)
        assert page.endswith(f"/versions/{version}")
    assert registry.newest([MODEL]) == {MODEL: int(version)}
    tags = client.get_model_version(MODEL, version).tags
    assert tags[RELEASE_TAG] == release
    assert tags["llmops.checkpoint"] == column["checkpoint"].digest
    column = rig.platform.column(release)
    assert judge_registered(registry, release, column).passed
    client.delete_model_version_tag(MODEL, version, "llmops.evaluation")
    assert not judge_registered(registry, release, column).passed


def test_adoption_cut_off_by_a_kill_is_completed(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """The release's name comes last, so what is found has all tags."""
    register_plainly(client, "half")
    client.set_model_version_tag("half", "1", "llmops.checkpoint", "sha256:old")
    assert registry.find("half", "half.v1") is None
    adopted = registry.register("half", "half.v1", TAGS, {}, 1)
    assert adopted.tags == {**TAGS, RELEASE_TAG: "half.v1"}
    assert registry.find("half", "half.v1") == adopted


def test_another_releases_version_is_not_adopted(
    registry: MLflowRegistry, client: MlflowClient
) -> None:
    """Its digests would be overwritten, and its gate fail."""
    register_plainly(client, "taken")
    registry.register("taken", "taken.m20260101t000000", TAGS, {}, 1)
    with pytest.raises(RegistryError, match="another release's"):
        registry.register("taken", "taken.v1", {}, {}, 1)
    register_plainly(client, "taken")
    registry.register("taken", "taken.v2", TAGS, {}, 2)
    with pytest.raises(RegistryError, match="Another version"):
        registry.register("taken", "taken.v2", TAGS, {}, 1)


@pytest.mark.parametrize("model", ["unheard-of", "vanished"])
def test_a_version_that_is_gone_is_not_adopted(
    registry: MLflowRegistry, client: MlflowClient, model: str
) -> None:
    """Making another in its place would register weights that nobody can look up."""
    if model == "vanished":
        register_plainly(client, model)
        client.delete_model_version(model, "1")
    with pytest.raises(RegistryError, match="is gone"):
        registry.register(model, f"{model}.v1", TAGS, {}, 1)


def test_versions_since_a_number(registry: MLflowRegistry, client: MlflowClient) -> None:
    """What was seen does not come again, what was deleted does not come, gaps do no harm."""
    for model, count in (("since-a", 3), ("since-b", 5), ("since-c", 1)):
        register_plainly(client, model, count)
    client.delete_model_version("since-b", "4")
    ours = registry.register("since-b", "since-b.m20260101t000000", TAGS, {})
    found = registry.registered_since({"since-a": 1, "since-b": 3, "since-c": 1, "since-no": 0})
    assert numbers(found) == [("since-a", 2), ("since-a", 3), ("since-b", 5), ("since-b", 6)]
    assert {v.version: v.release for v in found if v.model == "since-b"} == {
        5: None,
        ours.version: "since-b.m20260101t000000",
    }
    assert {version.readiness for version in found} == {Readiness.READY}


def test_mlflow_does_not_use_numbers_again(registry: MLflowRegistry, client: MlflowClient) -> None:
    """The highest number handled stands for all handled versions only as long as this holds."""
    register_plainly(client, "again", 2)
    client.delete_model_version("again", "2")
    assert registry.newest(["again"]) == {"again": 1}
    register_plainly(client, "again")
    assert registry.newest(["again"]) == {"again": 3}
    assert registry.listed("again", 2) is None


def test_many_new_versions_come_in_pages(
    registry: MLflowRegistry, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long outage; a version at a page's end must be neither lost nor doubled."""
    for model, count in (("pages-a", 4), ("pages-b", 3), ("pages-c", 2)):
        register_plainly(client, model, count)
    monkeypatch.setattr("llmops_assets.develop.registry.VERSIONS_PER_CALL", 4)
    found = registry.registered_since({"pages-a": 0, "pages-b": 0, "pages-c": 0})
    assert numbers(found) == [
        *(("pages-a", number) for number in (1, 2, 3, 4)),
        *(("pages-b", number) for number in (1, 2, 3)),
        *(("pages-c", number) for number in (1, 2)),
    ]


def test_newest_of_many_models_is_read_in_one_go(
    registry: MLflowRegistry, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tick at 1,000 specs must not ask 1,000 times."""
    for model in ("newest-a", "newest-b", "newest-c"):
        register_plainly(client, model, 2)
    client.create_registered_model("newest-empty")
    names = ["newest-a", "newest-b", "newest-c", "newest-empty", "newest-none"]
    one_by_one = registry.newest(names)
    monkeypatch.setattr("llmops_assets.develop.registry.MODELS_ASKED_ONE_BY_ONE", 0)
    monkeypatch.setattr("llmops_assets.develop.registry.LISTED_MODELS_PER_CALL", 2)
    assert registry.newest(names) == one_by_one == dict.fromkeys(names[:3], 2)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=5), st.integers(0, 300), max_size=300))
def test_calls_ask_for_every_model_and_little_else(seen: dict[str, int]) -> None:
    """A model that is left out loses versions; too low a number fetches thousands again."""
    calls = list(_calls(seen))
    assert sorted(model for models, _ in calls for model in models) == sorted(seen)
    for models, number in calls:
        assert len(models) <= MODELS_PER_CALL
        assert 0 <= sum(seen[model] - number for model in models) <= NEEDLESS_VERSIONS_PER_CALL
        assert min(seen[model] for model in models) == number


OWN_REGISTRY = """
class Registry:
    def __init__(self, settings):
        self.settings = settings
    def log_training(self, model, release, parameters, history): ...
    def log_evaluation(self, model, release, metrics): ...
    def register(self, model, release, tags, manifest, version=None): ...
    def find(self, model, release): ...
    def registered_since(self, seen): ...
    def listed(self, model, version): ...
    def newest(self, models): ...
def half(settings):
    return object()
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module with a registry of somebody's own."""
    (tmp_path / "own_registry.py").write_text(OWN_REGISTRY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_registry", raising=False)
    return "own_registry"


def platform_with(registry: str, tmp_path: Path) -> Platform:
    return Platform(Settings(state=tmp_path, models=tmp_path, registry=registry))


def test_registry_of_ones_own(own_module: str, tmp_path: Path) -> None:
    """Another registry needs a setting, no fork."""
    platform = platform_with(f"{own_module}:Registry", tmp_path)
    assert isinstance(platform.registry, ModelRegistry)
    assert vars(platform.registry)["settings"] is platform.settings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "gave no model registry"),
        ("missing", "cannot be loaded"),
    ],
)
def test_setting_that_leads_to_no_registry(
    own_module: str, tmp_path: Path, name: str, message: str
) -> None:
    """Found when the registry is first needed, not as an AttributeError in some gate."""
    with pytest.raises(SettingsError, match=message):
        _ = platform_with(f"{own_module}:{name}", tmp_path).registry
    with pytest.raises(SettingsError, match="cannot be loaded"):
        _ = platform_with("no_such_package_at_all:factory", tmp_path).registry


def test_example_of_the_documentation_keeps_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People begin with a copy of it."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class " in c)
    (tmp_path / "folder_registry.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "folder_registry", raising=False)
    registry = platform_with("folder_registry:FolderRegistry", tmp_path).registry

    first = registry.register("m", "m.m20260101t000000", TAGS, {"layers": []})
    assert first == registry.register("m", "m.m20260101t000000", TAGS, {"layers": []})
    assert (first.version, first.tags) == (1, {**TAGS, RELEASE_TAG: "m.m20260101t000000"})
    (tmp_path / "registry" / "m" / "2.json").write_text('{"author": "ada"}')
    assert registry.newest(["m", "other"]) == {"m": 2}
    person = ListedVersion("m", 2, Readiness.READY, "ada", None)
    assert registry.registered_since({"m": 1, "other": 0}) == [person]
    assert registry.listed("m", 3) is None

    adopted = registry.register("m", "m.v2", TAGS, {}, 2)
    assert adopted == registry.register("m", "m.v2", TAGS, {}, 2) == registry.find("m", "m.v2")
    ours = replace(person, registered_by=None, release="m.v2")
    assert registry.registered_since({"m": 1}) == [ours]
    assert registry.registered_since({"m": 2}) == []
    for release, version in (("m.v3", 3), ("m.v1", 1), ("m.v2", 1)):
        with pytest.raises(RegistryError, match="cannot have version"):
            registry.register("m", release, TAGS, {}, version)
    assert registry.log_training("m", "m.v2", {}, [LossPoint(1, 0.5)]).startswith("file:")
    assert registry.log_evaluation("m", "m.v2", {"loss": 0.5}).startswith("file:")
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(RegistryError, match="mount"):
        registry.registered_since({"m": 0})


def test_secret_that_is_too_short_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages about settings end up in logs."""
    monkeypatch.setenv("LLMOPS_WEBHOOK_SECRET", "hunter2")
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match="LLMOPS_WEBHOOK_SECRET=") as raised:
        get_settings()
    assert "hunter2" not in str(raised.value)
