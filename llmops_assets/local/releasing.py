"""What the command line does with releases, as plain functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmops_assets.dagster_client import DagsterClient
from llmops_assets.local.stack import endpoints
from llmops_assets.operate.rollback import roll_back
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.routes import Route
from llmops_assets.settings import Settings
from llmops_assets.triggers.requests import REQUESTED_BY_TAG


@dataclass(frozen=True)
class Decision:
    """A person's decision about a package."""

    approver: str
    reason: str
    approve: bool
    package: str
    """Digest of the package."""


def client_for(
    settings: Settings, url: str | None = None, token: str | None = None
) -> DagsterClient:
    """The Dagster at `url`, or the local stack's.

    Raises:
        StackError: neither is there.
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
        "release",
        release,
        {"ops": {"model_spec": {"config": config}}} if config else {},
        {REQUESTED_BY_TAG: requested_by},
    )


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
