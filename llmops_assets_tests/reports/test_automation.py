"""Reports are made by themselves, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from llmops_assets.definitions import definitions_for
from llmops_assets.partitions import RELEASES
from llmops_assets.reports.automation import reports

from ..release_rig import Rig

RELEASE_KEYS = ("parrot.v1", "parrot.v2", "parrot.v3")
HALF_PAST = datetime(2026, 6, 1, 10, 30, tzinfo=UTC)


class Evaluations:
    """Evaluations of all conditions there are, as the daemon makes them."""

    def __init__(self, rig: Rig, instance: dg.DagsterInstance) -> None:
        self.definitions = definitions_for(rig.platform)
        self.instance = instance
        self.cursor = None

    def after(self, minutes: int) -> Mapping[str, Set[str | None]]:
        """What is asked for so many minutes after half past ten, by asset."""
        result = dg.evaluate_automation_conditions(
            self.definitions, self.instance, cursor=self.cursor,
            evaluation_time=HALF_PAST + timedelta(minutes=minutes),
            asset_selection=dg.AssetSelection.all(),
        )  # fmt: skip
        self.cursor = result.cursor
        keys = self.definitions.resolve_asset_graph().get_all_asset_keys()
        return {
            key.to_user_string(): result.get_requested_partitions(key)
            for key in keys
            if result.get_num_requested(key)
        }

    def event(self, asset: str, release: str) -> None:
        self.instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=release))


@pytest.fixture
def evaluations(rig: Rig) -> Iterator[Evaluations]:
    """A fresh daemon on three releases, all of them retired before it began."""
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), list(RELEASE_KEYS))
        evaluations = Evaluations(rig, instance)
        for release in RELEASE_KEYS:
            evaluations.event("removed_version", release)
        assert evaluations.after(0) == {}
        yield evaluations


def test_fresh_daemon_asks_for_nothing(evaluations: Evaluations) -> None:
    """Ten thousand releases of the past must not become ten thousand runs."""
    assert evaluations.after(1) == {}
    assert evaluations.after(20) == {}


def test_release_under_way_asks_for_nothing(evaluations: Evaluations) -> None:
    """Reports must not compete with what they report on."""
    evaluations.instance.add_dynamic_partitions(str(RELEASES.name), ["parrot.v4"])
    for asset in ("model_spec", "checkpoint", "packaged_model", "production_deployment"):
        evaluations.event(asset, "parrot.v4")
        assert evaluations.after(1) == {}


def test_removed_release_gets_its_record_once(evaluations: Evaluations) -> None:
    """The last thing that happens to a release is what closes its file."""
    evaluations.event("removed_version", "parrot.v2")
    assert evaluations.after(1) == {"audit_record": {"parrot.v2"}}
    assert evaluations.after(2) == {}


def test_metrics_are_made_every_hour_and_once_after_an_outage(evaluations: Evaluations) -> None:
    """A minute's work at ten thousand releases: not oftener, and not for each hour missed."""
    assert [evaluations.after(minutes) for minutes in (29, 31, 32, 300, 301)] == [
        {}, {"lifecycle_metrics": {None}}, {}, {"lifecycle_metrics": {None}}, {},
    ]  # fmt: skip


def test_only_reports_have_conditions(evaluations: Evaluations) -> None:
    """What trains, builds or deploys starts by a trigger that a person can read."""
    graph = evaluations.definitions.resolve_asset_graph()
    conditioned = {
        key.to_user_string()
        for key in graph.get_all_asset_keys()
        if graph.get(key).automation_condition is not None
    }
    assert conditioned == {"lifecycle_metrics", "audit_record"}
    selected = reports.asset_selection.resolve(graph)
    assert {key.to_user_string() for key in selected} == conditioned
    assert reports.default_status is dg.DefaultSensorStatus.RUNNING
