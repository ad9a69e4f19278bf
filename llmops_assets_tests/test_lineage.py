"""What Dagster shows of lineage: data versions per release, inputs, and what is out of date.

Two releases go through all assets in turn, as only then what Dagster keeps per asset and
what it keeps per partition differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance, EventLogRecord
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from llmops_assets.definitions import PHASES
from llmops_assets.partitions import RELEASES
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.store import canonical_json, digest_of

from .release_rig import MODEL, Rig
from .test_reporting import APPROVE, DATA, Runs, failures, write_data

pytestmark = pytest.mark.timeout(120)
ONE, TWO = "parrot.m20260101t000000", "parrot.m20260102t000000"
BYTES = (
    "data_report", "checkpoint", "evaluation", "converted_weights", "engine",
    "engine_validation", "packaged_model", "compliance_report",
)  # fmt: skip
"""Assets that report what the rig published for them; their tools do not run."""
RETIRED = ("deprecated_version", "archive", "removed_version", "audit_record")
OPERATED = ("service_metrics", "incidents", "scaling_policy")
DEPLOYED = (
    "staging_deployment", "production_approval", "production_candidate", "production_deployment",
)  # fmt: skip
COLUMN = (*DATA, *BYTES, "registered_model", *DEPLOYED, *OPERATED)


class Lineage(Runs):
    """Runs, and what Dagster says of lineage after them."""

    def unchecked(self, release: str, *names: str) -> None:
        """Materializes assets without their checks."""
        self.instance.add_dynamic_partitions(str(RELEASES.name), [release])
        job = self.definitions.resolve_implicit_global_asset_job_def().get_subset(
            asset_selection={dg.AssetKey(name) for name in names}, asset_check_selection=set()
        )
        result = job.execute_in_process(
            instance=self.instance, partition_key=release, raise_on_error=False
        )
        assert result.success, failures(result)

    def assets_succeed(self, release: str, *names: str) -> None:
        result = self.assets(release, *names)
        assert result.success, failures(result)

    def job_succeeds(self, name: str, release: str | None, config: Any = None) -> None:
        result = self.job(name, release, config)
        assert result.success, (name, failures(result))

    def events(self, asset: str, partition: str | None) -> Sequence[EventLogRecord]:
        """Materializations of an asset's partition, newest first."""
        wanted = dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(asset),
            asset_partitions=None if partition is None else [partition],
        )
        return self.instance.fetch_materializations(wanted, limit=20).records

    def newest(self, asset: str, partition: str | None) -> dg.AssetMaterialization:
        found = self.events(asset, partition)[0].asset_materialization
        assert found is not None
        return found

    def version(self, asset: str, partition: str | None) -> str:
        """The data version that the UI shows."""
        return tags(self.newest(asset, partition))["dagster/data_version"]

    def out_of_date(self, release: str) -> dict[str, list[str]]:
        """Assets of the release that the UI calls out of date, and what changed upstream."""
        graph = self.definitions.resolve_asset_graph()
        resolver = CachingStaleStatusResolver(
            self.instance, graph, LoadingContextForTest(self.instance)
        )
        stale: dict[str, list[str]] = {}
        for key in graph.materializable_asset_keys:
            if not graph.get(key).is_partitioned:
                continue
            if resolver.get_status(key, release) is StaleStatus.STALE:
                causes = resolver.get_stale_causes(key, release)
                stale[key.to_user_string()] = [
                    cause.dependency_asset_key.to_user_string()
                    for cause in causes
                    if cause.dependency_asset_key is not None
                ]
        return stale


def tags(event: dg.AssetMaterialization) -> Mapping[str, str]:
    assert event.tags is not None
    return event.tags


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lineage]:
    """Two releases in production one after the other, the first one then removed."""
    rig = Rig(tmp_path_factory.mktemp("lineage") / "rig")
    write_data(rig, ["one"], ["hello"])
    with DagsterInstance.ephemeral() as instance:
        lineage = Lineage(rig, instance)
        for version, release in enumerate((ONE, TWO), start=1):
            lineage.assets_succeed(release, *DATA)
            rig.build(release, version)
            lineage.unchecked(release, "data_report", "checkpoint", "evaluation")
            lineage.assets_succeed(release, "registered_model")
            lineage.unchecked(release, *BYTES)
            lineage.assets_succeed(release, "staging_deployment")
            lineage.job_succeeds("promote", release, APPROVE)
            lineage.job_succeeds("observe", release)
            lineage.job_succeeds("scale", release)
        for job in ("deprecate", "archive_release", "remove", "audit"):
            lineage.job_succeeds(job, ONE)
        yield lineage
    rig.close()


def test_every_asset_is_in_this_test(lineage: Lineage) -> None:
    """One that is added later must say what its data version is, too."""
    partitioned = {
        key.to_user_string()
        for key in lineage.definitions.resolve_asset_graph().materializable_asset_keys
        if lineage.definitions.resolve_asset_graph().get(key).is_partitioned
    }
    assert partitioned == {*COLUMN, *RETIRED}


@pytest.mark.parametrize("asset", [*COLUMN, *RETIRED])
def test_data_version_is_the_digest_of_this_releases_artifact(lineage: Lineage, asset: str) -> None:
    """The UI's version of a partition must be what the store holds for that release."""
    for release in (ONE,) if asset in RETIRED else (ONE, TWO):
        published = lineage.rig.platform.columns.get(release, asset)
        event = lineage.newest(asset, release)
        assert lineage.version(asset, release) == published.artifact
        assert event.metadata["digest"].value == published.artifact
        assert event.metadata["inputs"].value == published.inputs
        assert tags(event)["dagster/data_version_is_user_provided"] == "true"


def test_reused_artifact_keeps_its_version_in_the_other_release(lineage: Lineage) -> None:
    """Dagster would make one up from the inputs' versions, and the two would look different."""
    for asset in ("training_data", "evaluation_data"):
        assert lineage.newest(asset, TWO).metadata["reused_from"].value == ONE
        assert lineage.version(asset, TWO) == lineage.version(asset, ONE)
    assert lineage.version("engine", TWO) != lineage.version("engine", ONE)


def read_from_upstream() -> dict[str, set[str]]:
    """The artifacts that each asset is given, by asset; not what only sets the order."""
    assets = [
        found
        for phase in PHASES
        for found in vars(phase).values()
        if isinstance(found, dg.AssetsDefinition)
    ]
    return {
        asset.key.to_user_string(): {
            each.name for each in asset.op.input_defs if not each.dagster_type.is_nothing
        }
        for asset in assets
    }


def test_inputs_name_the_digests_of_this_release(lineage: Lineage) -> None:
    """An auditor joins releases by these, and by nothing that Dagster wrote itself."""
    given = read_from_upstream()
    assert given["production_deployment"] == {"production_candidate", "packaged_model"}
    # Those that really ran here: the rig published the others, without inputs.
    for asset in (
        "production_approval", "production_candidate", "production_deployment", "archive",
        "removed_version",
    ):  # fmt: skip
        column = lineage.rig.platform.column(ONE)
        inputs = lineage.newest(asset, ONE).metadata["inputs"].value
        assert isinstance(inputs, dict)
        assert given[asset] <= set(inputs), asset
        assert {name: inputs[name] for name in given[asset]} == {
            name: column[name].digest for name in given[asset]
        }


def test_dagsters_own_pointer_names_another_release(lineage: Lineage) -> None:
    """Why digests are in the metadata: the pointer is the newest event of any partition.

    Its input data version is right: SHA-256 of the data version, for one partition.
    """
    lineage.unchecked(ONE, "packaged_model")
    event = lineage.newest("packaged_model", ONE)
    pointer = int(tags(event)["dagster/input_event_pointer/engine"])
    assert pointer == lineage.events("engine", TWO)[0].storage_id
    assert pointer != lineage.events("engine", ONE)[0].storage_id
    engine = lineage.rig.platform.columns.get(ONE, "engine").artifact
    version = tags(event)["dagster/input_data_version/engine"]
    assert version == sha256(engine.encode()).hexdigest()


def test_nothing_is_out_of_date_after_both_releases(lineage: Lineage) -> None:
    """The pointers of the first are to the second's events; its staleness must not be."""
    assert lineage.out_of_date(ONE) == {}
    assert lineage.out_of_date(TWO) == {}


def test_materializing_the_same_bytes_again_makes_nothing_out_of_date(lineage: Lineage) -> None:
    """Columns are write-once: a click on "Materialize" must not ask for a rebuild of the rest."""
    # Converting asks for the verdicts first, and by now another release serves.
    again = {*DATA, *BYTES} - {"converted_weights"}
    before = {asset: lineage.version(asset, ONE) for asset in again}
    counts = {asset: len(lineage.events(asset, ONE)) for asset in before}
    lineage.unchecked(ONE, *before)
    assert {asset: lineage.version(asset, ONE) for asset in before} == before
    assert {a: len(lineage.events(a, ONE)) for a in before} == {a: counts[a] + 1 for a in before}
    assert lineage.out_of_date(ONE) == {}
    assert lineage.out_of_date(TWO) == {}


def test_event_that_happens_again_is_new_to_its_own_release_only(lineage: Lineage) -> None:
    """Staged anew, the approval of that release is about an older staging; no other's is."""
    before = lineage.version("staging_deployment", TWO)
    lineage.assets_succeed(TWO, "staging_deployment")
    assert lineage.version("staging_deployment", TWO) != before
    assert lineage.out_of_date(TWO) == {"production_approval": ["staging_deployment"]}
    assert lineage.out_of_date(ONE) == {}
    lineage.job_succeeds("promote", TWO)  # the decision stands
    lineage.job_succeeds("observe", TWO)
    lineage.job_succeeds("scale", TWO)
    assert lineage.out_of_date(TWO) == {}


def test_route_shows_what_serves_under_its_model(lineage: Lineage) -> None:
    """The external asset's version is the digest of the route that made it serve."""
    route, _ = lineage.rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    assert route is not None
    assert route.serving is not None
    event = lineage.newest("production_route", MODEL)
    assert event.metadata["serving"].value == route.serving.release == TWO
    assert event.metadata["package"].value == lineage.version("packaged_model", TWO)
    # Of a release that was only kept warm and left the route, Dagster is not told.
    shown = event.metadata["route"].value
    assert lineage.version("production_route", MODEL) == digest_of(canonical_json(shown))
    history = lineage.rig.platform.routes.history(Environment.PRODUCTION, MODEL)
    assert shown in [each.model_dump(mode="json") for _, each in history]


def test_metrics_of_the_same_releases_have_the_same_version(lineage: Lineage) -> None:
    """Made every hour: a version that changes although nothing happened says nothing."""
    lineage.job_succeeds("report", None)
    first = lineage.version("lifecycle_metrics", None)
    assert lineage.newest("lifecycle_metrics", None).metadata["digest"].value == first
    lineage.job_succeeds("report", None)
    assert lineage.version("lifecycle_metrics", None) == first
    lineage.job_succeeds("observe", TWO)
    lineage.job_succeeds("report", None)
    assert lineage.version("lifecycle_metrics", None) != first
