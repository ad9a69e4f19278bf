"""A sensor's ticks as Dagster's daemon makes them, one at a time and without its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus

from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform


class Daemon:
    """Keeps the cursor, drops run keys it knows, and records runs without running them."""

    def __init__(
        self, sensor: Callable[..., Any], platform: Platform, instance: dg.DagsterInstance
    ) -> None:
        self.sensor = sensor
        self.platform = platform
        self.instance = instance
        self.cursor: str | None = None
        self.skipped: str | None = None
        """Why the last tick asked for nothing, if it said so."""
        self.run_keys: set[str] = set()

    def evaluate(self) -> dg.SensorResult | dg.SkipReason:
        """What the sensor answers; nothing of it is kept, as when the daemon dies here."""
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"platform": self.platform}
        )
        return self.sensor(context)

    def tick(self, status: DagsterRunStatus = DagsterRunStatus.SUCCESS) -> list[dg.RunRequest]:
        """One tick. Returns the runs that it led to, which are recorded with this status."""
        result = self.evaluate()
        if isinstance(result, dg.SkipReason):
            self.skipped = result.skip_message
            return []
        self.skipped = result.skip_reason.skip_message if result.skip_reason else None
        for added in result.dynamic_partitions_requests or ():
            assert isinstance(added, dg.AddDynamicPartitionsRequest)
            self.instance.add_dynamic_partitions(str(RELEASES.name), list(added.partition_keys))
        fresh = [run for run in result.run_requests or () if run.run_key not in self.run_keys]
        for run in fresh:
            assert run.run_key is not None
            self.run_keys.add(run.run_key)
            self.launch(run, status)
        self.cursor = result.cursor
        return fresh

    def launch(self, request: dg.RunRequest, status: DagsterRunStatus) -> None:
        """Records a run of the request, in the state it would have reached by now."""
        tags = dict(request.tags)
        if (key := request.partition_key) is not None:
            assert self.instance.has_dynamic_partition(str(RELEASES.name), key)
            tags["dagster/partition"] = key
        self.instance.create_run_for_job(
            job_def=_job(str(request.job_name)), status=status, tags=tags
        )


def keys(runs: list[dg.RunRequest]) -> list[str]:
    """The releases that runs are of."""
    return [str(run.partition_key) for run in runs]


@dg.op
def nothing() -> None:
    """A stand-in for the assets of a job."""


def _job(name: str) -> dg.JobDefinition:
    @dg.job(name=name)
    def job() -> None:
        nothing()

    return job
