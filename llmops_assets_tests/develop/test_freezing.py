"""Which spec a release freezes, and that it keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import dagster as dg
import pytest

from llmops_assets.develop.freezing import frozen_source, spec_to_freeze, taken_over
from llmops_assets.errors import LifecycleOrderError, ReleaseError
from llmops_assets.release import Release
from llmops_assets.spec import MLflowWeights

from ..release_rig import SPEC, Rig
from ..test_reporting import Runs, description, failures, materialized

BUMPED = "parrot.t123456789abc"


@pytest.fixture
def runs(rig: Rig) -> Iterator[Runs]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)


def config(**values: object) -> dict[str, object]:
    return {"ops": {"model_spec": {"config": values}}}


def test_version_in_the_registry_brings_its_own_weights(rig: Rig) -> None:
    """The spec says how it is judged and served; the version is what is released."""
    spec, _ = spec_to_freeze(rig.platform, Release.parse("parrot.v7"), None, None)
    assert spec.weights == MLflowWeights(source="mlflow", version=7)
    rig.write_spec(SPEC.replace(
        "{source: path, path: checkpoint}", "{source: mlflow, model: ara, version: 3}"
    ))  # fmt: skip
    spec, _ = spec_to_freeze(rig.platform, Release.parse("parrot.v7"), None, None)
    assert spec.weights == MLflowWeights(source="mlflow", version=7), "parrot's seventh"
    own, _ = spec_to_freeze(rig.platform, Release.parse("parrot.m20260101t000000"), None, None)
    assert own.weights == MLflowWeights(source="mlflow", model="ara", version=3)


def test_spec_of_another_release(runs: Runs) -> None:
    """What serves is built again as it was asked for, whatever the file says by now."""
    runs.rig.freeze("parrot.m20260101t000000")
    runs.rig.freeze("parrot.m20260102t000000")
    runs.rig.write_spec(SPEC.replace("largest_gap: 0.1", "largest_gap: 0.2"))
    runs.instance.add_dynamic_partitions("releases", [BUMPED])
    runs.job("release", BUMPED, config(spec_of="parrot.m20260101t000000"))
    platform = runs.rig.platform
    assert platform.spec(BUMPED) == platform.spec("parrot.m20260101t000000")
    assert frozen_source(platform, BUMPED).spec_of == "parrot.m20260101t000000"
    facts = platform.columns.get(BUMPED, "model_spec").facts
    assert facts["derived_from"] == "parrot.m20260101t000000"


def test_spec_of_must_fit(rig: Rig) -> None:
    """A wrong name in a launchpad is found before anything is frozen under it."""
    rig.freeze("parrot.m20260101t000000")
    new = Release.parse(BUMPED)
    with pytest.raises(ReleaseError, match="cannot take the spec"):
        spec_to_freeze(rig.platform, new, None, "other.v1")
    with pytest.raises(ReleaseError, match="commit abc"):
        spec_to_freeze(rig.platform, new, "abc", "parrot.m20260101t000000")
    with pytest.raises(LifecycleOrderError, match="no model_spec yet"):
        spec_to_freeze(rig.platform, new, None, "parrot.v9")


def test_taken_over_with_the_spec(rig: Rig) -> None:
    """New rows in a file, or another torch, must not change what a toolchain bump builds from."""
    rig.freeze("parrot.v1")
    for asset in ("training_data", "checkpoint"):
        rig.publish("parrot.v1", asset, {"content": asset})
    source = frozen_source(rig.platform, "parrot.v1").model_copy(update={"spec_of": "parrot.v1"})
    files = {"spec.json": "{}", "source.json": source.model_dump_json()}
    rig.publish(BUMPED, "model_spec", files)
    assert taken_over(rig.platform, "parrot.v1", "checkpoint") is None
    assert taken_over(rig.platform, BUMPED, "evaluation_data") is None
    taken = taken_over(rig.platform, BUMPED, "checkpoint")
    assert taken is not None
    published = rig.platform.columns.get(BUMPED, "checkpoint")
    assert published == taken
    assert published.artifact == rig.platform.columns.get("parrot.v1", "checkpoint").artifact
    assert published.reused_from == "parrot.v1"


def test_run_of_a_bump_takes_data_over(runs: Runs) -> None:
    """Through the real asset, where the file that the data came from is gone."""
    platform = runs.rig.platform
    runs.rig.freeze("parrot.v1")
    built = runs.rig.publish("parrot.v1", "training_data", {"content": "rows"})
    source = frozen_source(platform, "parrot.v1").model_copy(update={"spec_of": "parrot.v1"})
    spec = platform.spec("parrot.v1").model_dump_json()
    files = {"spec.json": spec, "source.json": source.model_dump_json()}
    runs.rig.publish(BUMPED, "model_spec", files)
    assert "training_data" in materialized(runs.assets(BUMPED, "training_data"))
    assert platform.columns.get(BUMPED, "training_data").artifact == built.artifact


def test_frozen_spec_needs_its_source_no_more(runs: Runs) -> None:
    """A release that failed half-way goes on after its file, or its commit, is gone."""
    release = "parrot.m20260101t000000"
    assert runs.assets(release, "model_spec").success
    frozen = runs.rig.platform.spec(release)
    (runs.rig.models / "parrot.yaml").unlink()
    result = runs.assets(release, "model_spec")
    assert result.success, failures(result)
    assert runs.rig.platform.spec(release) == frozen
    missing = runs.assets("parrot.m20260102t000000", "model_spec")
    assert "There is no spec" in description(missing, "model_spec")


def test_source_is_beside_the_spec(runs: Runs) -> None:
    """The audit reads where a spec came from out of the artifact itself."""
    assert runs.assets("parrot.v1", "model_spec").success
    folder = runs.rig.platform.column("parrot.v1")["model_spec"].path
    assert json.loads((folder / "source.json").read_text())["file"].endswith("parrot.yaml")
