"""What somebody does with a running local stack: edit a spec, release, promote, ask, look."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from dagster import (
    AssetKey,
    AssetMaterialization,
    AssetRecordsFilter,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
)

from llmops_assets.dagster_client import REPOSITORY, DagsterClient, Outcome
from llmops_assets.local import stack
from llmops_assets.local.releasing import (
    Decision,
    client_for,
    package_digest,
    start_promotion,
    start_release,
)
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving import triton
from llmops_assets.serving.routes import RouteTarget
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings

MODEL = "date-normalizer"
REQUESTER = "daniela"
APPROVER = "amir"
QUESTION, ANSWER = "le 3 mars 2024", "2024-03-03"
CALL_SECONDS = 30.0
WORKER_START_SECONDS = 120.0
# Five seconds were measured on quiet cores.
DEATH_NOTICED_SECONDS = 40.0
POLL_SECONDS = 0.1

LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) { __typename ... on LaunchRunSuccess { run { runId } } }
}"""


class StackUser:
    """One user of one stack, with a git repository of model specs of their own."""

    def __init__(self, settings: Settings, spec: Path) -> None:
        """
        Args:
            settings: of the stack; its folder of models is made here.
            spec: the example's spec, the first to be committed.
        """
        self.settings = settings
        self.platform = Platform(settings)
        self.spec: Mapping[str, Any] = yaml.safe_load(spec.read_text(encoding="utf-8"))
        # Keys name seconds; two releases within one need different ones.
        self._seconds = itertools.count()
        self._began = datetime.now(UTC)
        settings.models.mkdir(parents=True)
        self._git("init", "--quiet")

    @property
    def client(self) -> DagsterClient:
        """The way into Dagster that the command line takes."""
        return client_for(self.settings)

    @cached_property
    def dagster(self) -> DagsterInstance:
        """Dagster's own records."""
        return DagsterInstance.from_config(str(self.settings.dagster_home))

    @property
    def gateway_url(self) -> str:
        return stack.endpoints(self.settings).gateway_url

    @property
    def known_answers(self) -> dict[str, str]:
        """The spec's known questions with their answers."""
        return {known["prompt"]: known["answer"] for known in self.spec["serving"]["known_answers"]}

    def commit_spec(self, **changes: Any) -> str:
        """Commits the example's spec with some keys changed, at any depth. Returns the commit."""
        content = yaml.safe_dump(_merged(self.spec, changes), allow_unicode=True, sort_keys=False)
        (self.settings.models / f"{MODEL}.yaml").write_text(content, encoding="utf-8")
        self._git("add", "--all")
        self._git("commit", "--quiet", "--allow-empty", "--message", "a spec")
        return self._git("rev-parse", "HEAD")

    def start_release(self, commit: str, release: str | None = None) -> tuple[str, str]:
        """Submits a new release, or one that stopped half-way again. Returns its key and run."""
        key = release or self.new_key()
        return key, start_release(self.client, key, REQUESTER, commit)

    def new_key(self) -> str:
        """A release key that was not used yet."""
        at = self._began + timedelta(seconds=next(self._seconds))
        return Release.by_hand(MODEL, at).key

    def release(self, **changes: Any) -> str:
        """Commits a spec and brings it to staging. Returns the release's key."""
        key, run = self.start_release(self.commit_spec(**changes))
        self.expect_success(run)
        return key

    def start_promotion(self, release: str) -> str:
        """Approves the release's package and submits its promotion. Returns the run's id."""
        package = package_digest(self.settings, release)
        decision = Decision(APPROVER, "it passed every gate", approve=True, package=package)
        return start_promotion(self.client, release, decision)

    def promote(self, release: str) -> str:
        """Puts a release into production. Returns the run's id."""
        run = self.start_promotion(release)
        self.expect_success(run)
        return run

    def run_job(self, job: str, release: str) -> Outcome:
        """Submits a job for a release and waits for its end."""
        return self.follow(self.client.launch(job, release))

    def follow(self, run: str) -> Outcome:
        """Waits for a run's end, and prints what it does: pytest shows it when a test fails."""
        return self.client.follow(run, print)

    def expect_success(self, run: str) -> None:
        outcome = self.follow(run)
        assert outcome.succeeded, outcome.failures

    def expect_failure(self, run: str) -> str:
        """Waits for a run that has to fail. Returns what it says to whoever launched it."""
        outcome = self.follow(run)
        assert not outcome.succeeded
        assert len(outcome.failures) == 1, outcome.failures
        return outcome.failures[0]

    def expect_death(self, run: str) -> None:
        """Waits until Dagster has noticed that a run's worker was killed.

        Raises:
            TimeoutError: it did not notice; the run and its place in a pool would stay.
        """
        self.wait_until(
            f"the failure of run {run}, whose worker was killed",
            lambda: self.run(run).is_finished and run not in self.runs_in_pools(),
            DEATH_NOTICED_SECONDS,
        )
        assert self.run(run).status is DagsterRunStatus.FAILURE

    def materialize(self, release: str, *assets: str) -> str:
        """Launches assets alone, as "Materialize selected" in the UI does. Returns the run's id."""
        params = {
            "selector": {
                "repositoryName": REPOSITORY,
                "repositoryLocationName": stack.CODE_LOCATION,
                "jobName": "__ASSET_JOB",
                "assetSelection": [{"path": [asset]} for asset in assets],
            },
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": release}]},
        }
        response = httpx.post(
            f"{stack.endpoints(self.settings).dagster_url}/graphql",
            json={"query": LAUNCH, "variables": {"params": params}},
            timeout=CALL_SECONDS,
        )
        answer = response.raise_for_status().json()["data"]["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def command(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line as a person does, with settings as variables of the environment."""
        environment = {
            **os.environ,
            "LLMOPS_STATE": str(self.settings.state),
            "LLMOPS_MODELS": str(self.settings.models),
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-m", "llmops_assets.cli", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def ask(self, question: str = QUESTION) -> Mapping[str, Any]:
        """One answer of production, through the gateway."""
        return triton.generate(self.gateway_url, MODEL, question, timeout_seconds=CALL_SECONDS)

    def serving(self) -> RouteTarget:
        """What production's route gives the traffic to."""
        route, _ = self.platform.routes.current(Environment.PRODUCTION, MODEL)
        assert route is not None
        assert route.serving is not None
        return route.serving

    def run(self, run: str) -> DagsterRun:
        found = self.dagster.get_run_by_id(run)
        assert found is not None
        return found

    def wait_until(self, what: str, holds: Callable[[], object], timeout_seconds: float) -> None:
        """Waits for something that happens by itself.

        Raises:
            TimeoutError: it did not happen in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def worker(self, run: str) -> psutil.Process:
        """The process that executes a run, as soon as it has recorded itself."""
        deadline = time.monotonic() + WORKER_START_SECONDS
        while time.monotonic() < deadline:
            for entry in self.dagster.all_logs(run, of_type=DagsterEventType.ENGINE_EVENT):
                if entry.message.startswith("Started process for run") and entry.dagster_event:
                    pid = entry.dagster_event.engine_event_data.metadata["pid"].value
                    return psutil.Process(int(str(pid)))
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"run {run} started no worker within {WORKER_START_SECONDS:.0f} s")

    def materializations(self, asset: str, partition: str) -> list[AssetMaterialization]:
        """The events by which Dagster shows an asset of a release (or of a model), newest first."""
        records = self.dagster.fetch_materializations(
            AssetRecordsFilter(AssetKey(asset), asset_partitions=[partition]), limit=100
        ).records
        return [event for record in records if (event := record.asset_materialization) is not None]

    def materialization(self, asset: str, partition: str) -> AssetMaterialization:
        """The newest of them."""
        found = self.materializations(asset, partition)
        assert found, f"{asset} of {partition} was never materialized"
        return found[0]

    def runs_in_pools(self) -> set[str]:
        """Runs that hold a place in a pool."""
        storage = self.dagster.event_log_storage
        return {
            place.run_id
            for pool in storage.get_concurrency_keys()
            for place in storage.get_concurrency_info(pool).claimed_slots
        }

    def _git(self, *arguments: str) -> str:
        done = subprocess.run(
            [
                "git", "-C", str(self.settings.models.parent),
                "-c", f"user.name={REQUESTER}", "-c", f"user.email={REQUESTER}@example.org",
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )  # fmt: skip
        return done.stdout.strip()


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content with changes; a section with another `source` replaces the former one."""
    merged = dict(content)
    for key, value in changes.items():
        former = merged.get(key)
        if (
            isinstance(former, Mapping)
            and isinstance(value, Mapping)
            and value.get("source", former.get("source")) == former.get("source")
        ):
            merged[key] = _merged(former, value)
        else:
            merged[key] = value
    return merged
