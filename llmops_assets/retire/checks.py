"""Gates of the Retire phase, as blocking asset checks."""

from collections.abc import Iterator

import dagster as dg

from llmops_assets.evidence.gates import NOTHING_ROUTES, REMOVED, RESTORES
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.reporting import check_specs, judge
from llmops_assets.retire.archive import ArchiveFile, judge_restores
from llmops_assets.retire.withdrawal import judge_gone, judge_nothing_routes


@dg.multi_asset_check(specs=check_specs(NOTHING_ROUTES), can_subset=True)
def deprecated_version_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    release = context.partition_key
    yield from judge(context, platform, {
        NOTHING_ROUTES: lambda spec, _: judge_nothing_routes(platform.routes, spec.name, release)
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(RESTORES), can_subset=True)
def archive_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        RESTORES: lambda _, column: judge_restores(
            platform.settings.cold,
            ArchiveFile.model_validate_json(column["archive"].document),
            platform.settings.work,
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(REMOVED), can_subset=True)
def removed_version_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    release = context.partition_key
    yield from judge(context, platform, {
        REMOVED: lambda _, _column: judge_gone(
            platform.slots, Release.parse(release).model, release
        )
    })  # fmt: skip
