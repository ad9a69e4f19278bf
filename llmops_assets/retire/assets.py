"""Retire: no new traffic, into cold storage, out of Triton."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from llmops_assets.deploy.assets import PRODUCTION_POOL
from llmops_assets.evidence.gates import NOTHING_ROUTES, RESTORES
from llmops_assets.explained import explained
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reporting import materialized
from llmops_assets.reports.audit import audit
from llmops_assets.retire.archive import ArchiveFile, find_archive, write_archive
from llmops_assets.retire.withdrawal import (
    Deprecation,
    Removal,
    refuse_if_serving,
    slots_holding,
    take_off_routes,
)
from llmops_assets.serving.slots import Environment
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action

GROUP = "retire"
ARCHIVE_POOL = "archive"
AFTERWARDS = ("archive", "removed_version", "audit_record")
"""Assets that come after an archive and so cannot be in it."""


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=["team:sre"],
    kinds={"envoy"},
    # Order only: a release that failed before production can be retired as well.
    deps=["incidents"],
    pool=PRODUCTION_POOL,
)
@explained()
def deprecated_version(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """The release takes no traffic any more: off every route, its slots stopped."""
    release = context.partition_key
    started = datetime.now(UTC)
    model = Release.parse(release).model
    platform.spec(release)  # a release that does not exist cannot be deprecated
    take_off_routes(platform.routes, model, release, f"run {context.run.run_id}")
    stopped: list[str] = []
    for slot, deployment in slots_holding(platform.slots, model, release):
        platform.slots.drain(slot)
        platform.slots.stop(slot, deployment)
        stopped.append(str(slot))
    action = Action(asset="deprecated_version", media_type="application/vnd.llmops.deprecation.v1")
    document = Deprecation(release=release, stopped=tuple(stopped), time=started)
    return materialized(platform, platform.columns.record(release, action, document, started))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=["team:platform"],
    kinds={"oci", "tar"},
    pool=ARCHIVE_POOL,
)
@explained()
def archive(
    context: dg.AssetExecutionContext,
    deprecated_version: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The release's bytes and evidence in cold storage, as one OCI layout in a tar file."""
    release = context.partition_key
    started = datetime.now(UTC)
    column = platform.column(release)
    platform.require(release, [NOTHING_ROUTES], column)
    keep = timedelta(days=platform.spec(release).retention.archive_days)
    document = write_archive(
        platform.store,
        platform.settings.cold,
        release,
        {asset: handle for asset, handle in column.items() if asset not in AFTERWARDS},
        audit(platform, release).model_dump(mode="json", exclude={"made"}),
        deprecated_version.result.finished + keep,
    )
    action = Action(
        asset="archive",
        media_type="application/vnd.llmops.archive.v1",
        inputs=dict(document.artifacts),
    )
    return materialized(platform, platform.columns.record(release, action, document, started))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=["team:platform"],
    kinds={"triton"},
    pool=PRODUCTION_POOL,
)
@explained()
def removed_version(
    context: dg.AssetExecutionContext,
    archive: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The release gone from Triton and its model repositories. Its archive stays."""
    release = context.partition_key
    started = datetime.now(UTC)
    model = Release.parse(release).model
    platform.require(release, [NOTHING_ROUTES, RESTORES], platform.column(release))
    route, _ = platform.routes.current(Environment.PRODUCTION, model)
    refuse_if_serving(route, release)
    find_archive(platform.settings.cold, ArchiveFile.model_validate_json(archive.document))
    cleared: list[str] = []
    for slot, deployment in slots_holding(platform.slots, model, release):
        platform.slots.clear(slot, deployment)
        cleared.append(str(slot))
    action = Action(
        asset="removed_version",
        media_type="application/vnd.llmops.removal.v1",
        inputs={"archive": archive.digest},
    )
    document = Removal(release=release, cleared=tuple(cleared), time=started)
    return materialized(platform, platform.columns.record(release, action, document, started))
