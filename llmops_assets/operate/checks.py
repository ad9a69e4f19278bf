"""Gates of the Operate phase, and the check that the gateway does what is recorded."""

from collections.abc import Iterator

import dagster as dg

from llmops_assets.evidence.gates import INCIDENTS_ANSWERED, SCALING, SERVICE
from llmops_assets.explained import explained
from llmops_assets.operate.incident_table import incident_table
from llmops_assets.operate.incidents import IncidentReport, judge_answered, open_incidents
from llmops_assets.operate.service import ScalingPolicy, judge_scaling, judge_service
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge
from llmops_assets.serving.metrics import ServiceSample
from llmops_assets.serving.reconciliation import differences
from llmops_assets.serving.slots import Environment

DIFFERENCES = dg.TableSchema(
    [dg.TableColumn(name) for name in ("model", "slot", "difference", "expected", "found", "to do")]
)


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


# Of all models at once, and of no partition: so it belongs to `observe` of any release.
@dg.asset_check(
    asset="production_route",
    name="recorded_is_observed",
    description="Gateway and slots are as the signed routes say. It changes nothing.",
)
def production_route_check(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    with explained():
        found = differences(
            platform.routes, platform.gateway, platform.slots, Environment.PRODUCTION
        )
        models = platform.routes.all(Environment.PRODUCTION)
        unanswered = [
            incident for model in models for incident in open_incidents(platform.evidence, model)
        ]
    traffic = any(difference.traffic for difference in found)
    return dg.AssetCheckResult(
        passed=not found,
        severity=dg.AssetCheckSeverity.ERROR if traffic else dg.AssetCheckSeverity.WARN,
        description="\n".join(map(str, found))
        or f"Gateway and slots are as the routes of {len(models)} models say.",
        metadata={
            "differences": dg.MetadataValue.table(
                [
                    dg.TableRecord(
                        {
                            "model": difference.model or "all",
                            "slot": difference.slot or "gateway",
                            "difference": difference.kind.value,
                            "expected": difference.expected,
                            "found": difference.found,
                            "to do": difference.cure,
                        }
                    )
                    for difference in found
                ],
                schema=DIFFERENCES,
            ),
            "open_incidents": incident_table(unanswered),
        },
    )
