"""Gates of the Deploy phase, as blocking asset checks. The canary's is in its asset."""

from collections.abc import Iterator, Mapping

import dagster as dg

from llmops_assets.deploy.approval import Approval
from llmops_assets.deploy.approval import judge as judge_approval
from llmops_assets.deploy.delivery import LoadedPackage
from llmops_assets.deploy.load import judge_staging_latency
from llmops_assets.deploy.smoke import judge_smoke
from llmops_assets.evidence.gates import APPROVAL, CANDIDATE_SMOKE, STAGING_LATENCY, STAGING_SMOKE
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.platform import Platform
from llmops_assets.reporting import Judge, check_specs, judge
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle


def _judge_loaded(asset: str) -> Judge:
    def smoke(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
        loaded = LoadedPackage.model_validate_json(column[asset].document)
        return judge_smoke(
            loaded.answers, spec.gates.smoke, loaded.deployment.version, loaded.problem
        )

    return smoke


def _judge_latency(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
    loaded = LoadedPackage.model_validate_json(column["staging_deployment"].document)
    return judge_staging_latency(loaded.latency, spec.gates)


@dg.multi_asset_check(specs=check_specs(STAGING_SMOKE, STAGING_LATENCY), can_subset=True)
def staging_deployment_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        STAGING_SMOKE: _judge_loaded("staging_deployment"),
        STAGING_LATENCY: _judge_latency,
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(APPROVAL), can_subset=True)
def production_approval_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        APPROVAL: lambda _, column: judge_approval(
            platform,
            context.partition_key,
            Approval.model_validate_json(column["production_approval"].document),
            column["packaged_model"].digest,
        )
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(CANDIDATE_SMOKE), can_subset=True)
def production_candidate_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {CANDIDATE_SMOKE: _judge_loaded("production_candidate")})
