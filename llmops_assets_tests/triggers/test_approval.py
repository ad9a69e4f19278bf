"""A recorded decision that counts promotes its release, once; others promote nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from llmops_assets.deploy import examination
from llmops_assets.deploy.approval import (
    RecordedDecision,
    read_decision,
    record_approval,
    record_signed,
    verify,
)
from llmops_assets.errors import ArtifactCorruptError, SpecError, TriggerError
from llmops_assets.evidence.leaves import APPROVALS, Entry
from llmops_assets.evidence.log import Attestation
from llmops_assets.evidence.statements import DECISION, Statement, subject
from llmops_assets.partitions import RELEASES
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.columns import Action
from llmops_assets.storage.store import digest_of
from llmops_assets.triggers import approval as trigger
from llmops_assets.triggers.requests import EVENT_TAG, REQUESTED_BY_TAG, RUNS_PER_TICK

from ..deploy.approvers_rig import ApproversRig, shifted
from ..release_rig import Rig, serving
from ..test_reporting import Runs, description, failures
from .daemon import Daemon, keys

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v1"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def daemon(rig: Rig, packages: None, instance: dg.DagsterInstance) -> Daemon:
    """After its first tick, with three releases that have a package."""
    instance.add_dynamic_partitions(str(RELEASES.name), [f"parrot.v{n}" for n in (1, 2, 3)])
    daemon = Daemon(trigger.approval, rig.platform, instance)
    assert daemon.tick() == []
    return daemon


def record(
    daemon: Daemon,
    approver: str = "bob",
    decision: Literal["approve", "reject"] = "approve",
    release: str = RELEASE,
) -> Entry:
    package = daemon.platform.columns.get(release, "packaged_model").artifact
    return record_approval(daemon.platform, release, approver, decision, "it answers", package)


def test_approval_promotes_once(daemon: Daemon) -> None:
    """The run carries the decision, so that its gate judges what was decided."""
    entry = record(daemon)
    (run,) = daemon.tick()
    assert (run.job_name, run.partition_key, run.run_key) == ("promote", RELEASE, entry.digest)
    assert run.run_config["ops"]["production_approval"]["config"] == {
        "approver": "bob", "decision": "approve", "reason": "it answers",
        "package_digest": entry.statement.predicate["package"],
    }  # fmt: skip
    assert (run.tags[REQUESTED_BY_TAG], run.tags[EVENT_TAG]) == ("bob", "approved by bob")
    assert daemon.tick() == []
    assert daemon.skipped == "Nobody has decided anything since."


def test_first_tick_starts_nothing(daemon: Daemon) -> None:
    """Old decisions must not deploy old releases when a platform is set up again."""
    record(daemon)
    daemon.cursor = None
    assert daemon.tick() == []
    assert daemon.tick() == []
    record(daemon, release="parrot.v2")
    assert keys(daemon.tick()) == ["parrot.v2"]


@pytest.mark.parametrize(
    ("approver", "decision", "why"),
    [
        ("ada", "approve", "ada asked for the release"),
        (" ADA ", "approve", "ADA asked for the release"),
        ("bob", "reject", "bob rejected it"),
    ],
)
def test_decision_that_does_not_count_starts_nothing_and_says_why(
    daemon: Daemon,
    approver: str,
    decision: Literal["approve", "reject"],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever waits for a deployment looks here."""
    record(daemon, approver, decision)
    context = dg.build_sensor_context(
        instance=daemon.instance, cursor=daemon.cursor, resources={"platform": daemon.platform}
    )
    warnings: list[str] = []
    context.log.warning = warnings.append  # type: ignore[method-assign]
    result = trigger.approval(context)
    assert isinstance(result, dg.SensorResult)
    assert not result.run_requests
    assert len(warnings) == 1
    assert why in warnings[0]


@pytest.mark.parametrize(
    "forged",
    [
        {"release": RELEASE},
        {"release": "../../etc", "approver": "bob", "decision": "approve", "reason": "x",
         "package": "x", "time": "2026-01-01T00:00:00Z"},
        {"release": "parrot.v9", "approver": "bob", "decision": "approve", "reason": "x",
         "package": "x", "time": "2026-01-01T00:00:00Z"},
        {"release": RELEASE, "approver": "bob", "decision": "approve", "reason": "x",
         "package": digest_of(b"other"), "time": "2026-01-01T00:00:00Z"},
    ],
)  # fmt: skip
def test_record_that_nobody_could_have_recorded_is_passed(
    daemon: Daemon, forged: dict[str, str]
) -> None:
    """One bad record must neither promote nor keep all later decisions from being seen."""
    statement = Statement(
        subject=(subject("packaged_model", digest_of(b"other")),),
        predicate_type=DECISION,
        predicate=forged,
    )
    daemon.platform.evidence.append(Attestation(statement, [APPROVALS]))
    record(daemon, release="parrot.v2")
    assert keys(daemon.tick()) == ["parrot.v2"]


def test_later_decision_about_a_release_wins(daemon: Daemon) -> None:
    """An approval and its withdrawal, seen at once after an outage."""
    record(daemon)
    record(daemon, release="parrot.v2")
    record(daemon, "carol", "reject")
    record(daemon, "carol", "reject", "parrot.v3")
    record(daemon, "carol", "approve", "parrot.v3")
    assert keys(daemon.tick()) == ["parrot.v2", "parrot.v3"]


@pytest.mark.parametrize(
    ("status", "runs"),
    [
        (DagsterRunStatus.STARTING, 0),
        (DagsterRunStatus.STARTED, 0),
        # It served, and was rolled back since.
        (DagsterRunStatus.SUCCESS, 1),
        (DagsterRunStatus.FAILURE, 1),
        (DagsterRunStatus.CANCELED, 1),
    ],
)
def test_same_decision_again(daemon: Daemon, status: DagsterRunStatus, runs: int) -> None:
    """A second click does nothing; afterwards it is how people try again."""
    record(daemon)
    assert len(daemon.tick(status)) == 1
    record(daemon)
    assert len(daemon.tick()) == runs
    record(daemon, "carol")
    assert len(daemon.tick()) == 1


def test_daemon_that_dies_between_tick_and_run_asks_again(daemon: Daemon) -> None:
    """The same run keys: what Dagster took already, it does not take twice."""
    record(daemon)
    lost = daemon.evaluate()
    assert isinstance(lost, dg.SensorResult)
    (run,) = daemon.tick()
    assert [again.run_key for again in lost.run_requests or ()] == [run.run_key]
    daemon.cursor = trigger.ApprovalCursor(seen=0).to_json()
    assert daemon.tick() == []


def test_many_decisions_take_several_ticks(rig: Rig, daemon: Daemon) -> None:
    """Each promoted once; one that was withdrawn late, though seen early, is not."""
    releases = [f"m{number:02d}.v1" for number in range(RUNS_PER_TICK + 4)]
    daemon.instance.add_dynamic_partitions(str(RELEASES.name), releases)
    for release in releases:
        rig.freeze(release)
        rig.publish(release, "packaged_model", {"package": release})
        record(daemon, release=release)
    record(daemon, "carol", "reject", "m00.v1")
    first = keys(daemon.tick())
    assert first == releases[1 : RUNS_PER_TICK + 1]
    assert first + [key for _ in range(3) for key in keys(daemon.tick())] == releases[1:]


def test_release_that_dagster_does_not_know_is_made_known(daemon: Daemon) -> None:
    """A request for an unknown partition would fail every later tick; the decision counts."""
    daemon.instance.delete_dynamic_partition(str(RELEASES.name), RELEASE)
    record(daemon)
    record(daemon, release="parrot.v2")
    assert keys(daemon.tick()) == [RELEASE, "parrot.v2"]


def test_decision_that_was_taken_is_not_taken_again(rig: Rig, daemon: Daemon) -> None:
    """Dagster's database is put back to a day before the promotion, the store is not."""
    record(daemon)
    before = daemon.cursor
    rig.platform.columns.record(
        RELEASE,
        Action("production_approval", "application/vnd.llmops.approval.v1"),
        verify(
            rig.platform,
            RELEASE,
            read_decision(next(rig.platform.evidence.entries(APPROVALS))),
        ),
        datetime.now(UTC),
    )  # fmt: skip
    daemon.cursor = before
    assert daemon.tick() == []
    record(daemon, "carol")
    assert keys(daemon.tick()) == [RELEASE], "decided anew"


def test_log_with_other_decisions_fails_the_tick(daemon: Daemon) -> None:
    """A store put back from a backup, with as many decisions by now as the cursor has seen."""
    record(daemon)
    daemon.tick()
    daemon.cursor = trigger.ApprovalCursor(seen=1, last=digest_of(b"another")).to_json()
    record(daemon, "carol", release="parrot.v2")
    with pytest.raises(TriggerError, match="other decisions"):
        daemon.tick()


def test_store_with_fewer_decisions_fails_the_tick(daemon: Daemon) -> None:
    """After a restored backup new decisions would lie below the cursor, unseen for ever."""
    record(daemon)
    daemon.tick()
    daemon.cursor = trigger.ApprovalCursor(seen=7).to_json()
    with pytest.raises(TriggerError, match="other decisions"):
        daemon.tick()


def test_recorded_approval_reaches_production(rig: Rig, instance: dg.DagsterInstance) -> None:
    """The whole way through the real job, gates and route; and a later rejection stops it."""
    runs = Runs(rig, instance)
    daemon = Daemon(trigger.approval, rig.platform, instance)
    daemon.tick()
    for version in (1, 2):
        rig.build(f"parrot.v{version}", version)
        assert runs.assets(f"parrot.v{version}", "staging_deployment").success
    record(daemon)
    (run,) = daemon.tick()
    result = runs.job("promote", RELEASE, dict(run.run_config))
    assert result.success, failures(result)
    assert serving(rig) == 1

    record(daemon, release="parrot.v2")
    (run,) = daemon.tick(DagsterRunStatus.NOT_STARTED)
    record(daemon, "carol", "reject", "parrot.v2")
    assert daemon.tick() == []
    result = runs.job("promote", "parrot.v2", dict(run.run_config))
    assert "carol rejected parrot.v2" in description(result, "production_approval")
    assert serving(rig) == 1


def test_recorded_time_is_when_it_was_decided() -> None:
    """Decisions wait through outages; the audit asks when somebody said it."""
    decided = RecordedDecision(
        release=RELEASE, approver="bob", decision="approve", reason="x", package="x",
        time=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    later = decided.model_copy(update={"time": datetime.now(UTC), "reason": "y"})
    assert decided.identity == later.identity
    assert decided.model_copy(update={"approver": "eve"}).identity != decided.identity


@pytest.fixture
def signing(tmp_path: Path, instance: dg.DagsterInstance) -> Iterator[tuple[ApproversRig, Daemon]]:
    """Two releases in staging, a policy that wants two approvers, and the first tick done."""
    rig = ApproversRig(tmp_path / "signing")
    rig.write_policy(rig.policy(required=2))
    for version in (1, 2):
        rig.stage(f"parrot.v{version}", version)
    instance.add_dynamic_partitions(str(RELEASES.name), ["parrot.v1", "parrot.v2"])
    daemon = Daemon(trigger.approval, rig.platform, instance)
    assert daemon.tick() == []
    yield rig, daemon
    rig.close()


def test_signed_approvals_promote_when_there_are_enough(
    signing: tuple[ApproversRig, Daemon],
) -> None:
    """The run gets no names: its gate reads the signatures. An unsigned one starts nothing."""
    rig, daemon = signing
    record(daemon, "grace")
    assert daemon.tick() == []
    record_signed(rig.platform, rig.sign(rig.decided("grace")), "command")
    assert daemon.tick() == []
    record_signed(rig.platform, rig.sign(rig.decided("heidi")), "command")
    (run,) = daemon.tick()
    config = run.run_config["ops"]["production_approval"]["config"]
    assert list(config) == ["package_digest"]
    assert run.tags[REQUESTED_BY_TAG] == "heidi"
    assert run.tags[EVENT_TAG] == "approved by grace, heidi"
    assert daemon.tick() == []


def test_approvals_that_were_committed_promote(
    signing: tuple[ApproversRig, Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who has no access to the store. A broken file keeps no other from being seen."""
    rig, daemon = signing
    monkeypatch.setattr(trigger, "FILES_EVERY", timedelta(0))
    folder = rig.checkout / "approvals"
    folder.mkdir()
    (folder / "a.json").write_text("{}")
    for name in ("grace", "heidi", "mallory"):
        (folder / f"{name}.json").write_text(rig.sign(rig.decided(name)).model_dump_json())
    rig.commit_all(rig.checkout)
    (run,) = daemon.tick()
    assert run.partition_key == RELEASE
    assert daemon.tick() == []
    (folder / "more.txt").write_text("the same files at another commit")
    rig.commit_all(rig.checkout)
    assert daemon.tick() == []
    assert len(list(rig.platform.evidence.entries(APPROVALS))) == 2


def test_unsigned_rejection_beside_a_policy_starts_nothing_and_hides_nothing(
    signing: tuple[ApproversRig, Daemon],
) -> None:
    """A name that anybody typed must neither promote by earlier signatures nor stop later ones."""
    rig, daemon = signing
    rig.write_policy(rig.policy())
    record_signed(rig.platform, rig.sign(rig.decided("grace")), "launchpad")
    assert daemon.tick() == []
    record(daemon, "mallory", "reject")
    assert daemon.tick() == []
    record_signed(rig.platform, rig.sign(rig.decided("heidi")), "command")
    record(daemon, "mallory", "reject")
    assert keys(daemon.tick()) == [RELEASE]


def test_file_that_is_early_is_looked_at_again(
    signing: tuple[ApproversRig, Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who signs on Friday for Monday need not push again on Monday."""
    rig, daemon = signing
    rig.write_policy(rig.policy())
    monkeypatch.setattr(trigger, "FILES_EVERY", timedelta(0))
    early = rig.decided("grace", not_before=datetime.now(UTC) + timedelta(hours=1))
    folder = rig.checkout / "approvals"
    folder.mkdir()
    (folder / "grace.json").write_text(rig.sign(early).model_dump_json())
    rig.commit_all(rig.checkout)
    assert daemon.tick() == []
    monkeypatch.setattr(examination, "datetime", shifted(timedelta(hours=2)))
    assert keys(daemon.tick()) == [RELEASE]


@pytest.mark.parametrize("error", [ArtifactCorruptError, SpecError])
def test_damaged_release_holds_up_no_other(
    signing: tuple[ApproversRig, Daemon],
    monkeypatch: pytest.MonkeyPatch,
    error: type[ArtifactCorruptError | SpecError],
) -> None:
    """Its file is looked at again, once somebody has mended it."""
    rig, daemon = signing
    rig.write_policy(rig.policy())
    monkeypatch.setattr(trigger, "FILES_EVERY", timedelta(0))
    folder = rig.checkout / "approvals"
    folder.mkdir()
    for name, release in (("a", RELEASE), ("b", "parrot.v2")):
        envelope = rig.sign(rig.decided("grace", release))
        (folder / f"{name}.json").write_text(envelope.model_dump_json())
    rig.commit_all(rig.checkout)
    spec = rig.platform.spec

    def damaged(release: str) -> ModelSpec:
        if release == RELEASE:
            raise error("Its bytes are others", cure="restore it")
        return spec(release)

    with monkeypatch.context() as patched:
        patched.setattr(rig.platform, "spec", damaged)
        assert keys(daemon.tick()) == ["parrot.v2"]
    assert keys(daemon.tick()) == [RELEASE]


def test_approval_that_was_pasted_is_left_to_its_run(
    signing: tuple[ApproversRig, Daemon],
) -> None:
    """Two runs would race for the slot."""
    rig, daemon = signing
    rig.write_policy(rig.policy())
    record_signed(rig.platform, rig.sign(rig.decided("grace")), "command")
    record_signed(rig.platform, rig.sign(rig.decided("heidi")), "launchpad")
    assert daemon.tick() == []
