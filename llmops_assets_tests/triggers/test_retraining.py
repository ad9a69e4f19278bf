"""Schedules make one release for each due time, whatever clock, daemon and outages do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from llmops_assets.errors import TriggerError
from llmops_assets.triggers import retraining as trigger
from llmops_assets.triggers.requests import EVENT_TAG, RUNS_PER_TICK

from ..release_rig import SPEC, Rig
from .daemon import Daemon, keys

pytestmark = pytest.mark.timeout(60)
MONDAY = datetime(2026, 6, 1, 2, 59, 50, tzinfo=UTC)
"""Ten seconds before the schedule below."""


def scheduled(cron: str = "0 3 * * *", zone: str = "UTC", when: str = "changed") -> str:
    section = f'retraining: {{cron: "{cron}", timezone: "{zone}", when: {when}}}\n'
    return SPEC + section


class Scheduler(Daemon):
    """The trigger's ticks, with a clock of the test's own."""

    def __init__(self, rig: Rig, instance: dg.DagsterInstance) -> None:
        super().__init__(trigger.retraining, rig.platform, instance)
        self.time = MONDAY

    def at(self, time: datetime) -> list[str]:
        """What is asked for by a tick at this time."""
        self.time = time
        return keys(self.tick())

    def after(self, **span: float) -> list[str]:
        """What is asked for by a tick so much later."""
        return self.at(self.time + timedelta(**span))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def scheduler(rig: Rig, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """After its first tick, with one scheduled spec."""
    rig.write_spec(scheduled())
    scheduler = Scheduler(rig, instance)
    monkeypatch.setattr(trigger, "now", lambda: scheduler.time)
    assert scheduler.at(MONDAY) == []
    return scheduler


def test_due_time_makes_one_release_named_after_it(scheduler: Scheduler) -> None:
    """Ticks come every half minute; the day has one due time."""
    asked = [key for _ in range(10) for key in scheduler.after(seconds=30)]
    assert asked == ["parrot.s20260601t030000"]
    assert scheduler.after(days=1) == ["parrot.s20260602t030000"]


def test_run_says_what_it_is_for(scheduler: Scheduler) -> None:
    """The run's page is where people see why it is there; its config is what it does."""
    scheduler.time += timedelta(minutes=1)
    (run,) = scheduler.tick()
    assert run.tags[EVENT_TAG] == "schedule 0 3 * * * UTC due 2026-06-01T03:00:00Z"
    assert run.run_config == {"ops": {"model_spec": {"config": {"unless_unchanged": True}}}}


def test_always_means_always(rig: Rig, scheduler: Scheduler) -> None:
    """Some teams want a fresh seed or a fresh certificate every week, whatever changed."""
    rig.write_spec(scheduled(when="always"))
    scheduler.time += timedelta(minutes=1)
    (run,) = scheduler.tick()
    assert run.run_config["ops"]["model_spec"]["config"]["unless_unchanged"] is False


def test_release_holds_the_commit_that_was_fetched(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a git trigger, what was pushed counts, and not the folder beside it."""
    monkeypatch.setattr(trigger, "head_commit", lambda _: "c" * 40)
    scheduler.time += timedelta(minutes=1)
    (run,) = scheduler.tick()
    assert run.run_config["ops"]["model_spec"]["config"]["commit"] == "c" * 40


def test_first_tick_starts_nothing(rig: Rig, scheduler: Scheduler) -> None:
    """Switching the platform on must not retrain every model there is."""
    rig.write_spec(scheduled("* * * * *"))
    scheduler.cursor = None
    assert scheduler.after(days=30) == []
    assert scheduler.after(minutes=1) != []


def test_outage_is_made_up_for_by_one_release(scheduler: Scheduler) -> None:
    """A daemon that was down for a month must not retrain thirty times."""
    assert scheduler.after(days=30, seconds=30) == ["parrot.s20260701t030000"]
    assert scheduler.after(seconds=30) == []


def test_daemon_that_dies_between_tick_and_run_asks_again(scheduler: Scheduler) -> None:
    """The cursor is kept with the runs or not at all; the names are the same."""
    scheduler.time += timedelta(minutes=1)
    lost = scheduler.evaluate()
    assert isinstance(lost, dg.SensorResult)
    scheduler.time += timedelta(minutes=1)
    assert [run.run_key for run in scheduler.tick()] == [
        run.run_key for run in lost.run_requests or ()
    ]


def test_cleared_cursor_and_another_trigger_make_no_second_run(scheduler: Scheduler) -> None:
    """Run keys are per sensor and can be lost; the run itself is what counts."""
    cursor = scheduler.cursor
    assert scheduler.after(minutes=1) == ["parrot.s20260601t030000"]
    scheduler.cursor, scheduler.run_keys = cursor, set()
    assert scheduler.after(minutes=1) == []


def test_clock_that_goes_back_repeats_nothing_and_loses_nothing(scheduler: Scheduler) -> None:
    """As after a restored virtual machine: yesterday again, then today."""
    assert scheduler.after(minutes=1) == ["parrot.s20260601t030000"]
    scheduler.run_keys = set()  # what Dagster knows of keys is not relied on
    assert scheduler.after(hours=-3) == []
    assert [key for _ in range(8) for key in scheduler.after(minutes=30)] == []
    assert scheduler.after(days=1) == ["parrot.s20260602t030000"]


def test_clock_that_is_a_little_behind_keeps_its_place(scheduler: Scheduler) -> None:
    """Time daemons correct clocks by seconds all the time."""
    assert scheduler.after(seconds=11) == ["parrot.s20260601t030000"]
    cursor = scheduler.cursor
    assert scheduler.after(seconds=-5) == []
    assert scheduler.cursor == cursor


def test_clock_that_jumps_ahead_and_back(scheduler: Scheduler) -> None:
    """A year ahead by mistake: the days that follow still count."""
    assert len(scheduler.after(days=365)) == 1
    assert scheduler.at(MONDAY) == []
    assert scheduler.after(minutes=1) == ["parrot.s20260601t030000"]
    assert scheduler.after(days=1) == ["parrot.s20260602t030000"]


def test_changed_cron_counts_from_now_on(rig: Rig, scheduler: Scheduler) -> None:
    """A new schedule is not due for what passed before it was written."""
    scheduler.after(minutes=10)
    rig.write_spec(scheduled("5 3 * * *"))
    assert scheduler.after(seconds=30) == []
    rig.write_spec(scheduled("15 3 * * *"))
    assert scheduler.after(minutes=10) == ["parrot.s20260601t031500"]
    rig.write_spec(SPEC)
    assert scheduler.after(days=3) == []


@pytest.mark.parametrize(
    ("day", "release"),
    [
        # 02:30 does not exist; the clock goes from 02:00 to 03:00, which is 01:00 UTC.
        (datetime(2026, 3, 29, tzinfo=UTC), "parrot.s20260329t010000"),
        # 02:30 comes twice, at 00:30 and 01:30 UTC.
        (datetime(2026, 10, 25, tzinfo=UTC), "parrot.s20261025t003000"),
    ],
)
@pytest.mark.parametrize("seconds", [30, 1800, 6 * 3600])
def test_days_when_clocks_change_have_one_release(
    rig: Rig, scheduler: Scheduler, day: datetime, release: str, seconds: int
) -> None:
    """Twice a year, in the hour in which schedules like to run; with and without outages."""
    rig.write_spec(scheduled("30 2 * * *", "Europe/Berlin"))
    scheduler.cursor = None
    scheduler.at(day - timedelta(hours=1))
    asked = [key for _ in range(6 * 3600 // seconds) for key in scheduler.after(seconds=seconds)]
    assert asked == [release]


def test_full_ticks_go_on_where_they_stopped(rig: Rig, scheduler: Scheduler) -> None:
    """Sixty models at the same hour, one of them deleted and one added meanwhile."""
    for number in range(60):
        text = scheduled().replace("name: parrot", f"name: m{number:02d}")
        (rig.models / f"m{number:02d}.yaml").write_text(text)
    asked = scheduler.after(minutes=1)
    assert len(asked) == RUNS_PER_TICK
    (rig.models / "m40.yaml").unlink()
    # What becomes due meanwhile waits its turn and is not lost.
    for _ in range(2):
        asked += scheduler.after(days=1)
    assert asked == [f"m{n:02d}.s20260601t030000" for n in range(60) if n != 40] + [
        "parrot.s20260601t030000"
    ]
    late = scheduler.after(seconds=30)
    assert late[0] == "m00.s20260603t030000"
    assert len(late) == RUNS_PER_TICK


def test_broken_spec_does_not_stop_the_others(rig: Rig, scheduler: Scheduler) -> None:
    """One team's mistake is that team's; its author sees it elsewhere."""
    (rig.models / "broken.yaml").write_text("name: broken\n")
    assert scheduler.after(minutes=1) == ["parrot.s20260601t030000"]


def test_cursor_of_another_form_fails_the_tick(scheduler: Scheduler) -> None:
    """Better red than a guess at what was done."""
    scheduler.cursor = '{"version": 2}'
    with pytest.raises(TriggerError, match="cannot be read"):
        scheduler.tick()


def test_failed_run_is_not_repeated(scheduler: Scheduler) -> None:
    """The next due time tries again; people are told by the failed run."""
    cursor = scheduler.cursor
    scheduler.time += timedelta(minutes=1)
    assert len(scheduler.tick(DagsterRunStatus.FAILURE)) == 1
    scheduler.cursor, scheduler.run_keys = cursor, set()
    assert scheduler.after(minutes=1) == []
