"""When schedules are due, and what counts as something new to learn."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from llmops_assets.develop.assets import SKIPPED_TAG
from llmops_assets.develop.data_action import SPLITS, data_action
from llmops_assets.develop.freezing import spec_to_freeze
from llmops_assets.develop.retraining import newest_time, unchanged_since
from llmops_assets.develop.weights import imported_action
from llmops_assets.jobs import RELEASE_ASSETS
from llmops_assets.partitions import RELEASES
from llmops_assets.release import Release
from llmops_assets.spec import Retraining, parse_spec
from llmops_assets.storage.columns import Action, Workshop
from llmops_assets.storage.store import content_digest

from ..release_rig import SPEC, Rig
from ..test_reporting import Runs, evaluations, failures, materialized, write_data

pytestmark = pytest.mark.timeout(120)
NEW = Release.parse("parrot.s20260601t030000")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize("change", ["2026-03-28T22:00", "2026-10-24T22:00"])
@pytest.mark.parametrize(
    "cron",
    ["30 2 * * *", "15,30 2 * * *", "59 1 * * *", "0 2-3 * * *", "*/7 * * * *", "30 * * * *"],
)
def test_outages_see_what_short_ticks_saw(cron: str, change: str) -> None:
    """Looked at in one span or in many, around a change of clocks, the newest is the same."""
    schedule = Retraining(cron=cron, timezone="Europe/Berlin")
    start, end = at(change), at(change) + timedelta(hours=7)
    ticks = [start + timedelta(seconds=47 * n) for n in range(7 * 3600 // 47)] + [end]
    seen = [
        time
        for after, until in itertools.pairwise(ticks)
        if (time := newest_time(schedule, after, until)) is not None
    ]
    assert len(set(seen)) == len(seen) > 0
    rng = random.Random(1)
    for _ in range(100):
        after, until = sorted(start + timedelta(seconds=rng.randrange(7 * 3600)) for _ in "ab")
        expected = max((time for time in seen if after < time <= until), default=None)
        assert newest_time(schedule, after, until) == expected


def test_long_outage_of_a_busy_schedule_is_looked_at_quickly() -> None:
    """A year of minutes must not be walked through one by one in a tick."""
    schedule = Retraining(cron="* * * * *")
    started = datetime.now(UTC)
    assert newest_time(schedule, at("2025-06-01"), at("2026-06-01T00:00:30")) == at("2026-06-01")
    assert datetime.now(UTC) - started < timedelta(seconds=0.5)


def test_day_that_hardly_ever_comes() -> None:
    """The 29th of February, and not before."""
    schedule = Retraining(cron="0 0 29 2 *")
    assert newest_time(schedule, at("2026-01-01"), at("2028-02-28T23:59")) is None
    assert newest_time(schedule, at("2026-01-01"), at("2028-03-01")) == at("2028-02-29")


def learn(rig: Rig, release: str, text: str = SPEC) -> None:
    """Publishes what the release's assets would up to its checkpoint, from what lies there now."""
    spec = rig.freeze(release, text)
    files = {split: rig.root / f"{split}.jsonl" for split in SPLITS}
    actions: list[Action] = [data_action(spec.data, split, files[split]) for split in SPLITS]
    actions.append(imported_action(spec, content_digest(rig.root / "checkpoint")))

    def make(workshop: Workshop) -> dict[str, str]:
        workshop.output.mkdir(parents=True)
        (workshop.output / "content").write_text("made")
        return {}

    for action in actions:
        rig.platform.columns.produce(release, action, make)


@pytest.fixture
def learned(rig: Rig) -> Rig:
    """A model that learned in release m1 from what lies there now."""
    write_data(rig, ["one"], ["two"])
    (rig.root / "checkpoint").mkdir()
    (rig.root / "checkpoint" / "weights").write_text("1")
    learn(rig, "parrot.m20260101t000000")
    return rig


def newest_same(rig: Rig) -> str | None:
    spec, source = spec_to_freeze(rig.platform, NEW, None, None)
    return unchanged_since(rig.platform, spec, source)


def test_nothing_changed(learned: Rig) -> None:
    """The case that saves a night of training."""
    assert newest_same(learned) == "parrot.m20260101t000000"


@pytest.mark.parametrize("what", ["training.jsonl", "evaluation.jsonl", "checkpoint/weights"])
def test_changed_bytes_are_new(learned: Rig, what: str) -> None:
    """Names stay the same when a nightly export overwrites a file."""
    with (learned.root / what).open("a") as file:
        file.write('{"prompt": "x", "completion": "x", "slice": "s"}\n')
    assert newest_same(learned) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_output_tokens: 12", "max_output_tokens: 13"),
        ("evaluation: evaluation.jsonl", "evaluation: evaluation.jsonl, license: MIT"),
        ("source: path, path: checkpoint", "source: train"),
    ],
)
def test_changed_sections_are_new(learned: Rig, old: str, new: str) -> None:
    """What the model is made from, and for, is part of what it learns."""
    learned.write_spec(SPEC.replace(old, new))
    assert newest_same(learned) is None


def test_changed_gate_is_nothing_new(learned: Rig) -> None:
    """A push judges it again; a schedule asks whether there is something to learn."""
    learned.write_spec(SPEC.replace("largest_gap: 0.1", "largest_gap: 0.2"))
    assert newest_same(learned) == "parrot.m20260101t000000"


def test_changed_code_of_a_trainer_is_new(learned: Rig) -> None:
    """The trainer's script is as much a part of the weights as the data."""
    from llmops_assets.develop.weights import checkpoint_action

    text = SPEC.replace(
        "{source: path, path: checkpoint}",
        '{source: command, command: [python, train.py, "{output}"], code: [train.py]}',
    )
    learned.write_spec(text)
    (learned.root / "train.py").write_text("pass\n")
    spec = parse_spec(text, "test")
    release = "parrot.m20260102t000000"
    learn(learned, "parrot.m20260101t000001")
    learned.freeze(release, text)
    for split in SPLITS:
        result = learned.platform.columns.get("parrot.m20260101t000001", f"{split}_data")
        learned.platform.columns.publish(result.model_copy(update={"release": release}))
    data = learned.platform.columns.get(release, "training_data").artifact
    checkpoint = learned.platform.columns.get("parrot.m20260101t000001", "checkpoint")
    action = checkpoint_action(spec, data, learned.root).digest
    learned.platform.columns.publish(
        checkpoint.model_copy(update={"release": release, "action": action})
    )
    assert newest_same(learned) == release
    (learned.root / "train.py").write_text("pass  # better\n")
    assert newest_same(learned) is None


def test_release_without_a_checkpoint_is_no_measure(learned: Rig) -> None:
    """One that failed on its data learned nothing; the one before did."""
    learned.freeze("parrot.m20260102t000000")
    assert newest_same(learned) == "parrot.m20260101t000000"


def test_releases_that_do_not_follow_the_spec_are_no_measure(learned: Rig) -> None:
    """A version from a notebook between two schedules must not start a training."""
    for release in ("parrot.v7", "parrot.t123456789abc"):
        learn(learned, release, SPEC.replace("max_output_tokens: 12", "max_output_tokens: 9"))
    assert newest_same(learned) == "parrot.m20260101t000000"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def test_unchanged_release_skips_the_whole_run(learned: Rig, instance: dg.DagsterInstance) -> None:
    """No asset, no check and no gate may run or fail, and no empty column may stay."""
    runs = Runs(learned, instance)
    config = {"ops": {"model_spec": {"config": {"unless_unchanged": True}}}}
    result = runs.job("release", NEW.key, config)
    assert result.success, failures(result)
    assert materialized(result) == set()
    assert evaluations(result) == {}
    skipped = {event.step_key for event in result.all_events if event.is_step_skipped}
    assert set(RELEASE_ASSETS) - {"model_spec"} <= skipped
    assert "model_spec_gates" in skipped
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags[SKIPPED_TAG] == (
        "data and code are those that parrot.m20260101t000000 learned from"
    )
    assert learned.platform.columns.releases("parrot") == ["parrot.m20260101t000000"]
    assert not instance.has_dynamic_partition(str(RELEASES.name), NEW.key)


def test_changed_release_goes_on(learned: Rig, instance: dg.DagsterInstance) -> None:
    """The same config with new rows: the run goes as far as a run without it."""
    write_data(learned, ["one", "three"], ["two"])
    config = {"ops": {"model_spec": {"config": {"unless_unchanged": True}}}}
    result = Runs(learned, instance).job("release", NEW.key, config)
    assert {"model_spec", "training_data"} <= materialized(result)
    assert learned.platform.columns.get(NEW.key, "training_data").facts["rows"] == 2


def test_release_that_goes_on_later_is_not_skipped(
    learned: Rig, instance: dg.DagsterInstance
) -> None:
    """Re-run after a failure, its own data are those of the newest release."""
    runs = Runs(learned, instance)
    assert runs.assets(NEW.key, "model_spec").success
    config = {"ops": {"model_spec": {"config": {"unless_unchanged": True}}}}
    result = runs.job("release", NEW.key, config)
    assert "model_spec" in materialized(result)
    source = json.loads(runs.rig.platform.column(NEW.key)["model_spec"].path.joinpath(
        "source.json").read_text())  # fmt: skip
    assert source["spec_of"] is None
