"""Gates of the Develop phase, as blocking asset checks."""

from collections.abc import Iterator

import dagster as dg

from llmops_assets.develop.judgements import judge_accuracy, judge_checkpoint, judge_leakage
from llmops_assets.develop.registration import judge_registered
from llmops_assets.develop.specs import judge_complete
from llmops_assets.evidence.gates import (
    ACCURACY,
    CHECKPOINT_SAFE,
    LEAKAGE,
    REGISTERED_BYTES,
    SPEC_COMPLETE,
)
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge


@dg.multi_asset_check(specs=check_specs(SPEC_COMPLETE), can_subset=True)
def model_spec_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {SPEC_COMPLETE: lambda spec, _: judge_complete(spec)})


@dg.multi_asset_check(specs=check_specs(LEAKAGE), can_subset=True)
def training_data_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        LEAKAGE: lambda _, column: judge_leakage(
            column["training_data"].path, column["evaluation_data"].path
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(CHECKPOINT_SAFE), can_subset=True)
def checkpoint_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        CHECKPOINT_SAFE: lambda _, column: judge_checkpoint(column["checkpoint"].path)
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(ACCURACY), can_subset=True)
def evaluation_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        ACCURACY: lambda spec, column: judge_accuracy(
            column["evaluation"].path / "evaluation.json", spec.gates.accuracy
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(REGISTERED_BYTES), can_subset=True)
def registered_model_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        REGISTERED_BYTES: lambda _, column: judge_registered(
            platform.registry, context.partition_key, column
        )
    })  # fmt: skip
