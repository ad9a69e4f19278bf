"""Gates of the Build phase, as blocking asset checks."""

from collections.abc import Iterator, Mapping

import dagster as dg

from llmops_assets.build.judgements import (
    judge_parity,
    judge_target,
    judge_weights,
)
from llmops_assets.build.packaging import judge_package
from llmops_assets.compliance.judgements import judge_compliance, judge_package_safety
from llmops_assets.develop.judgements import Results, judge_metrics
from llmops_assets.develop.metrics import latency
from llmops_assets.evidence.gates import (
    COMPLIANCE,
    ENGINE_ACCURACY,
    ENGINE_LATENCY,
    FITS_TARGET,
    PACKAGE_INTEGRITY,
    PACKAGE_SAFE,
    PARITY,
    WEIGHTS_COMPLETE,
)
from llmops_assets.evidence.latency_judgement import judge_latency
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle


@dg.multi_asset_check(specs=check_specs(WEIGHTS_COMPLETE), can_subset=True)
def converted_weights_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {WEIGHTS_COMPLETE: judge_weights})


@dg.multi_asset_check(specs=check_specs(FITS_TARGET), can_subset=True)
def engine_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        FITS_TARGET: lambda spec, column: judge_target(
            spec, column["engine"].path, platform.settings
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(PARITY, ENGINE_ACCURACY, ENGINE_LATENCY), can_subset=True)
def engine_validation_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    def results(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Results:
        return Results(
            column["engine_validation"].path, spec, platform.repository(context.partition_key)
        )

    yield from judge(context, platform, {
        PARITY: lambda spec, column: judge_parity(
            column["engine_validation"].path, spec.gates.parity
        ),
        ENGINE_ACCURACY: lambda spec, column: judge_metrics(
            results(spec, column), spec.gates.engine_accuracy
        ),
        ENGINE_LATENCY: lambda spec, column: judge_latency(
            latency(results(spec, column).predictions, confidence=spec.gates.confidence),
            spec.gates.latency.build,
            confidence=spec.gates.confidence,
        ),
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(PACKAGE_INTEGRITY), can_subset=True)
def packaged_model_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {PACKAGE_INTEGRITY: judge_package})


@dg.multi_asset_check(specs=check_specs(PACKAGE_SAFE, COMPLIANCE), can_subset=True)
def compliance_report_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        PACKAGE_SAFE: lambda _, column: judge_package_safety(column),
        COMPLIANCE: lambda _, column: judge_compliance(column, platform.policy.licenses),
    })  # fmt: skip
