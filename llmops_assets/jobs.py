"""The jobs: each a thing that somebody does with a release."""

import dagster as dg

from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.gates import REGRESSION
from llmops_assets.explained import explained
from llmops_assets.operate.rollback import moved_by, roll_back, verify
from llmops_assets.partitions import MODELS
from llmops_assets.platform import Platform
from llmops_assets.reporting import route_event

RELEASE_ASSETS = (
    "model_spec",
    "training_data",
    "data_report",
    "evaluation_data",
    "checkpoint",
    "evaluation",
    "registered_model",
    "converted_weights",
    "engine",
    "engine_validation",
    "packaged_model",
    "compliance_report",
    "staging_deployment",
)
PROMOTE_ASSETS = ("production_approval", "production_candidate", "production_deployment")


# Name, what somebody does with it, the assets (their checks come along).
JOBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("release", "From the spec to staging, through every gate.", RELEASE_ASSETS),
    (
        "promote",
        "A decision about the release, the candidate in the idle slot, the route's move.",
        PROMOTE_ASSETS,
    ),
    ("observe", "How the release does that serves.", ("service_metrics", "incidents")),
    ("scale", "Bounds and number of the release's servers.", ("scaling_policy",)),
    ("deprecate", "No more traffic for the release.", ("deprecated_version",)),
    # Not plain "archive": jobs share their namespace with the steps of assets.
    ("archive_release", "The release into cold storage.", ("archive",)),
    ("remove", "The release out of Triton.", ("removed_version",)),
    (
        "review_push",
        "What a push to the branch of specs did, and which specs there are broken.",
        ("pushed_specs",),
    ),
    ("report", "Metrics of every phase over all releases.", ("lifecycle_metrics",)),
    ("audit", "Everything on record of the release.", ("audit_record",)),
)

REGRESSION_CHECK = dg.AssetCheckKey(dg.AssetKey(REGRESSION.asset), REGRESSION.name)
ROUTE_CHECK = dg.AssetCheckKey(dg.AssetKey("production_route"), "recorded_is_observed")


def _selection(name: str, assets: tuple[str, ...]) -> dg.AssetSelection:
    selection = dg.AssetSelection.assets(*assets)
    if name == "promote":
        # Another release may serve since it was judged. The approval waits for the check.
        return selection | dg.AssetSelection.checks(REGRESSION_CHECK)
    if name == "observe":
        return selection | dg.AssetSelection.checks(ROUTE_CHECK)
    return selection


asset_jobs = [
    dg.define_asset_job(name, selection=_selection(name, assets), description=description)
    for name, description, assets in JOBS
]


class RollbackConfig(dg.Config):
    """What to roll back, and why."""

    model: str
    reason: str
    actor: str = "dagster launchpad"
    to: str | None = None
    """Key or version of a release that served fully before; empty for the one that is warm."""
    moved: bool = False
    """Whether this actor has moved the route already; it is then only verified and shown."""


# In no pool: a rollback must not wait for a deployment that hangs. The route's
# compare-and-set keeps the two apart.
@dg.op
def roll_back_route(
    context: dg.OpExecutionContext, config: RollbackConfig, platform: dg.ResourceParam[Platform]
) -> None:
    """Gives production's traffic back to a release that served before, and asks it."""
    with explained():
        if config.moved:
            route = moved_by(platform.routes, config.model, config.actor)
        else:
            route = roll_back(
                platform, config.model, config.actor, config.reason, config.to, context.log.info
            ).route
        if route is None:
            raise LifecycleOrderError(
                f"{config.actor} has moved no route of {config.model} of late",
                expected="a route in its history that names this actor",
                cure="leave `moved` out of the config to roll back now",
            )
    context.instance.add_dynamic_partitions(str(MODELS.name), [route.model])
    context.log_event(route_event(route))
    with explained():
        verify(platform, route)


@dg.job(description="Production back to the release that served before. Names the model.")
def rollback() -> None:
    roll_back_route()
