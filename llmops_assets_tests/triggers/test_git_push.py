"""The git trigger on a real repository: every push once, whatever stops in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster import DagsterInstance

from llmops_assets.definitions import definitions_for
from llmops_assets.develop import branch
from llmops_assets.develop.specs import SOURCE_FILE, SpecSource
from llmops_assets.errors import TriggerError
from llmops_assets.evidence.keys import create_keys
from llmops_assets.local.databases import DAGSTER_CONFIGURATION
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform
from llmops_assets.settings import Settings
from llmops_assets.triggers import git_push as trigger
from llmops_assets.triggers.git_push import git_push
from llmops_assets.triggers.requests import RUNS_PER_TICK

from ..git_rig import WHO, Pushes, following, git, serve, spec_of
from ..release_rig import PlatformOnDoubles

SECRET = "hunter2hunter2"
MANY = RUNS_PER_TICK + 10


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def remote(tmp_path: Path) -> Pushes:
    remote = Pushes(tmp_path.resolve() / "git")
    remote.push(parrot=spec_of("parrot"), raven=spec_of("raven"))
    return remote


class Daemon:
    """Ticks one after the other, and commits runs and cursor together as Dagster does."""

    def __init__(self, platform: Platform, instance: DagsterInstance) -> None:
        self.platform = platform
        self.instance = instance
        self.cursor: str | None = None
        self.runs: dict[str, dg.RunRequest] = {}
        self.asked: list[str] = []
        """Every release that a tick asked for, in order, with repetitions."""

    def evaluate(self) -> dg.SensorResult | dg.SkipReason:
        """A tick that dies before Dagster commits it."""
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"platform": self.platform}
        )
        result = git_push(context)
        assert isinstance(result, dg.SensorResult | dg.SkipReason)
        return result

    def tick(self) -> list[str]:
        """A whole tick; returns the releases that it asked for."""
        result = self.evaluate()
        if isinstance(result, dg.SkipReason):
            return []
        assert result.cursor is not None
        self.cursor = result.cursor
        runs = list(result.run_requests or [])
        assert len(runs) <= RUNS_PER_TICK
        for run in runs:
            assert run.run_key is not None
            if run.run_key in self.runs:
                continue  # Dagster makes one run of a key
            self.runs[run.run_key] = run
            if run.job_name == "release":
                self.asked.append(str(run.partition_key))
                self.submitted(str(run.partition_key))
        return sorted(str(run.partition_key) for run in runs if run.job_name == "release")

    def submitted(
        self, release: str, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED
    ) -> None:
        """Puts a run of the release on record, as whoever launches one does."""
        tags = {"dagster/partition": release}
        self.instance.add_run(dg.DagsterRun(job_name="release", tags=tags, status=status))

    @property
    def reviews(self) -> list[str]:
        """Commits of which a review was asked for."""
        return [
            run.run_config["ops"]["pushed_specs"]["config"]["commit"]
            for run in self.runs.values()
            if run.job_name == "review_push"
        ]


@pytest.fixture
def daemon(tmp_path: Path, remote: Pushes, instance: DagsterInstance) -> Daemon:
    """One that has seen the repository as it is."""
    daemon = Daemon(following(tmp_path.resolve(), str(remote.bare)), instance)
    assert daemon.tick() == []
    assert daemon.cursor is not None
    return daemon


def test_not_configured_names_the_setting(tmp_path: Path, instance: DagsterInstance) -> None:
    """A trigger that is off must say how to switch it on."""
    result = Daemon(Platform(Settings(state=tmp_path)), instance).evaluate()
    assert isinstance(result, dg.SkipReason)
    assert "LLMOPS_GIT_REPOSITORY" in str(result.skip_message)


def test_begins_with_what_is_there(
    tmp_path: Path, remote: Pushes, instance: DagsterInstance
) -> None:
    """Switching it on must not release a hundred models."""
    daemon = Daemon(following(tmp_path, str(remote.bare)), instance)
    assert daemon.tick() == daemon.tick() == []
    assert daemon.runs == {}


def test_pushes_within_one_tick_make_the_releases_at_the_head(
    daemon: Daemon, remote: Pushes
) -> None:
    """Two pushes to two models and one to both: two releases, no more."""
    remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    remote.push(raven=spec_of("raven", precision="int4"))
    head = remote.push(
        parrot=spec_of("parrot", accuracy="0.96"), raven=spec_of("raven", precision="fp32")
    )
    expected = [f"parrot.g{head[:12]}", f"raven.g{head[:12]}"]
    assert daemon.tick() == expected
    assert daemon.tick() == []
    assert daemon.reviews == [head]
    run = daemon.runs[expected[0]]
    assert run.run_config == {"ops": {"model_spec": {"config": {"commit": head}}}}
    assert run.tags["llmops/requested_by"] == WHO
    assert run.tags["llmops/event"] == f"push of {head[:12]}"


def test_comments_make_no_release(daemon: Daemon, remote: Pushes) -> None:
    """Nor does what is beside the specs, which is not even reviewed."""
    head = remote.push(parrot="# why\n" + spec_of("parrot"))
    assert daemon.tick() == []
    assert daemon.reviews == [head]
    remote.write("README.md", "hello")
    remote.push()
    assert daemon.tick() == []
    assert daemon.reviews == [head]
    assert isinstance(daemon.evaluate(), dg.SkipReason)


def test_broken_spec_holds_up_no_other(daemon: Daemon, remote: Pushes) -> None:
    """One team's typo is one team's red check."""
    head = remote.push(parrot="name: [", raven=spec_of("raven", accuracy="0.95"))
    assert daemon.tick() == [f"raven.g{head[:12]}"]
    mended = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    assert daemon.tick() == [f"parrot.g{mended[:12]}"]


def test_deleted_and_renamed_specs_delete_nothing(daemon: Daemon, remote: Pushes) -> None:
    """Only the new name asks for a release."""
    head = remote.push("parrot", "raven", crow=spec_of("crow"))
    assert daemon.tick() == [f"crow.g{head[:12]}"]
    assert daemon.reviews == [head]


def test_force_push_back_and_forth(daemon: Daemon, remote: Pushes) -> None:
    """A commit that was released is not released again, and each push is reviewed."""
    first = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    assert daemon.tick() == [f"parrot.g{first[:12]}"]
    second = remote.push(parrot=spec_of("parrot", accuracy="0.96"))
    assert daemon.tick() == [f"parrot.g{second[:12]}"]
    for commit in (first, second, first):
        remote.force(commit)
        assert daemon.tick() == []
    assert daemon.reviews == [first, second, first, second, first]
    third = remote.push(parrot=spec_of("parrot", accuracy="0.97"))
    assert daemon.tick() == [f"parrot.g{third[:12]}"]


def test_merge_is_compared_with_what_was_there(daemon: Daemon, remote: Pushes) -> None:
    """Both sides of a merge count, each once."""
    git(remote.clone, "checkout", "--quiet", "-b", "side")
    remote.commit(raven=spec_of("raven", accuracy="0.95"))
    git(remote.clone, "checkout", "--quiet", "main")
    remote.commit(parrot=spec_of("parrot", accuracy="0.95"))
    git(remote.clone, "merge", "--quiet", "--no-ff", "--message", "merge", "side")
    head = remote.push()
    assert daemon.tick() == [f"parrot.g{head[:12]}", f"raven.g{head[:12]}"]


def test_release_that_ci_started_is_not_started_again(daemon: Daemon, remote: Pushes) -> None:
    """Both name it after the commit."""
    head = remote.push(
        parrot=spec_of("parrot", accuracy="0.95"), raven=spec_of("raven", accuracy="0.95")
    )
    daemon.submitted(f"parrot.g{head[:12]}")
    assert daemon.tick() == [f"raven.g{head[:12]}"]


def test_run_that_a_killed_daemon_left_is_asked_for_again(daemon: Daemon, remote: Pushes) -> None:
    """Made, and never submitted: Dagster submits it under the same key, if it is asked."""
    head = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    daemon.submitted(f"parrot.g{head[:12]}", dg.DagsterRunStatus.NOT_STARTED)
    assert daemon.tick() == [f"parrot.g{head[:12]}"]


def test_lost_workers_are_replaced_and_failed_gates_are_not(daemon: Daemon, remote: Pushes) -> None:
    """By tags, as Dagster's own retries read them; two runs of one release never run at once."""
    remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    daemon.tick()
    (run,) = (run for run in daemon.runs.values() if run.job_name == "release")
    assert all(each.tags["dagster/max_retries"] == "2" for each in daemon.runs.values())
    assert run.tags["llmops/release"] == run.partition_key
    configured = yaml.safe_load(DAGSTER_CONFIGURATION.read_text())
    assert configured["run_retries"]["retry_on_asset_or_op_failure"] is False
    (limit,) = configured["concurrency"]["runs"]["tag_concurrency_limits"]
    assert (limit["key"], limit["limit"]) == ("llmops/release", 1)


def test_many_specs_take_several_ticks_while_the_branch_moves_on(
    daemon: Daemon, remote: Pushes
) -> None:
    """All of the first push at its commit, then the second: each once, none lost."""
    names = [f"m{number:02}" for number in range(MANY)]
    first = remote.push(**{name: spec_of(name) for name in names})
    assert len(daemon.tick()) == RUNS_PER_TICK - 1, "and the review"
    second = remote.push(m00=spec_of("m00", accuracy="0.95"), m34=spec_of("m34", accuracy="0.95"))
    while daemon.tick():
        pass
    assert daemon.asked == [f"{name}.g{first[:12]}" for name in names] + [
        f"m00.g{second[:12]}", f"m34.g{second[:12]}"
    ]  # fmt: skip
    assert daemon.reviews == [first, second]


def test_many_files_without_a_release_pass_by(
    daemon: Daemon, remote: Pushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reformatting all specs costs ticks, no runs; what changed behind them is not lost."""
    monkeypatch.setattr(trigger, "FILES_PER_TICK", 4)
    names = [f"m{number}" for number in range(9)]
    remote.push(**{name: spec_of(name) for name in names})
    while daemon.tick():
        pass
    head = remote.push(
        zebra=spec_of("zebra"), **{name: "# hello\n" + spec_of(name) for name in names}
    )
    assert [daemon.tick() for _ in range(4)] == [[], [], [f"zebra.g{head[:12]}"], []]


def test_half_done_push_survives_an_outage_and_a_lost_mirror(
    daemon: Daemon, remote: Pushes
) -> None:
    """What is left of it needs the network no more, or gets its commit again."""
    names = [f"m{number:02}" for number in range(MANY)]
    first = remote.push(**{name: spec_of(name) for name in names})
    begun = daemon.tick()
    away = remote.bare.rename(remote.bare.with_name("away.git"))
    cursor = daemon.cursor
    left = daemon.tick()
    assert sorted(begun + left) == [f"{name}.g{first[:12]}" for name in names]
    daemon.cursor = cursor
    shutil.rmtree(daemon.platform.settings.state)
    with pytest.raises(TriggerError):
        daemon.evaluate()
    away.rename(remote.bare)
    daemon.tick()
    assert len(daemon.asked) == len(set(daemon.asked)) == MANY


def test_tick_that_dies_before_its_cursor_is_kept_asks_for_the_same(
    daemon: Daemon, remote: Pushes
) -> None:
    """Dagster then knows the keys, and makes no second run of them."""
    head = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    keys = []
    for _ in range(2):
        result = daemon.evaluate()
        assert isinstance(result, dg.SensorResult)
        keys.append([run.run_key for run in result.run_requests or []])
    assert keys[0] == keys[1] == [f"review:1:{head}", f"parrot.g{head[:12]}"]
    daemon.tick()
    assert daemon.asked == [f"parrot.g{head[:12]}"]


def test_outage_fails_the_tick_and_is_caught_up(daemon: Daemon, remote: Pushes) -> None:
    """A green tick over a dead server would hide it."""
    cursor = daemon.cursor
    away = remote.bare.rename(remote.bare.with_name("away.git"))
    with pytest.raises(TriggerError, match="cannot be read"):
        daemon.tick()
    away.rename(remote.bare)
    remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    head = remote.push(raven=spec_of("raven", accuracy="0.95"))
    git(remote.bare, "branch", "--move", "main", "gone")
    with pytest.raises(TriggerError, match="no branch main"):
        daemon.tick()
    assert daemon.cursor == cursor
    git(remote.bare, "branch", "--move", "gone", "main")
    assert daemon.tick() == [f"parrot.g{head[:12]}", f"raven.g{head[:12]}"]


def test_lost_mirror_is_fetched_again(daemon: Daemon, remote: Pushes) -> None:
    """The state of git may be cleaned at any time."""
    remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    daemon.tick()
    shutil.rmtree(daemon.platform.settings.state / "git")
    head = remote.push(raven=spec_of("raven", accuracy="0.95"))
    assert daemon.tick() == [f"raven.g{head[:12]}"]


def test_other_repository_or_branch_begins_anew(
    tmp_path: Path, daemon: Daemon, remote: Pushes
) -> None:
    """What differs between two branches was not pushed."""
    git(remote.clone, "checkout", "--quiet", "-b", "next")
    remote.commit(parrot=spec_of("parrot", accuracy="0.95"))
    git(remote.clone, "push", "--quiet", "origin", "next")
    daemon.platform = following(tmp_path.resolve(), str(remote.bare), git_branch="next")
    assert daemon.tick() == []
    head = remote.commit(raven=spec_of("raven", accuracy="0.95"))
    git(remote.clone, "push", "--quiet", "origin", "next")
    assert daemon.tick() == [f"raven.g{head[:12]}"]


def test_cursor_is_small_and_holds_no_address(
    tmp_path: Path, remote: Pushes, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster keeps it for every tick, and shows it to everybody."""
    monkeypatch.setattr(branch, "fetch", lambda _: "c" * 40)
    platform = following(tmp_path, f"https://ada:{SECRET}@example.org/x.git")
    daemon = Daemon(platform, instance)
    daemon.tick()
    assert daemon.cursor is not None
    assert len(daemon.cursor) < 400
    assert not {SECRET, "example"} & set(json.loads(daemon.cursor).values())
    assert "example" not in daemon.cursor


def test_description_tells_a_new_colleague() -> None:
    """It is all that somebody sees of it in the UI."""
    for part in ("LLMOPS_GIT_REPOSITORY", "LLMOPS_GIT_BRANCH", "specs_valid", "switch it off"):
        assert part in str(git_push.description)


# Runs of what the trigger asks for.


def run(
    platform: Platform, instance: DagsterInstance, job: str, assets: list[str] | None,
    config: dict[str, Any], release: str | None = None,
) -> dg.ExecuteInProcessResult:  # fmt: skip
    definitions = definitions_for(platform)
    if release is not None:
        instance.add_dynamic_partitions(str(RELEASES.name), [release])
    return definitions.resolve_job_def(job).execute_in_process(
        instance=instance, partition_key=release, run_config=config, raise_on_error=False,
        asset_selection=None if assets is None else [dg.AssetKey(name) for name in assets],
    )  # fmt: skip


def test_pushed_release_holds_its_commit(daemon: Daemon, remote: Pushes) -> None:
    """Spec, tasks and code of the commit, however the branch and the checkout moved on."""
    remote.write("tasks/date.yaml", "pushed")
    head = remote.push(parrot=spec_of("parrot", accuracy="0.95"))
    (key,) = daemon.tick()
    request = daemon.runs[key]
    remote.write("tasks/date.yaml", "later")
    remote.push(parrot=spec_of("parrot", accuracy="0.99"))
    daemon.tick()
    result = run(
        daemon.platform, daemon.instance, "release", ["model_spec"],
        dict(request.run_config), key,
    )  # fmt: skip
    assert result.success
    assert daemon.platform.spec(key).gates.accuracy["exact_match"].at_least == 0.95
    column = daemon.platform.column(key)["model_spec"]
    source = SpecSource.model_validate_json((column.path / SOURCE_FILE).read_bytes())
    assert (source.file, source.commit) == ("models/parrot.yaml", head)
    assert source.pinned
    assert not source.changed
    repository = daemon.platform.repository(key)
    assert repository == branch.tree(daemon.platform.settings, head)
    assert (repository / "tasks" / "date.yaml").read_text() == "pushed"


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {found.check_name: found for found in result.get_asset_check_evaluations()}


def test_review_shows_the_author_what_is_wrong_until_it_is_mended(
    tmp_path: Path, remote: Pushes, instance: DagsterInstance
) -> None:
    """File and line in a failed check; an earlier push's mistake stays red."""
    platform = following(tmp_path.resolve(), str(remote.bare))
    daemon = Daemon(platform, instance)
    daemon.tick()
    results = []
    for change in (
        {"raven": spec_of("raven").replace("owner: team:tests", "owner: nobody")},
        {"parrot": spec_of("parrot", accuracy="0.95")},
        {"raven": spec_of("raven")},
    ):
        head = remote.push(**change)
        daemon.tick()
        (request,) = [r for k, r in daemon.runs.items() if k.endswith(head)]
        results.append(run(platform, instance, "review_push", None, dict(request.run_config)))
        assert results[-1].success, "a mistake holds up nothing"
    shown = [checks(result)["specs_valid"] for result in results]
    assert [check.passed for check in shown] == [False, False, True]
    for check in shown[:2]:
        assert "models/raven.yaml is not a valid model spec" in str(check.description)
        assert "line 3: owner" in str(check.description)
        assert check.severity is dg.AssetCheckSeverity.ERROR
        assert not check.blocking
    assert checks(results[2])["specs_deleted"].passed
    event = results[1].get_asset_materialization_events()[0].materialization
    table = event.metadata["changes"].value
    (row,) = [record.data for record in table.records]  # type: ignore[union-attr]
    assert row["release"] == f"parrot.g{daemon.reviews[1][:12]}"
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == daemon.reviews[1]


def test_review_warns_of_what_serves_without_a_spec(
    tmp_path: Path, remote: Pushes, instance: DagsterInstance
) -> None:
    """Nothing is deleted; somebody has to decide."""
    platform = following(tmp_path.resolve(), str(remote.bare))
    serve(platform, "parrot", "parrot.v1")
    old = branch.fetch(platform.settings)
    new = remote.push("parrot")
    branch.fetch(platform.settings)
    config = {"ops": {"pushed_specs": {"config": {"commit": new, "previous": old}}}}
    result = run(platform, instance, "review_push", None, config)
    assert result.success
    check = checks(result)["specs_deleted"]
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.WARN
    assert "`llmops deprecate parrot.v1`" in str(check.description)
    assert checks(result)["specs_valid"].passed
    platform.gateway.close()


def test_review_by_hand_needs_no_config(
    tmp_path: Path, remote: Pushes, instance: DagsterInstance
) -> None:
    """Somebody opens the launchpad and clicks; without a repository it says what to set."""
    platform = following(tmp_path.resolve(), str(remote.bare))
    assert run(platform, instance, "review_push", None, {}).success
    settings = Settings(state=tmp_path / "off", models=tmp_path)
    create_keys(settings.key_folder)
    off = PlatformOnDoubles(settings)
    result = run(off, instance, "review_push", None, {})
    failures = [event for event in result.all_events if event.is_step_failure]
    assert "LLMOPS_GIT_REPOSITORY" in str(failures[0].step_failure_data.user_failure_data)
