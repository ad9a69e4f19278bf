"""Reports: the evidence of one release, and the metrics of all."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from llmops_assets.explained import explained
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.reporting import materialized
from llmops_assets.reports.automation import HOURLY, REMOVED
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action

GROUP = "reports"
SRE = ["team:sre"]
ROWS_SHOWN = 50


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=SRE,
    kinds={"json"},
    deps=["removed_version"],
    automation_condition=REMOVED,
)
@explained()
def audit_record(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """Everything that is on record of a release: results, verdicts, incidents, routes."""
    from llmops_assets.reports.audit import audit

    release = context.partition_key
    started = datetime.now(UTC)
    document = audit(platform.columns, platform.routes, release)
    action = Action(
        asset="audit_record",
        media_type="application/vnd.llmops.audit.v1",
        inputs={asset: results[-1].artifact for asset, results in document.results.items()},
    )
    result = platform.columns.record(release, action, document, started)
    return materialized(platform, result.model_copy(update={"facts": {
        "verdicts": {verdict.gate: verdict.decision.value for verdict in document.verdicts},
        "route_changes": len(document.routes),
    }}))  # fmt: skip


@dg.asset(
    group_name=GROUP,
    owners=SRE,
    kinds={"pandas", "parquet"},
    deps=["removed_version"],
    automation_condition=HOURLY,
)
@explained()
def lifecycle_metrics(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult:
    """Metrics of every phase over all releases, as one tidy table in Parquet."""
    from llmops_assets.reports.lifecycle import lifecycle_table

    table = lifecycle_table(platform.columns)
    with tempfile.TemporaryDirectory() as folder:
        table.to_parquet(Path(folder) / "lifecycle_metrics.parquet", index=False)
        stored = platform.store.put(Path(folder), "application/vnd.llmops.lifecycle-metrics.v1")
    newest = table.sort_values("time").tail(ROWS_SHOWN)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(stored.digest),
        metadata={
            "digest": stored.digest,
            "rows": len(table),
            "releases": int(table["release"].nunique()),
            "newest": dg.MetadataValue.md(newest.astype(str).to_markdown(index=False)),
        },
    )
