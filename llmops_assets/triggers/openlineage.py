"""The follower of the evidence log that tells an OpenLineage server."""

import dagster as dg
from pydantic import Field

from llmops_assets.platform import Platform
from llmops_assets.reports.openlineage import follow
from llmops_assets.triggers.cursors import Cursor

LONGEST_SECONDS = 30.0
"""A tick ends in time for Dagster, which gives it a minute; the next one goes on."""


class OpenLineageCursor(Cursor):
    """How far the log was followed."""

    following: int = Field(default=0, ge=0)
    """Place in the log of the first entry that was not sent."""


@dg.sensor(
    name="openlineage",
    description="Follows the evidence log and tells the OpenLineage server at "
    "LLMOPS_OPENLINEAGE_URL, such as Marquez or DataHub, what was made from what and what happened "
    "to it; it begins with the first entry. While the server is away the tick fails and nothing is "
    "lost: each event is sent until it is taken, and always names the same run. It starts nothing "
    "here. To switch it off, unset the variable, or stop this sensor.",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
)
def openlineage(
    context: dg.SensorEvaluationContext, platform: dg.ResourceParam[Platform]
) -> dg.SensorResult | dg.SkipReason:
    """Sends what was appended since the last tick."""
    settings = platform.settings
    if settings.openlineage_url is None:
        return dg.SkipReason("LLMOPS_OPENLINEAGE_URL is unset.")
    cursor = OpenLineageCursor.from_json(context.cursor) or OpenLineageCursor()
    followed = follow(
        platform.evidence,
        cursor.following,
        settings.openlineage_url,
        settings.http_timeout_seconds,
        LONGEST_SECONDS,
    )
    if followed.problem is not None:
        # A failed tick remembers nothing, so one that sent something leaves it to the next.
        if followed.following == cursor.following:
            raise followed.problem
        context.log.error(str(followed.problem))
    return dg.SensorResult(
        skip_reason=f"{followed.sent} events were sent.",
        cursor=OpenLineageCursor(following=followed.following).to_json(),
    )
