"""Gates of the Develop phase, as blocking asset checks."""

from collections.abc import Iterator, Mapping

import dagster as dg

from llmops_assets.compliance.judgements import judge_data
from llmops_assets.develop import pushes
from llmops_assets.develop.baseline import evaluation_action, serving_baseline
from llmops_assets.develop.judgements import (
    Results,
    judge_checkpoint,
    judge_fairness,
    judge_leakage,
    judge_metrics,
    judge_regression,
)
from llmops_assets.develop.metrics import latency
from llmops_assets.develop.registration import judge_registered
from llmops_assets.develop.specs import judge_complete
from llmops_assets.errors import LifecycleOrderError
from llmops_assets.evidence.gates import (
    ACCURACY,
    CHECKPOINT_SAFE,
    DATA_COMPLIANCE,
    FAIRNESS,
    LATENCY,
    LEAKAGE,
    REGISTERED_BYTES,
    REGRESSION,
    SPEC_COMPLETE,
)
from llmops_assets.evidence.latency_judgement import judge_latency
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.explained import explained
from llmops_assets.platform import Platform
from llmops_assets.reporting import check_specs, judge
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle


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


@dg.multi_asset_check(specs=check_specs(DATA_COMPLIANCE), can_subset=True)
def data_report_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        DATA_COMPLIANCE: lambda _, column: judge_data(column, platform.policy.licenses)
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(CHECKPOINT_SAFE), can_subset=True)
def checkpoint_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    yield from judge(context, platform, {
        CHECKPOINT_SAFE: lambda _, column: judge_checkpoint(column["checkpoint"].path)
    })  # fmt: skip


@dg.multi_asset_check(specs=check_specs(ACCURACY, FAIRNESS, REGRESSION, LATENCY), can_subset=True)
def evaluation_gates(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    repository = platform.repository(context.partition_key)

    def results(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Results:
        return Results(column["evaluation"].path, spec, repository)

    def regression(spec: ModelSpec, column: Mapping[str, ArtifactHandle]) -> Judgement:
        baseline = serving_baseline(platform.routes, platform.columns, spec.name)
        evaluated = (
            None
            if baseline is None
            else platform.columns.performed(
                evaluation_action(
                    spec,
                    repository,
                    baseline.checkpoint,
                    column["evaluation_data"].digest,
                )
            )
        )
        directory = None if evaluated is None else ArtifactHandle(evaluated, platform.store).path
        return judge_regression(results(spec, column), baseline, directory)

    yield from judge(context, platform, {
        ACCURACY: lambda spec, column: judge_metrics(results(spec, column), spec.gates.accuracy),
        FAIRNESS: lambda spec, column: judge_fairness(results(spec, column), spec.gates.fairness),
        REGRESSION: regression,
        LATENCY: lambda spec, column: judge_latency(
            latency(results(spec, column).predictions, confidence=spec.gates.confidence),
            spec.gates.latency.evaluation,
            confidence=spec.gates.confidence,
        ),
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


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(
            "specs_valid",
            asset="pushed_specs",
            description="Every spec on the branch is valid and not below the policy. It stays "
            "red until the last one is mended, and holds up no other model.",
        ),
        dg.AssetCheckSpec(
            "specs_deleted",
            asset="pushed_specs",
            description="Every model that serves in production has a spec on the branch.",
        ),
    ],
    can_subset=True,
)
def pushed_specs_checks(
    context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.AssetCheckResult]:
    selected = {key.name for key in context.selected_asset_check_keys}
    with explained():
        commit = _newest_push(context)
        broken = pushes.broken_specs(platform, commit)
        orphans = pushes.serving_without_spec(platform, commit)
    at = f"at {commit[:12]}"
    if "specs_valid" in selected:
        yield dg.AssetCheckResult(
            check_name="specs_valid",
            asset_key="pushed_specs",
            passed=not broken,
            description="\n\n".join(change.detail for change in broken)
            or f"Every spec {at} is valid.",
            metadata={"commit": commit, "broken": [change.file for change in broken]},
        )
    if "specs_deleted" in selected:
        yield dg.AssetCheckResult(
            check_name="specs_deleted",
            asset_key="pushed_specs",
            passed=not orphans,
            severity=dg.AssetCheckSeverity.WARN,
            description="\n\n".join(
                f"{model} serves {release} and has no spec {at}; "
                + pushes.retirement(platform, model)
                for model, release in orphans.items()
            )
            or f"Whatever serves has a spec {at}.",
            metadata={"commit": commit, "serving": dict(orphans)},
        )


def _newest_push(context: dg.AssetCheckExecutionContext) -> str:
    """The commit that was looked at last.

    Raises:
        LifecycleOrderError: none was.
    """
    event = context.instance.get_latest_materialization_event(dg.AssetKey("pushed_specs"))
    shown = None if event is None else event.asset_materialization
    if shown is None:
        raise LifecycleOrderError(
            "There is no push to judge yet",
            expected="a materialized pushed_specs",
            cure="launch the job review_push",
        )
    return str(shown.metadata["commit"].value)
