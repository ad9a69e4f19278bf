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
    """Everything that signed statements say of a release: for machines, and as a page."""
    from llmops_assets.reports.audit import audit
    from llmops_assets.reports.publication import AUDIT_FILE, MEDIA_TYPE, PAGE_FILE, published
    from llmops_assets.reports.publication import link as link_to

    release = context.partition_key
    started = datetime.now(UTC)
    record = audit(platform, release)
    report, files = published(record)
    action = Action(
        asset="audit_record",
        media_type=MEDIA_TYPE,
        inputs={step.asset: step.artifact for step in record.build.steps},
    )
    result = platform.columns.record(release, action, report, started, files)
    page = ArtifactHandle(result, platform.store).path / PAGE_FILE
    link = link_to(platform, record, files[PAGE_FILE])
    if not record.integrity.holds:
        context.log.error("the evidence does not hold: " + "; ".join(record.integrity.problems))
    return materialized(platform, result.model_copy(update={"facts": {}}), {
        "summary": dg.MetadataValue.md(report.markdown),
        "gaps": len(record.gaps),
        "evidence_holds": record.integrity.holds,
        "page": dg.MetadataValue.url(link) if link else dg.MetadataValue.path(str(page)),
        "record": dg.MetadataValue.path(str(page.with_name(AUDIT_FILE))),
    })  # fmt: skip


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
