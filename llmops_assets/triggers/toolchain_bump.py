"""Another toolchain: what serves is built again, one model at a time."""

import dagster as dg
from dagster import DagsterRunStatus

from llmops_assets.build.toolchain_bump import Bump, survey
from llmops_assets.errors import TriggerError
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.requests import (
    REQUESTED_BY_TAG,
    outcome,
    release_run,
    was_requested,
)

REQUESTED_BY = "toolchain_bump"
LOG = "triggers/toolchain_bump"
UNDER_WAY = (
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.MANAGED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
)


class ToolchainBumpCursor(Cursor):
    """What was there already when the watch began."""

    adopted: str | None
    """Digest of the record with the releases that are not asked for; None for none."""


@dg.sensor(
    name="toolchain_bump",
    description="Looks at what every model serves in production and at the tools that would "
    "build it now: the toolkit's packages or image (LLMOPS_GPU_IMAGE_DIGEST), and Triton. Where "
    "they differ, the model gets a release `<model>.t<digest>`: the serving release's spec, data "
    "and checkpoint, built, judged and staged with the new tools. One at a time over all models; "
    "one that fails is not repeated and stops no other. It promotes nothing: `llmops approve` "
    "does, as always. A change of llmops-assets itself bumps nothing, and neither do tools that "
    "were there before the first tick. It needs no setting; to switch it off, stop this sensor.",
    jobs=[job for job in asset_jobs if job.name == "release"],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def toolchain_bump(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Asks for the next release that the tools here call for."""
    cursor = ToolchainBumpCursor.from_json(context.cursor)
    found = survey(platform)
    for problem in found.problems:
        context.log.error(problem)
    if cursor is None:
        keys = [bump.release.key for bump in found.bumps]
        adopted = platform.store.append(LOG, {"releases": keys}).digest if keys else None
        return outcome([], ToolchainBumpCursor(adopted=adopted))
    bump = _next(context.instance, platform, found.bumps, cursor)
    if bump is not None and (busy := _under_way(context.instance)) is not None:
        return dg.SkipReason(f"{bump.release} waits for the end of {busy}; one at a time.")
    if bump is not None:
        config = {"spec_of": bump.serving, "derived_from": bump.serving}
        run = release_run(bump.release, event=bump.event, requested_by=REQUESTED_BY, config=config)
        return outcome([run], cursor)
    if found.problems:
        # Last, as a failed tick asks for nothing: no model waits for another's tools.
        raise TriggerError(
            "Some serving models cannot be looked at here",
            expected="the toolchain of everything that serves in production",
            found="; ".join(found.problems),
            cure="install or mend what it names where Dagster's code runs, or stop this sensor",
        )
    return dg.SkipReason("Nothing that serves is left to build with other tools.")


def _next(
    instance: dg.DagsterInstance,
    platform: Platform,
    bumps: tuple[Bump, ...],
    cursor: ToolchainBumpCursor,
) -> Bump | None:
    """The first bump that nobody asked for yet."""
    adopted = [] if cursor.adopted is None else platform.store.record(cursor.adopted)["releases"]
    for bump in bumps:
        key = bump.release.key
        # The column is looked up first, as it is cheap: a bump may wait long for approval.
        if (
            key not in adopted
            and platform.columns.find(key, "model_spec") is None
            and not was_requested(instance, "release", key)
        ):
            return bump
    return None


def _under_way(instance: dg.DagsterInstance) -> str | None:
    """The bump whose run has not ended."""
    filters = dg.RunsFilter(
        job_name="release", tags={REQUESTED_BY_TAG: REQUESTED_BY}, statuses=list(UNDER_WAY)
    )
    records = instance.get_run_records(filters, limit=1)
    return records[0].dagster_run.tags["dagster/partition"] if records else None
