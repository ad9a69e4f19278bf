"""What `llmops triggers` shows: each trigger, what it last did, and why it does nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, computed_field

HEARTBEAT_TOLERANCE = timedelta(minutes=2)
"""A daemon whose last sign of life is older does not run. It gives one every 30 s."""
WIDTH = 120
"""Columns of the table."""


class TickOutcome(StrEnum):
    """How one evaluation of a trigger ended."""

    ACTED = "acted"
    SKIPPED = "skipped"
    FAILED = "failed"


class Tick(BaseModel):
    """The newest evaluation of a trigger that ended."""

    model_config = ConfigDict(frozen=True)

    time: datetime
    outcome: TickOutcome
    reason: str | None = Field(
        description="Why it did nothing, or the error's first line; None when it gave none."
    )


class LastRun(BaseModel):
    """The newest run that a trigger asked for."""

    model_config = ConfigDict(frozen=True)

    run: str
    event: str | None = Field(description="What had happened, in a few words.")
    job: str
    partition: str | None = Field(description="The release; None for a job that has none.")
    status: str = Field(description="Of the run, as Dagster calls it.")
    time: datetime = Field(description="When it was asked for.")


class State(StrEnum):
    """Whether a trigger does its work."""

    RUNNING = "running"
    STOPPED = "stopped"
    FAILING = "failing"


class Trigger(BaseModel):
    """One trigger as of now."""

    model_config = ConfigDict(frozen=True)

    name: str
    purpose: str = Field(description="What it does, in a sentence.")
    switched_on: bool
    last_tick: Tick | None = Field(description="None before the first.")
    next_tick: datetime | None = Field(description="None: not known, or switched off.")
    last_run: LastRun | None = Field(description="None: it has not asked for any yet.")

    @computed_field
    @property
    def state(self) -> State:
        """Failing: it is switched on, and its last tick failed."""
        if not self.switched_on:
            return State.STOPPED
        failed = self.last_tick is not None and self.last_tick.outcome is TickOutcome.FAILED
        return State.FAILING if failed else State.RUNNING


class TriggerBoard(BaseModel):
    """All triggers of the code location, by name, and the daemon that evaluates them."""

    model_config = ConfigDict(frozen=True)

    triggers: tuple[Trigger, ...]
    heartbeat: datetime | None = Field(description="The daemon's last sign of life.")
    daemon_runs: bool

    @property
    def works(self) -> bool:
        """Whether the daemon runs and no trigger fails."""
        return self.daemon_runs and all(t.state is not State.FAILING for t in self.triggers)


def first_sentence(text: str) -> str:
    """The first sentence of a description, on one line."""
    sentence, stop, _ = " ".join(text.split()).partition(". ")
    return sentence + "." if stop else sentence


def daemon_runs(heartbeat: datetime | None, healthy: bool, now: datetime) -> bool:
    """Whether the daemon that evaluates triggers gave a sign of life lately.

    Args:
        healthy: what Dagster says, which believes in a daemon for five minutes.
    """
    return healthy and heartbeat is not None and now - heartbeat <= HEARTBEAT_TOLERANCE


def table(board: TriggerBoard, now: datetime) -> Iterator[str]:
    """Lines for people, of at most `WIDTH` columns."""
    if not board.daemon_runs:
        seen = "never" if board.heartbeat is None else _ago(board.heartbeat, now)
        yield from textwrap.wrap(
            f"Dagster's daemon does not run (last sign of life: {seen}); no trigger acts until it "
            "does. To do: `llmops status`, then `llmops up`.",
            WIDTH,
        )
    columns = "{:<20} {:<8} {:<10} {:<10} {}"
    yield columns.format("TRIGGER", "STATE", "LAST TICK", "NEXT TICK", "LAST EVENT AND ACTION")
    for trigger in board.triggers:
        tick = trigger.last_tick
        front = columns.format(
            trigger.name,
            trigger.state,
            _ago(tick.time, now) if tick else "none yet",
            _next(trigger, board.daemon_runs, now),
            "",
        )
        yield from textwrap.wrap(
            _last(trigger.last_run, now),
            WIDTH,
            initial_indent=front,
            subsequent_indent=" " * len(front),
            break_on_hyphens=False,  # people copy keys from here
        )
        for text in (trigger.purpose, _explanation(tick)):
            yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _last(run: LastRun | None, now: datetime) -> str:
    if run is None:
        return "none yet"
    of = f" {run.partition}" if run.partition else ""
    did = f"{run.job}{of}: {run.status.lower()}, {_ago(run.time, now)}"
    return f"{run.event} → {did}" if run.event else did


def _explanation(tick: Tick | None) -> str:
    if tick is None or tick.reason is None:
        return ""
    return ("error: " if tick.outcome is TickOutcome.FAILED else "idle: ") + tick.reason


def _next(trigger: Trigger, daemon: bool, now: datetime) -> str:
    if not trigger.switched_on:
        return "-"
    if not daemon:
        return "unknown"
    if trigger.next_tick is None:
        return "now"  # Dagster names none that is due
    return f"in {_duration(trigger.next_tick - now)}"


def _ago(time: datetime, now: datetime) -> str:
    return f"{_duration(now - time)} ago"


def _duration(span: timedelta) -> str:
    """In its largest whole unit; two machines' clocks may differ, so never below 0."""
    seconds = max(0, round(span.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
