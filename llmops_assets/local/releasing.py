"""What the command line does with releases, as plain functions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llmops_assets.dagster_client import DagsterClient
from llmops_assets.deploy.approval import read_decision, record_approval, verify
from llmops_assets.develop.branch import COMMIT
from llmops_assets.develop.specs import resolve_commit
from llmops_assets.errors import ApprovalError, ReleaseError, SpecError
from llmops_assets.local.stack import endpoints
from llmops_assets.operate.rollback import roll_back
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.routes import Route
from llmops_assets.settings import Settings
from llmops_assets.triggers.requests import RELEASE_TAG, REQUESTED_BY_TAG

RELEASE_JOB = "release"


@dataclass(frozen=True)
class Decision:
    """A person's decision about a package."""

    approver: str
    reason: str
    approve: bool
    package: str
    """Digest of the package."""


@dataclass(frozen=True)
class Recorded:
    """A decision on record."""

    digest: str
    """Of the record."""
    objection: str | None
    """Why an approval does not count; None when it does."""


class Standing(StrEnum):
    """What became of asking for a release."""

    LAUNCHED = "launched"
    UNDER_WAY = "under way"
    IN_STAGING = "in staging"


@dataclass(frozen=True)
class Submission:
    """The run that makes, or made, a release."""

    run: str
    standing: Standing


def client_for(
    settings: Settings, url: str | None = None, token: str | None = None
) -> DagsterClient:
    """The Dagster at `url`, or the local stack's.

    Raises:
        StackError: neither is there, or the token may not be sent to it.
    """
    address = url or endpoints(settings).dagster_url
    return DagsterClient(address, settings.http_timeout_seconds, token)


def start_release(
    client: DagsterClient, release: str, requested_by: str, commit: str | None = None
) -> str:
    """Adds a release and submits its run. Returns the run's id.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    client.add_release(release)
    config: dict[str, Any] = {"commit": commit} if commit is not None else {}
    return client.launch(
        RELEASE_JOB,
        release,
        {"ops": {"model_spec": {"config": config}}} if config else {},
        {REQUESTED_BY_TAG: requested_by, RELEASE_TAG: release},
    )


def full_commit(settings: Settings, revision: str, *, elsewhere: bool) -> str:
    """The full hash of a git revision, of which the release's key is made.

    Args:
        elsewhere: the release is made by another machine, which may have commits that are
            not here; a full hash is then taken as it is.

    Raises:
        ReleaseError: it is no full hash, and there is nothing here to ask for it.
        SpecError: there is no such commit in the repository of specs.
    """
    if not elsewhere:
        return resolve_commit(settings, revision)
    if COMMIT.fullmatch(revision):
        return revision
    try:
        return resolve_commit(settings, revision)
    except SpecError as error:
        raise ReleaseError(
            "The commit's full hash is needed, as there is no repository here that has it",
            expected="40 hex digits",
            found=repr(revision),
            cure="pass `git rev-parse HEAD`; in CI that is $GITHUB_SHA or $CI_COMMIT_SHA",
        ) from error


def submit_release(
    client: DagsterClient, release: str, requested_by: str, commit: str | None, *, again: bool
) -> Submission:
    """Asks for a release, unless somebody did already: a trigger, a person, or CI.

    A run of it that failed is followed by another, which goes on where that stopped.

    Args:
        again: submit it even if its newest run succeeded.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    runs = client.runs(RELEASE_JOB, release)
    if under_way := [run for run in runs if run.under_way]:
        return Submission(min(under_way).run, Standing.UNDER_WAY)
    # Whoever lost a race ended its run, which says nothing of the release.
    newest = next((run for run in runs if not run.cancelled), None)
    if newest is not None and newest.succeeded and not again:
        return Submission(newest.run, Standing.IN_STAGING)
    run = start_release(client, release, requested_by, commit)
    # A trigger may have asked in the same moment. The first one does the work.
    now = (other for other in client.runs(RELEASE_JOB, release) if other.under_way)
    first = min(now, default=None)
    if first is None or first.run == run:
        return Submission(run, Standing.LAUNCHED)
    client.terminate(run)
    return Submission(first.run, Standing.UNDER_WAY)


def start_promotion(client: DagsterClient, release: str, decision: Decision | None) -> str:
    """Submits a promotion, with a decision or with the one recorded before.

    Returns:
        The run's id.

    Raises:
        StackError: Dagster does not answer or refuses.
    """
    config: dict[str, Any] = {}
    if decision is not None:
        config = {
            "ops": {
                "production_approval": {
                    "config": {
                        "approver": decision.approver,
                        "decision": "approve" if decision.approve else "reject",
                        "reason": decision.reason,
                        "package_digest": decision.package,
                    }
                }
            }
        }
    return client.launch("promote", release, config)


def package_digest(settings: Settings, release: str) -> str:
    """Digest of the release's package, as the store has it.

    Raises:
        StackError: there is no stack in the state folder.
        LifecycleOrderError: it has none yet.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    return Platform(settings).columns.get(release, "packaged_model").artifact


def record_decision(settings: Settings, release: str, decision: Decision) -> Recorded:
    """Records a person's decision, for the trigger that promotes.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: the decision is incomplete, or about another package.
    """
    endpoints(settings)  # an empty state folder is the wrong one
    platform = Platform(settings)
    entry = record_approval(
        platform,
        release,
        approver=decision.approver,
        decision="approve" if decision.approve else "reject",
        reason=decision.reason,
        package=decision.package,
    )
    objection = None
    if decision.approve:
        try:
            verify(platform, read_decision(entry.record))
        except ApprovalError as error:
            objection = str(error)
    return Recorded(entry.digest, objection)


def roll_back_now(settings: Settings, model: str, actor: str, reason: str) -> Route:
    """Moves the route back, from here and at once. Returns it.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: there is nothing to roll back to, or the gateway refused.
    """
    Release.parse(f"{model}.v0")  # checks the name
    endpoints(settings)  # an empty state folder is the wrong one
    return roll_back(Platform(settings), model, actor, reason)


def show_route(settings: Settings, route: Route) -> str | None:
    """Shows a changed route in Dagster. Returns what kept it from doing so, or None."""
    from dagster import DagsterInstance
    from sqlalchemy.exc import SQLAlchemyError

    from llmops_assets.partitions import MODELS
    from llmops_assets.reporting import route_event

    try:
        with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            instance.add_dynamic_partitions(str(MODELS.name), [route.model])
            instance.report_runless_asset_event(route_event(route))
    except (SQLAlchemyError, OSError) as error:
        return str(error)
    return None
