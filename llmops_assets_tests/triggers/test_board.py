"""The table of triggers: what a person sees of each, and what a monitor's exit code rests on."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from llmops_assets.triggers.board import (
    WIDTH,
    LastRun,
    State,
    Tick,
    TickOutcome,
    Trigger,
    TriggerBoard,
    daemon_runs,
    first_sentence,
    table,
)

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
TICK = Tick(time=NOW - timedelta(seconds=12), outcome=TickOutcome.SKIPPED, reason="no new commit")
RUN = LastRun(
    run="r",
    event="commit 0123456789ab by ada",
    job="release",
    partition="a-model-with-the-longest-name-there-is-40.g0123456789ab",
    status="SUCCESS",
    time=NOW - timedelta(hours=3),
)
TRIGGER = Trigger(
    name="git_push",
    purpose="Makes a release of each changed spec.",
    switched_on=True,
    last_tick=TICK,
    next_tick=NOW + timedelta(seconds=18),
    last_run=RUN,
)


def board(*triggers: Trigger, daemon: bool = True) -> TriggerBoard:
    return TriggerBoard(triggers=triggers, heartbeat=NOW, daemon_runs=daemon)


def shown(*triggers: Trigger, daemon: bool = True) -> str:
    lines = list(table(board(*triggers, daemon=daemon), NOW))
    assert max(map(len, lines)) <= WIDTH, lines
    return " ".join(" ".join(lines).split())


def test_table_says_what_happened_and_what_will() -> None:
    """State, last event, last action, why it is idle and the next tick, in one look."""
    text = shown(TRIGGER)
    assert "git_push running 12 s ago in 18 s commit 0123456789ab by ada → release" in text
    assert f"{RUN.partition}: success, 3 h ago" in text
    assert "Makes a release of each changed spec. idle: no new commit" in text


def test_trigger_that_never_did_anything_says_so() -> None:
    """The commonest sight after an installation."""
    text = shown(TRIGGER.model_copy(update={"last_tick": None, "last_run": None}))
    assert "git_push running none yet in 18 s none yet" in text
    assert "idle" not in text


def test_long_texts_wrap_within_the_terminal() -> None:
    """An error message holds cause and cure, and is longer than a line."""
    failed = Tick(time=NOW, outcome=TickOutcome.FAILED, reason="git does not answer. " * 20)
    run = RUN.model_copy(update={"event": "alert TooManyErrors of " * 12})
    text = shown(TRIGGER.model_copy(update={"last_tick": failed, "last_run": run}))
    assert "error: git does not answer." in text
    assert text.count("git does not answer.") == 20


@pytest.mark.parametrize(
    ("switched_on", "outcome", "state"),
    [
        (True, TickOutcome.SKIPPED, State.RUNNING),
        (True, TickOutcome.ACTED, State.RUNNING),
        (True, TickOutcome.FAILED, State.FAILING),
        (False, TickOutcome.FAILED, State.STOPPED),
    ],
)
def test_only_a_running_trigger_can_fail(
    switched_on: bool, outcome: TickOutcome, state: State
) -> None:
    """What somebody switched off must not page anybody for ever."""
    tick = TICK.model_copy(update={"outcome": outcome})
    trigger = TRIGGER.model_copy(update={"switched_on": switched_on, "last_tick": tick})
    assert trigger.state is state
    assert board(trigger).works is (state is not State.FAILING)


def test_dead_daemon_is_said_first() -> None:
    """Its triggers all look well: the last thing that they did went well."""
    text = shown(TRIGGER, daemon=False)
    assert text.startswith("Dagster's daemon does not run (last sign of life: 0 s ago)")
    assert "12 s ago unknown" in text
    assert not board(TRIGGER, daemon=False).works


@pytest.mark.parametrize(
    ("age", "healthy", "runs"),
    [(timedelta(seconds=40), True, True), (timedelta(minutes=3), True, False),
     (timedelta(seconds=40), False, False), (timedelta(minutes=-9), True, True)],
)  # fmt: skip
def test_heartbeat_decides(age: timedelta, healthy: bool, runs: bool) -> None:
    """Dagster believes in a killed daemon for five minutes. Clocks of machines may differ."""
    assert daemon_runs(NOW - age, healthy, NOW) is runs
    assert not daemon_runs(None, healthy, NOW)


def test_first_sentence_is_found_in_a_docstring() -> None:
    """Descriptions are paragraphs; abbreviations without a space do not end one."""
    assert (
        first_sentence("Listens to 3.11\n    and acts. Then more.") == "Listens to 3.11 and acts."
    )
    assert first_sentence("One only") == "One only"
    assert first_sentence("") == ""
