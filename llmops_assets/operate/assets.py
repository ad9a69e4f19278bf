"""Operate: what serves, how it does, how it scales, and what went wrong."""

from datetime import UTC, datetime

import dagster as dg

from llmops_assets.explained import explained
from llmops_assets.operate.incident_table import incident_table
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.operate.service import sample_of, scaling_now, serving_target
from llmops_assets.partitions import MODELS, RELEASES
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reporting import materialized
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action

GROUP = "operate"
SRE = ["team:sre"]

production_route = dg.AssetSpec(
    "production_route",
    description="Every change of what serves in production, with who and why. One partition a "
    "model. The route itself is a chain of records in the store; these events show it.",
    group_name=GROUP,
    owners=SRE,
    kinds={"envoy"},
    partitions_def=MODELS,
    # Releases of one model change one route; which did is in the event.
    deps=[dg.AssetDep("production_deployment", partition_mapping=dg.AllPartitionMapping())],
)


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=SRE,
    kinds={"triton", "envoy"},
    deps=["production_deployment"],
)
@explained()
def service_metrics(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """Requests, errors, latency and utilisation of the release while it serves."""
    release = context.partition_key
    started = datetime.now(UTC)
    model = Release.parse(release).model
    serving_target(platform.routes, model, release)
    action = Action(asset="service_metrics", media_type="application/vnd.llmops.service-sample.v1")
    sample = sample_of(platform.metrics, model, release)
    return materialized(platform, platform.columns.record(release, action, sample, started))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=["team:platform"],
    kinds={"triton"},
    deps=["production_deployment"],
)
@explained()
def scaling_policy(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """Bounds of the number of servers, and how many there are."""
    release = context.partition_key
    started = datetime.now(UTC)
    model = Release.parse(release).model
    target = serving_target(platform.routes, model, release)
    action = Action(asset="scaling_policy", media_type="application/vnd.llmops.scaling.v1")
    document = scaling_now(platform.slots, model, target, release, started)
    return materialized(platform, platform.columns.record(release, action, document, started))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=SRE,
    kinds={"json"},
    # Not on service_metrics, whose gate stops the run just when there are incidents.
    deps=["production_deployment"],
)
@explained()
def incidents(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """What went wrong with the release while it served, and what was done about each."""
    release = context.partition_key
    started = datetime.now(UTC)
    action = Action(asset="incidents", media_type="application/vnd.llmops.incidents.v1")
    document = incidents_of(platform.evidence, Release.parse(release).model, release)
    result = platform.columns.record(release, action, document, started)
    unanswered = [each for each in document.incidents if each.answered is None]
    return materialized(
        platform,
        result,
        {"table": incident_table(document.incidents), "open": incident_table(unanswered)},
    )
