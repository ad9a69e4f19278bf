"""The metrics table: one row a release and metric, only what was really measured."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
import pytest
from pydantic import BaseModel

from llmops_assets.reports.lifecycle import COLUMNS, lifecycle_table
from llmops_assets.storage.columns import Action

from ..release_rig import Rig


class Sample(BaseModel):
    requests: int
    latency_seconds: dict[str, float] | None


def values(table: pd.DataFrame, release: str) -> dict[str, float]:
    rows = table[table["release"] == release]
    assert not rows["metric"].duplicated().any()
    return dict(zip(rows["metric"], rows["value"], strict=True))


def test_metrics_come_from_every_phase(rig: Rig) -> None:
    """Section 6 of the workflow asks for numbers from Develop to Retire."""
    release = "parrot.v1"
    rig.publish(release, "checkpoint", {"a": "1"})
    rig.publish(release, "evaluation", {"a": "2"}, facts={
        "loss": 0.5, "perplexity": 1.6, "exact_match": 0.97, "f1": None,
    })  # fmt: skip
    rig.publish(release, "engine", {"engine": "12345"})
    rig.publish(release, "archive", {"a": "3"}, facts={"size": 700})
    sample = Sample(requests=12, latency_seconds={"p99": 0.25})
    rig.platform.columns.record(
        release, Action("service_metrics", "application/vnd.llmops.test"), sample, datetime.now(UTC)
    )
    table = lifecycle_table(rig.platform.columns)
    found = values(table, release)
    assert tuple(table.columns) == COLUMNS
    assert found["exact_match"] == 0.97
    assert found["engine_size"] == 5
    assert found["archive_size"] == 700
    assert (found["requests"], found["latency_p99"]) == (12, 0.25)
    assert found["training_time"] >= 0
    assert set(table["phase"]) == {"develop", "build", "operate", "retire"}
    assert set(table["model"]) == {"parrot"}
    assert table["unit"].notna().all()


def test_what_a_release_does_not_have_has_no_row(rig: Rig) -> None:
    """A zero, or a NaN, would be averaged into somebody's dashboard."""
    rig.publish("parrot.v1", "evaluation", {"a": "2"}, facts={"loss": None})
    rig.platform.columns.record(
        "parrot.v1", Action("service_metrics", "application/vnd.llmops.test"),
        Sample(requests=0, latency_seconds=None), datetime.now(UTC),
    )  # fmt: skip
    assert values(lifecycle_table(rig.platform.columns), "parrot.v1") == {"requests": 0}


def test_reused_results_took_no_time(rig: Rig) -> None:
    """Counting another release's training again would double the cost of an edited threshold."""
    action = Action("checkpoint", "application/vnd.llmops.test")

    def make(workshop) -> dict[str, float]:
        workshop.output.mkdir()
        (workshop.output / "a").write_text("weights")
        return {}

    for release in ("parrot.v1", "parrot.v2"):
        rig.platform.columns.produce(release, action, make)
    table = lifecycle_table(rig.platform.columns)
    assert list(table[table["metric"] == "training_time"]["release"]) == ["parrot.v1"]


def test_no_release_gives_an_empty_table_with_its_columns(rig: Rig) -> None:
    """The report of a fresh installation must not fail."""
    table = lifecycle_table(rig.platform.columns)
    assert tuple(table.columns) == COLUMNS
    assert table.empty
    assert table["value"].dtype == "float64"


def test_releases_of_several_models_are_kept_apart(rig: Rig) -> None:
    """One table for all models, so that teams can be compared."""
    rig.publish("parrot.v1", "engine", {"a": "1"})
    rig.publish("budgie.v1", "engine", {"a": "22"})
    table = lifecycle_table(rig.platform.columns)
    assert values(table, "budgie.v1")["engine_size"] == 2
    assert sorted(table["model"].unique()) == ["budgie", "parrot"]


@pytest.mark.parametrize("value", [True, "0.5", [1]])
def test_facts_that_are_no_numbers_are_left_out(rig: Rig, value: object) -> None:
    """Facts are for people; a sentence among them must not end the report."""
    rig.publish("parrot.v1", "evaluation", {"a": "2"}, facts={"loss": value})
    assert "loss" not in values(lifecycle_table(rig.platform.columns), "parrot.v1")
