"""Gates of the Operate phase, and the check that the gateway does what is recorded."""

from collections.abc import Iterator

import dagster as dg

from llmops_assets.evidence.gates import INCIDENTS_ANSWERED, SCALING, SERVICE
from llmops_assets.explained import explained
from llmops_assets.operate.incidents import IncidentReport, judge_answered
from llmops_assets.operate.service import ScalingPolicy, judge_scaling, judge_service
from llmops_assets.partitions import MODELS
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge
from llmops_assets.serving.metrics import ServiceSample
from llmops_assets.serving.slots import Environment


@dg.multi_asset_check(specs=check_specs(SERVICE), can_subset=True)
def service_metrics_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        SERVICE: lambda spec, column: judge_service(
            ServiceSample.model_validate_json(column["service_metrics"].document),
            spec.gates.service,
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(SCALING), can_subset=True)
def scaling_policy_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        SCALING: lambda _, column: judge_scaling(
            ScalingPolicy.model_validate_json(column["scaling_policy"].document)
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(INCIDENTS_ANSWERED), can_subset=True)
def incidents_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        INCIDENTS_ANSWERED: lambda _, column: judge_answered(
            IncidentReport.model_validate_json(column["incidents"].document)
        )
    })  # fmt: skip


@dg.asset_check(
    asset="production_route",
    name="recorded_is_observed",
    description="The gateway uses the routes that the store records.",
    partitions_def=MODELS,
)
def production_route_check(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.AssetCheckResult:
    with explained():
        differences = platform.routes.differences(Environment.PRODUCTION)
    model = context.partition_key
    recorded, observed = differences.get(model, (None, None))
    return dg.AssetCheckResult(
        passed=model not in differences,
        description="The gateway uses the recorded route."
        if model not in differences
        else f"The store records generation {recorded}, the gateway uses {observed}. "
        "To do: materialize production_deployment of what should serve; it applies the route.",
        metadata={"recorded": str(recorded), "observed": str(observed)},
    )
