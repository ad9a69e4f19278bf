"""Every row of the workflow's table of triggers, from the event to what it brings about.

A real stack with Dagster's own daemon follows a real repository, registry, clock and, where
they are installed, Prometheus and Alertmanager. The tests build on each other, in order.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dagster import AssetCheckKey, AssetKey, DagsterRun, DagsterRunStatus, RunsFilter
from mlflow.tracking import MlflowClient

from llmops_assets.local import stack
from llmops_assets.local.processes import supervised
from llmops_assets.operate.incidents import incidents_of
from llmops_assets.release import Release
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings
from llmops_assets_tests.git_rig import git
from llmops_assets_tests.lifecycle.stack_user import MODEL, StackUser
from llmops_assets_tests.local.conftest import free_ports
from llmops_assets_tests.prometheus import Monitoring, monitoring, needs_prometheus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

SPEC = Path(__file__).parents[2] / "models" / f"{MODEL}.yaml"
NOTICED_SECONDS = 120.0
"""The git trigger looks every 30 s; a busy machine takes longer."""
ALERTED_SECONDS = 60.0
RULES = [{"match": {"alertname": "ErrorRate"}, "action": "rollback"}]
WEBHOOK_SECRET = "a secret of this test alone"


class Team(StackUser):
    """A team whose stack follows the branch of a bare repository."""

    def __init__(self, settings: Settings, spec: Path, origin: Path) -> None:
        super().__init__(settings, spec)
        self._origin = origin
        git(origin.parent, "init", "--quiet", "--bare", "--initial-branch=main", str(origin))
        self._git("commit", "--quiet", "--allow-empty", "--message", "nothing yet")
        self.push()

    def push(self) -> str:
        """Pushes what is committed. Returns the commit."""
        self._git("push", "--quiet", str(self._origin), "HEAD:refs/heads/main")
        return self._git("rev-parse", "HEAD")

    def push_spec(self, **changes: Any) -> str:
        """Commits the spec with some keys changed, and pushes. Returns the release's key."""
        return Release.from_commit(MODEL, self.commit_and_push(**changes)).key

    def commit_and_push(self, **changes: Any) -> str:
        self.commit_spec(**changes)
        return self.push()

    def cursor(self, sensor: str) -> dict[str, Any] | None:
        """What a sensor remembers; None before its first tick."""
        for state in self.dagster.all_instigator_state():
            if state.instigator_name == sensor and state.instigator_data is not None:
                cursor = getattr(state.instigator_data, "cursor", None)
                return None if cursor is None else json.loads(cursor)
        return None

    def handled(self, commit: str) -> bool:
        """Whether the git trigger is done with a commit."""
        cursor = self.cursor("git_push")
        return cursor is not None and (cursor["commit"], cursor["towards"]) == (commit, None)

    def runs_of(self, job: str, partition: str | None = None) -> list[DagsterRun]:
        """All runs of a job, for a release if one is given."""
        tags = {} if partition is None else {"dagster/partition": partition}
        return list(self.dagster.get_runs(RunsFilter(job_name=job, tags=tags)))

    def expect_one_run(self, job: str, partition: str) -> DagsterRun:
        """Waits until a trigger's only run has ended well."""
        self.wait_until(
            f"a run of {job} for {partition}",
            lambda: self.runs_of(job, partition),
            NOTICED_SECONDS,
        )
        (run,) = self.runs_of(job, partition)
        self.expect_success(run.run_id)
        assert len(self.runs_of(job, partition)) == 1
        return self.run(run.run_id)

    def route(self) -> Route:
        """Production's route."""
        route, _ = self.platform.routes.current(Environment.PRODUCTION, MODEL)
        assert route is not None
        return route


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitoring | None]:
    """Prometheus and Alertmanager; None where they are not installed."""
    if needs_prometheus.args[0]:
        yield None
        return
    with monitoring(tmp_path_factory.mktemp("monitoring")) as servers:
        yield servers


@pytest.fixture(scope="module")
def team(servers: Monitoring | None) -> Iterator[Team]:
    """A team with a stack of its own; whatever runs there is stopped at the end."""
    # Not pytest's folder: its path is too long for Unix sockets.
    folder = Path(tempfile.mkdtemp(prefix="llmops-"))
    dagster, mlflow_port, gateway, staging, webhooks = free_ports(5)
    settings = Settings.model_validate(
        {
            "state": folder / "state",
            "models": folder / "repository" / "models",
            "git_repository": str(folder / "team.git"),
            "dagster_port": dagster,
            "mlflow_port": mlflow_port,
            "gateway_port": gateway,
            "staging_gateway_port": staging,
            "webhook_port": webhooks,
            "webhook_secret": WEBHOOK_SECRET,
            "alertmanager_url": None if servers is None else servers.alertmanager.url,
            # Only a webhook can make the registry's trigger act within a test.
            "registry_poll_seconds": 3600,
        }
    )
    try:
        team = Team(settings, SPEC, folder / "team.git")
        stack.up(settings, print)
        sensors = ("git_push", "registry", "retraining", "approval", "toolchain_bump")
        team.wait_until(
            "the first tick of every trigger",
            lambda: all(team.cursor(sensor) is not None for sensor in sensors),
            NOTICED_SECONDS,
        )
        yield team
    finally:
        stack.down(settings)
        left = supervised(settings.state)
        shutil.rmtree(folder, ignore_errors=True)
        assert not left


@pytest.fixture(scope="module")
def first(team: Team) -> str:
    """The release that the first push of the spec makes, beside a spec that is broken."""
    (team.settings.models / "broken.yaml").write_text("name: broken\nuse_cases: typo\n")
    release = team.push_spec(alerts=RULES)
    team.expect_one_run("release", release)
    return release


@pytest.fixture(scope="module")
def second(team: Team, first: str) -> str:
    """The release of a push that changed one engine flag, and mended what was broken."""
    (team.settings.models / "broken.yaml").unlink()
    release = team.push_spec(alerts=RULES, engine={"block_size": 64})
    team.expect_one_run("release", release)
    return release


def test_push_makes_a_release_and_says_what_is_broken(team: Team, first: str) -> None:
    """Row "git push to models/": a mistake in one spec holds up no other, and is shown."""
    assert "staging_deployment" in team.platform.columns.assets(first)
    (review,) = team.runs_of("review_push")
    outcome = team.follow(review.run_id)
    assert outcome.succeeded, outcome.failures
    check = AssetCheckKey(AssetKey("pushed_specs"), "specs_valid")
    (execution,) = team.dagster.event_log_storage.get_asset_check_execution_history(check, 5)
    assert execution.event is not None
    evaluation = execution.event.asset_check_evaluation
    assert evaluation is not None
    assert not evaluation.passed
    assert "broken.yaml" in (evaluation.description or "")
    assert "line 2" in (evaluation.description or "")


def test_comment_starts_nothing(team: Team, first: str) -> None:
    """Formatting is nobody's model."""
    before = len(team.runs_of("release"))
    spec = team.settings.models / f"{MODEL}.yaml"
    spec.write_text("# A thought.\n" + spec.read_text(encoding="utf-8"), encoding="utf-8")
    team._git("commit", "--quiet", "--all", "--message", "a thought")
    commit = team.push()
    team.wait_until("the commit", lambda: team.handled(commit), NOTICED_SECONDS)
    assert len(team.runs_of("release")) == before


def test_engine_flag_starts_no_trainer(team: Team, first: str, second: str) -> None:
    """What a push costs is what it changed."""
    ours = team.platform.columns.assets(second)
    for asset in ("training_data", "checkpoint", "evaluation", "converted_weights"):
        assert ours[asset].reused_from == first, asset
    assert ours["engine"].reused_from is None
    assert not team.platform.tool_log(second, "checkpoint").exists()
    assert team.platform.tool_log(second, "engine").exists()


def test_approval_promotes(team: Team, first: str, second: str) -> None:
    """Row "manual approval": the decision is recorded, the trigger does the rest, once."""
    for release in (first, second):
        for _ in range(2):  # as somebody does who is not sure whether it worked
            said = team.command("approve", release, "--approver", "amir", "--reason", "it is good")
            assert said.returncode == 0, said.stderr
        team.expect_one_run("promote", release)
        assert team.serving().release == release
    assert team.ask()["text_output"] == "2024-03-03"
    assert team.route().generation == 2


@needs_prometheus
def test_alert_rolls_back_once(team: Team, servers: Monitoring, first: str, second: str) -> None:
    """Row "alert": a rule of Prometheus fires, and the route moves before any run starts."""
    assert (team.serving().release, team.route().generation) == (second, 2)
    servers.errors[MODEL] = 0.9
    team.wait_until("the rollback", lambda: team.serving().release == first, ALERTED_SECONDS)
    moved = team.route()
    assert moved.generation == 3
    assert moved.actor.startswith("alert ")
    team.wait_until("its run", lambda: team.runs_of("rollback"), ALERTED_SECONDS)
    (run,) = team.runs_of("rollback")
    team.expect_success(run.run_id)
    assert run.tags["llmops/requested_by"] == "alerts"
    shown = team.materialization("production_route", MODEL)
    assert shown.metadata["generation"].value == 3
    # It goes on firing, through several ticks.
    time.sleep(20)
    assert len(team.runs_of("rollback")) == 1
    assert team.route() == moved
    servers.errors.clear()
    (incident,) = incidents_of(team.platform.evidence, MODEL, second).incidents
    assert incident.action == f"rolled back to {first}"


def test_gate_is_judged_again_and_a_schedule_makes_one_release(
    team: Team, first: str, second: str
) -> None:
    """Row "schedule"; and a push of a threshold builds nothing."""
    due = datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=3)
    release = team.push_spec(
        alerts=RULES,
        engine={"block_size": 64},
        gates={"accuracy": {"perplexity": {"at_most": 1.2}}},
        retraining={"cron": f"{due.minute} {due.hour} * * *", "when": "always"},
    )
    team.expect_one_run("release", release)
    ours = team.platform.columns.assets(release)
    made = {
        asset for asset, result in ours.items()
        if result.reused_from is None and asset in ("checkpoint", "evaluation", "engine",
                                                    "engine_validation", "packaged_model")
    }  # fmt: skip
    assert made == set()
    scheduled = Release.scheduled(MODEL, due).key
    team.wait_until(
        "the schedule's release",
        lambda: team.runs_of("release", scheduled),
        NOTICED_SECONDS + 180,
    )
    team.expect_one_run("release", scheduled)
    spec = team.platform.spec(scheduled)
    assert spec.retraining is not None
    assert len([key for key in team.platform.columns.releases(MODEL) if ".s" in key]) == 1


def test_registered_version_is_deployed_to_staging(team: Team, first: str) -> None:
    """Row "model registry new version": plain MLflow code, and a signed webhook that wakes."""
    url = stack.endpoints(team.settings).mlflow_url
    _, weights = team.platform.store.open(team.platform.columns.get(first, "checkpoint").artifact)
    client = MlflowClient(url)
    experiment = client.create_experiment("a notebook")
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(weights), "model")
    version = client.create_model_version(MODEL, f"runs:/{run}/model", run_id=run)
    release = Release.from_registry(MODEL, int(version.version)).key
    team.expect_one_run("release", release)
    ours = team.platform.columns.assets(release)
    assert "staging_deployment" in ours
    tags = client.get_model_version(MODEL, version.version).tags
    assert tags["llmops.release"] == release
    assert tags["llmops.checkpoint"] == ours["checkpoint"].artifact
    newest = max(int(each.version) for each in client.search_model_versions(f"name='{MODEL}'"))
    assert newest == int(version.version), "adopted, not registered once more"


def test_triggers_are_shown(team: Team, second: str) -> None:
    """A new colleague asks one command what happens by itself here."""
    shown = team.command("triggers", "--json")
    assert shown.returncode == 0, shown.stderr
    print(team.command("triggers").stdout)
    triggers = {each["name"]: each for each in json.loads(shown.stdout)["triggers"]}
    assert {"git_push", "registry", "approval", "retraining", "alerts", "toolchain_bump"} <= set(
        triggers
    )
    assert triggers["approval"]["last_run"]["event"] == "approved by amir"


def test_nothing_ran_twice(team: Team) -> None:
    """Each event had one run, and the route moved once for each promotion."""
    releases = team.runs_of("release")
    partitions = [run.tags["dagster/partition"] for run in releases]
    assert len(partitions) == len(set(partitions))
    assert all(run.status is DagsterRunStatus.SUCCESS for run in releases)
    assert len(team.runs_of("promote")) == 2
