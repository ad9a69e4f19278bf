"""What the command line does with production's traffic, as plain functions.

Apart from `releasing`: a rollback must not wait until Dagster is imported.
"""

from __future__ import annotations

from collections.abc import Callable

from llmops_assets.local.stack import endpoints
from llmops_assets.operate.rollback import Plan, Rollback, plan, roll_back, services, serving_route
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment
from llmops_assets.settings import Settings


def opened(settings: Settings, model: str | None = None) -> Platform:
    """The platform of a stack that was started.

    Args:
        settings: which stack.
        model: a name that is checked on the way.

    Raises:
        StackError: there is no stack in the state folder.
        ReleaseError: the model's name is malformed.
    """
    if model is not None:
        Release.parse(f"{model}.v0")  # checks the name
    endpoints(settings)  # an empty state folder is the wrong one
    return Platform(settings)


def roll_back_now(
    settings: Settings,
    model: str,
    actor: str,
    reason: str,
    to: str | None,
    on_step: Callable[[str], None],
) -> Rollback:
    """Moves the route back, from here and at once.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: there is nothing to roll back to, or the gateway refused.
    """
    return roll_back(opened(settings, model), model, actor, reason, to, on_step)


def rehearse_rollback(settings: Settings, model: str, to: str | None) -> list[str]:
    """What a rollback would do, in sentences, having made every check that it makes.

    Raises:
        StackError: there is no stack in the state folder.
        LLMOpsError: it would be refused, and why.
    """
    platform = opened(settings, model)
    planned = plan(platform, serving_route(platform, model), to)
    return [*_intention(planned), *_history(platform, model, planned)]


def show_route(settings: Settings, route: Route) -> str | None:
    """Shows a changed route in Dagster. Returns what kept it from doing so, or None."""
    from dagster import DagsterError, DagsterInstance
    from sqlalchemy.exc import SQLAlchemyError

    from llmops_assets.partitions import MODELS
    from llmops_assets.reporting import route_event

    if not settings.dagster_home.is_dir():
        return f"there is no {settings.dagster_home}"
    try:
        with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
            instance.add_dynamic_partitions(str(MODELS.name), [route.model])
            instance.report_runless_asset_event(route_event(route))
    except (DagsterError, SQLAlchemyError, OSError) as error:
        return str(error)
    return None


def _intention(planned: Plan) -> list[str]:
    bad, good = planned.taken_off, planned.to
    said = [
        f"would give all traffic of {planned.route.model} to {good.release} (version "
        f"{good.version}), and take off and revoke {bad.release} (version {bad.version})"
    ]
    if planned.warm:
        return [*said, f"{good.release} is warm: the route moves at once"]
    usual = (
        ""
        if planned.load_seconds is None
        else f"; as a candidate it took {planned.load_seconds:.0f} s"
    )
    return [*said, f"{good.release} is not warm: it is loaded from the store first{usual}"]


def _history(platform: Platform, model: str, planned: Plan) -> list[str]:
    for service in services(platform.routes, Environment.PRODUCTION, model):
        if service.deployment == planned.to and service.until is not None:
            return [
                f"{planned.to.release} had all traffic from {service.since:%F %T} "
                f"to {service.until:%F %T} UTC"
            ]
    return []
