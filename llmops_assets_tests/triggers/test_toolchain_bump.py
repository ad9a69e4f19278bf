"""Other tools: what serves is built again, one model at a time, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from llmops_assets.build import toolchain_bump as surveying
from llmops_assets.build.packaging import PACKAGE_MEDIA_TYPE
from llmops_assets.build.toolchain_bump import BUILT, survey
from llmops_assets.errors import ToolchainError, TriggerError
from llmops_assets.release import Release
from llmops_assets.serving.routes import RouteTarget
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.settings import Settings
from llmops_assets.storage.columns import Action, Workshop
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.base import EngineToolchain
from llmops_assets.triggers import toolchain_bump as trigger
from llmops_assets.triggers.requests import EVENT_TAG

from ..release_rig import SPEC, Rig
from .daemon import Daemon, keys

pytestmark = pytest.mark.timeout(60)
MODELS = ("ara", "lory", "parrot")
OLD = {"onnxruntime": "1.31", "llmops_assets": "sha256:1"}
NEW = {"onnxruntime": "1.32", "llmops_assets": "sha256:1"}


class Tools:
    """The toolchain's versions, and Triton's, as they are installed in the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: Mapping[str, str] = OLD
        self.triton = "2.51"
        self.missing: set[str] = set()
        """Precisions, or steps, whose tools are not there."""
        monkeypatch.setattr(surveying, "toolchain_for", self._toolchain_for)
        monkeypatch.setattr(surveying, "versions_of", lambda name: {name: self.triton})

    def _toolchain_for(self, engine: Any, settings: Settings) -> EngineToolchain[Any]:
        toolchain = toolchain_for(engine, settings)

        def versions(step: str) -> Mapping[str, str]:
            if engine.precision in self.missing or step in self.missing:
                raise ToolchainError(f"no tools for {engine.precision}", cure="install them")
            return self.versions

        toolchain.versions = versions  # pyright: ignore[reportAttributeAccessIssue]
        return toolchain


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(monkeypatch)


def serve(rig: Rig, release: str, versions: Mapping[str, str], text: str = SPEC) -> None:
    """A release that was built with these versions serves in production."""
    model = Release.parse(release).model
    rig.freeze(release, text.replace("name: parrot", f"name: {model}"))

    def make(workshop: Workshop) -> dict[str, str]:
        workshop.output.mkdir(parents=True)
        (workshop.output / "content").write_text(f"{release} {versions}")
        return {}

    for asset in BUILT:
        action = Action(asset, PACKAGE_MEDIA_TYPE, parameters={"of": release}, versions=versions)
        rig.platform.columns.produce(release, action, make)
    report = Action(
        "compliance_report", "application/vnd.llmops.test", parameters={"of": release},
        versions={"nvidia-pytriton": "2.51", "compliance": "sha256:2"},
    )  # fmt: skip
    rig.platform.columns.produce(release, report, make)
    target = RouteTarget(
        colour=Colour.BLUE, weight=100, release=release, version=1, host="127.0.0.1",
        package=rig.platform.columns.get(release, "packaged_model").artifact,
        http_port=1, grpc_port=2, metrics_port=3,
    )  # fmt: skip
    _, expected = rig.platform.routes.current(Environment.PRODUCTION, model)
    rig.platform.routes.change(
        Environment.PRODUCTION, model, [target], actor="ada", reason="test", expected=expected
    )


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def daemon(rig: Rig, instance: dg.DagsterInstance, tools: Tools) -> Daemon:
    """After its first tick, with three models that serve, built with the tools there are."""
    for model in MODELS:
        serve(rig, f"{model}.v1", OLD)
    daemon = Daemon(trigger.toolchain_bump, rig.platform, instance)
    assert daemon.tick() == []
    assert daemon.tick() == []
    return daemon


def test_same_tools_ask_for_nothing(daemon: Daemon, tools: Tools) -> None:
    """A restart, or a mended line of ours, must not put every model before its approvers."""
    tools.versions = {**OLD, "llmops_assets": "sha256:3"}
    assert daemon.tick() == []
    assert daemon.skipped == "Nothing that serves is left to build with other tools."


def test_other_tools_bump_one_model_at_a_time(
    daemon: Daemon, tools: Tools, instance: dg.DagsterInstance
) -> None:
    """All at once would take every GPU and every approver; the next waits for the run's end."""
    tools.versions = NEW
    (first,) = daemon.tick(DagsterRunStatus.STARTED)
    assert str(first.partition_key).startswith("ara.t")
    assert first.tags[EVENT_TAG] == "toolchain onnxruntime 1.31 -> 1.32"
    config = first.run_config["ops"]["model_spec"]["config"]
    assert config == {"spec_of": "ara.v1", "derived_from": "ara.v1"}
    assert [daemon.tick() for _ in range(3)] == [[], [], []]
    assert daemon.skipped is not None
    assert f"waits for the end of {first.partition_key}" in daemon.skipped
    (record,) = instance.get_run_records()
    instance.report_run_failed(record.dagster_run)
    rest = [key for _ in range(4) for key in keys(daemon.tick())]
    assert [key.split(".")[0] for key in rest] == ["lory", "parrot"]


def test_failed_bump_is_not_repeated_and_blocks_nobody(daemon: Daemon, tools: Tools) -> None:
    """The next toolchain, or a person, tries again; the others go on."""
    tools.versions = NEW
    asked = [key for _ in range(6) for key in keys(daemon.tick(DagsterRunStatus.FAILURE))]
    assert [key.split(".")[0] for key in asked] == list(MODELS)
    tools.versions = {**NEW, "onnxruntime": "1.33"}
    assert len(daemon.tick()) == 1


def test_triton_counts_as_well(daemon: Daemon, tools: Tools) -> None:
    """What serves the package decides whether it answers, as much as what built it."""
    tools.triton = "2.52"
    (run,) = daemon.tick()
    assert run.tags[EVENT_TAG] == "toolchain nvidia-pytriton 2.51 -> 2.52"


def test_promoted_bump_ends_it_and_a_new_spec_begins_anew(
    rig: Rig, daemon: Daemon, tools: Tools
) -> None:
    """The same tools may meet a model twice: names must not collide, or it is never built."""
    tools.versions = NEW
    (run,) = daemon.tick()
    serve(rig, str(run.partition_key), NEW)
    assert [key.split(".")[0] for _ in range(4) for key in keys(daemon.tick())] == [
        "lory", "parrot",
    ]  # fmt: skip
    serve(rig, "ara.v2", OLD)
    (again,) = daemon.tick()
    assert str(again.partition_key).startswith("ara.t")
    assert again.partition_key != run.partition_key


def test_daemon_that_dies_or_forgets_asks_for_the_same(daemon: Daemon, tools: Tools) -> None:
    """The name is derived from what happened, and the run is what counts."""
    tools.versions = NEW
    lost = daemon.evaluate()
    assert isinstance(lost, dg.SensorResult)
    (run,) = daemon.tick()
    assert [again.run_key for again in lost.run_requests or ()] == [run.run_key]
    daemon.run_keys = set()
    assert keys(daemon.tick())[0].startswith("lory.")


def test_first_tick_adopts_what_is_there(
    rig: Rig, instance: dg.DagsterInstance, tools: Tools
) -> None:
    """Switching the platform on must not rebuild production; the next change does."""
    serve(rig, "ara.v1", OLD)
    tools.versions = NEW
    daemon = Daemon(trigger.toolchain_bump, rig.platform, instance)
    assert [daemon.tick() for _ in range(3)] == [[], [], []]
    assert daemon.cursor is not None
    assert len(daemon.cursor) < 200
    tools.versions = {**NEW, "onnxruntime": "1.33"}
    assert len(daemon.tick()) == 1


def test_missing_toolchain_fails_the_tick_after_the_others(
    rig: Rig, daemon: Daemon, tools: Tools
) -> None:
    """A model for GPUs beside models for CPUs: seen, but nobody waits for it."""
    text = SPEC.replace("{toolchain: onnxruntime_genai}",
                        "{toolchain: onnxruntime_genai, precision: int4}")  # fmt: skip
    serve(rig, "budgie.v1", OLD, text)
    tools.versions = NEW
    tools.missing = {"int4"}
    asked = [key for _ in range(3) for key in keys(daemon.tick())]
    assert [key.split(".")[0] for key in asked] == list(MODELS)
    with pytest.raises(TriggerError, match="no tools for int4"):
        daemon.tick()
    tools.missing = set()
    assert keys(daemon.tick())[0].startswith("budgie.")


def test_image_is_told_without_a_gpu(daemon: Daemon, tools: Tools) -> None:
    """Where only packaging can say what is here, that is enough to see another image."""
    tools.missing = {"converted_weights", "engine"}
    assert daemon.tick() == []
    tools.versions = NEW
    assert len(daemon.tick()) == 1


def test_models_without_traffic_are_left_alone(rig: Rig, daemon: Daemon, tools: Tools) -> None:
    """What was taken off production needs no new engine."""
    for model in MODELS:
        _, digest = rig.platform.routes.current(Environment.PRODUCTION, model)
        rig.platform.routes.change(
            Environment.PRODUCTION, model, [], actor="ada", reason="off", expected=digest
        )
    tools.versions = NEW
    assert daemon.tick() == []


@pytest.mark.usefixtures("daemon")
def test_real_toolchain_is_compared(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without doubles: what is installed here is not what the test says it was built with."""
    monkeypatch.setattr(surveying, "toolchain_for", toolchain_for)
    found = survey(rig.platform)
    assert [bump.serving for bump in found.bumps] == [f"{model}.v1" for model in MODELS]
    assert "onnxruntime 1.31 -> " in found.bumps[0].event
    assert "llmops_assets" not in found.bumps[0].here


@pytest.mark.usefixtures("tools")
def test_tick_is_quick_with_many_models(rig: Rig) -> None:
    """A sensor that takes seconds delays all the others."""
    for number in range(20):
        serve(rig, f"m{number}.v1", OLD)
    started = datetime.now(UTC)
    survey(rig.platform)
    first = datetime.now(UTC)
    survey(rig.platform)
    assert (first - started).total_seconds() < 1
    # A thousand models, in under two seconds.
    assert (datetime.now(UTC) - first).total_seconds() < 20 * 0.002
