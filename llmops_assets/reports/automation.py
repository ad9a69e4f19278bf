"""When reports are made: the only assets that automation conditions serve."""

import dagster as dg

HOURLY = (
    dg.AutomationCondition.cron_tick_passed("@hourly").since_last_handled()
    & ~dg.AutomationCondition.in_progress()
).with_label("an hour has begun")
"""Not `on_cron`, which waits until every partition upstream was updated within the hour."""

REMOVED = (
    dg.AutomationCondition.any_deps_updated().since_last_handled()
    & ~dg.AutomationCondition.any_deps_in_progress()
    & ~dg.AutomationCondition.in_progress()
).with_label("the release was removed")
"""The end of a release's life, from when on its record does not grow.

Nothing is asked for while a release is under way, nor, as with conditions on what is
missing, for every release of the past when a daemon begins.
"""

reports = dg.AutomationConditionSensorDefinition(
    "reports",
    target=dg.AssetSelection.assets("lifecycle_metrics", "audit_record"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
    description="Listens to the clock and to removals: metrics of all releases every hour, and "
    "the audit record of a release once it was removed. It starts no other asset. The record of "
    "a release that still lives is made by the job audit. To switch it off, stop this sensor.",
)
