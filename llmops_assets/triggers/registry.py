"""The trigger that turns versions in the model registry into releases."""

import time

import dagster as dg
from pydantic import ValidationError

from llmops_assets.develop import branch
from llmops_assets.errors import TriggerError
from llmops_assets.jobs import asset_jobs
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.triggers.cursors import Cursor
from llmops_assets.triggers.registry_watch import Watch, begin, look, read_wake
from llmops_assets.triggers.requests import RUNS_PER_TICK, outcome, release_run, was_requested

LOG = "triggers/registry"
CLOCK_TOLERANCE_SECONDS = 1.0
UNKNOWN_PERSON = "mlflow"
"""Who asked for a release when the registry does not say who registered the version."""


class RegistryCursor(Cursor):
    """What was handled, and when the registry was last asked."""

    seen: str
    """Digest of the `Watch` in the store."""
    wake: str | None
    """What the last webhook had left then."""
    polled: float | None
    """Seconds since the epoch; None: ask again in the next tick."""


@dg.sensor(
    name="registry",
    jobs=[job for job in asset_jobs if job.name == "release"],
    minimum_interval_seconds=5,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Listens to the model registry. A version that somebody registered there, of a "
    "model that has a spec here, becomes the release <model>.v<number>: its weights with the "
    "model's current spec, through every gate, to staging. Versions that this platform "
    "registered itself (tag llmops.release) are left alone. So are versions that were there "
    "before the sensor first ran, or before the model first had a spec; while a spec is not "
    "valid, its versions wait. Numbers are what counts: of a registered model that was deleted and "
    "made again, or of a registry put back from a backup, versions up to the highest number "
    "before are left alone. The registry is "
    "asked every LLMOPS_REGISTRY_POLL_SECONDS, and at once after a webhook "
    "(LLMOPS_WEBHOOK_SECRET; docs/registries.md). To switch it off, stop this sensor.",
)
def registry(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Asks the registry for new versions when it is time to, and for a run of each."""
    cursor = RegistryCursor.from_json(context.cursor)
    # Before the registry is asked: a webhook that comes meanwhile is not missed.
    wake = read_wake(platform.settings)
    now = time.time()
    wait = 0.0 if cursor is None else _seconds_to_wait(platform, cursor, wake, now)
    if wait > 0:
        return dg.SkipReason(f"The registry is asked again in {wait:.0f} s, or after a webhook.")

    watch = Watch() if cursor is None else _read_watch(platform, cursor.seen)
    models = branch.current_specs(platform.settings).keys()
    head = branch.head_commit(platform.settings)
    begun = begin(platform.registry, watch, models)
    added = sorted(begun.models.keys() - watch.models.keys())
    before = [f"{model} up to {high}" for model in added if (high := begun.models[model].highest)]
    if cursor is not None and before:
        context.log.info(
            f"Registered before their specs were seen, and left alone: {', '.join(before[:20])} "
            f"({len(before)} models). For one version: llmops release MODEL.vNUMBER"
        )
    news = look(
        platform.registry,
        begun,
        models,
        released=lambda version: was_requested(
            context.instance,
            "release",
            Release.from_registry(version.model, version.version).key,
        ),
        at_most=RUNS_PER_TICK,
    )
    runs = [
        release_run(
            Release.from_registry(version.model, version.version),
            event=f"version {version.version} of {version.model} registered"
            + (f" by {version.registered_by}" if version.registered_by else ""),
            requested_by=version.registered_by or UNKNOWN_PERSON,
            config={} if head is None else {"commit": head},
        )
        for version in news.versions
    ]
    # Written before Dagster keeps the cursor that names it.
    seen = (
        cursor.seen
        if cursor is not None and news.watch == watch
        else platform.store.append(LOG, news.watch.model_dump(mode="json")).digest
    )
    after = RegistryCursor(seen=seen, wake=wake, polled=now if news.complete else None)
    if runs:
        return outcome(runs, after)
    return dg.SensorResult(
        skip_reason=f"No new version of {len(models)} models.", cursor=after.to_json()
    )


def _seconds_to_wait(
    platform: Platform, cursor: RegistryCursor, wake: str | None, now: float
) -> float:
    if cursor.polled is None or (wake is not None and wake != cursor.wake):
        return 0
    if now < cursor.polled - CLOCK_TOLERANCE_SECONDS:
        return 0  # the clock went back: nobody knows for how long
    return cursor.polled + platform.settings.registry_poll_seconds - now


def _read_watch(platform: Platform, digest: str) -> Watch:
    record = platform.store.record(digest)
    try:
        return Watch.model_validate(record)
    except ValidationError as error:
        raise TriggerError(
            "What the registry sensor remembers cannot be read",
            expected=f"in the store, {digest} with a mark for each model",
            found=error,
            cure="clear the sensor's cursor on its page in Dagster: it then begins with what is "
            "registered now; for versions before, run `llmops release MODEL.vNUMBER`",
        ) from error
