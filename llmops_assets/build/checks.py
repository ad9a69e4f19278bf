"""Gates of the Build phase, as blocking asset checks."""

from collections.abc import Iterator

import dagster as dg

from llmops_assets.build.judgements import (
    VALIDATION_FILE,
    judge_parity,
    judge_target,
    judge_weights,
)
from llmops_assets.build.packaging import judge_package
from llmops_assets.develop.judgements import judge_accuracy
from llmops_assets.evidence.gates import (
    ENGINE_ACCURACY,
    FITS_TARGET,
    PACKAGE_INTEGRITY,
    PARITY,
    WEIGHTS_COMPLETE,
)
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge


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
        FITS_TARGET: lambda spec, column: judge_target(spec, column["engine"].path)
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(PARITY, ENGINE_ACCURACY), can_subset=True)
def engine_validation_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        PARITY: lambda spec, column: judge_parity(
            column["engine_validation"].path, spec.gates.parity
        ),
        ENGINE_ACCURACY: lambda spec, column: judge_accuracy(
            column["engine_validation"].path / VALIDATION_FILE, spec.gates.engine_accuracy
        ),
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(PACKAGE_INTEGRITY), can_subset=True)
def packaged_model_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {PACKAGE_INTEGRITY: judge_package})
