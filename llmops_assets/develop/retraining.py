"""Retraining: when a schedule is due, and whether there is anything new to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim

from llmops_assets.develop.data_action import SPLITS, data_action
from llmops_assets.develop.freezing import repository_of
from llmops_assets.develop.sources import find_source
from llmops_assets.develop.specs import SpecSource
from llmops_assets.develop.weights import checkpoint_action, imported_action
from llmops_assets.errors import SpecError
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.spec import (
    CommandWeights,
    DataFiles,
    ImportedWeights,
    ModelSpec,
    Retraining,
    TrainedWeights,
)
from llmops_assets.storage.columns import Columns
from llmops_assets.storage.store import content_digest

CLOCK_CHANGE = timedelta(hours=3)
"""More than any time zone's clock is ever put back at once."""


@dataclass(frozen=True)
class Due:
    """A model whose schedule asks for a release."""

    model: str
    schedule: Retraining
    time: datetime
    """When it was due, in UTC."""

    @property
    def release(self) -> Release:
        """Named after the time that it was due, so that asking twice makes one release."""
        return Release.scheduled(self.model, self.time)

    @property
    def event(self) -> str:
        """What happened, for people."""
        schedule = self.schedule
        return f"schedule {schedule.cron} {schedule.timezone} due {self.time:%Y-%m-%dT%H:%M:%SZ}"


def due(specs: Mapping[str, ModelSpec], after: datetime, until: datetime) -> list[Due]:
    """The models whose schedules were due in a span of time, by name.

    Each once, at the newest of its times: what an outage missed is made up for by one
    release, not by one for each time that passed.

    Args:
        specs: current specs, by model.
        after: start of the span, with a time zone; not part of it.
        until: its end; part of it.
    """
    return [
        Due(model, spec.retraining, time)
        for model, spec in sorted(specs.items())
        if spec.retraining is not None
        and (time := newest_time(spec.retraining, after, until)) is not None
    ]


def newest_time(schedule: Retraining, after: datetime, until: datetime) -> datetime | None:
    """The schedule's newest time in a span, in UTC; None if there is none in it.

    Where clocks change, as cron in Debian: a time of day that does not exist is due right
    after the gap, one that comes twice is due the first time.

    Args:
        schedule: the spec's section.
        after: start of the span, with a time zone; not part of it.
        until: its end; part of it.
    """
    zone = ZoneInfo(schedule.timezone)
    forward = CronSim(schedule.cron, after.astimezone(zone))
    # Where an hour comes twice, times of day lead back behind `after`.
    first = next((time for time in _in_utc(forward) if time > after), None)
    if first is None or first > until:
        return None
    # Backwards, as an outage may have missed thousands of times; and from later than
    # `until`, as times of day do not tell the two hours apart.
    backward = CronSim(schedule.cron, (until + CLOCK_CHANGE).astimezone(zone), reverse=True)
    return max(first, next(time for time in _in_utc(backward) if time <= until))


def unchanged_since(platform: Platform, spec: ModelSpec, source: SpecSource) -> str | None:
    """The release that learned already from what the spec would learn from now.

    Compared is the newest release of the spec itself that got as far as a checkpoint,
    whether or not it passed its gates: the same data and code would give it again. What
    came from the registry or with another toolchain did not follow the spec of its time.
    Reads all bytes of data and weights that the spec takes from files.

    Args:
        platform: with the releases, and where files may be taken from.
        spec: as it is now.
        source: where it comes from, and with it its files and code.

    Returns:
        The release's key; None if there is something new to learn.

    Raises:
        DataError: a file that the spec names is missing.
        SpecError: code of a trainer or the commit is missing.
        TriggerError: the commit is not here, and LLMOPS_GIT_REPOSITORY does not answer.
    """
    newest = _newest_checkpoint(platform.columns, spec.name)
    if newest is None or not _same_sections(platform, spec, newest):
        return None
    published = platform.columns.assets(newest)
    repository = repository_of(platform.settings, source)
    for split in SPLITS:
        file = None
        if isinstance(spec.data, DataFiles):
            file = find_source(platform.settings, getattr(spec.data, split), repository)
        if data_action(spec.data, split, file).digest != published[f"{split}_data"].action:
            return None
    data, checkpoint = published["training_data"].artifact, published["checkpoint"]
    if isinstance(spec.weights, TrainedWeights | CommandWeights):
        action = checkpoint_action(spec, data, repository)
    elif isinstance(spec.weights, ImportedWeights):
        directory = find_source(platform.settings, spec.weights.path, repository)
        action = imported_action(spec, content_digest(directory))
    else:
        # A version in a registry and a revision on the Hub do not change.
        action = imported_action(spec, checkpoint.parameters.get("content"))
    return newest if action.digest == checkpoint.action else None


def _in_utc(times: Iterable[datetime]) -> Iterator[datetime]:
    return (time.astimezone(UTC) for time in times)


def _newest_checkpoint(columns: Columns, model: str) -> str | None:
    for key in reversed(columns.releases(model)):
        if Release.parse(key).follows_spec and columns.find(key, "checkpoint") is not None:
            return key
    return None


def _same_sections(platform: Platform, spec: ModelSpec, release: str) -> bool:
    try:
        frozen = platform.spec(release)
    except SpecError:
        return False  # of a form that this platform does not read any more, so another
    return all(
        getattr(spec, section) == getattr(frozen, section)
        for section in ("data", "weights", "constraints")
    )
