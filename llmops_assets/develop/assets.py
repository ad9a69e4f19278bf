"""Develop: from a model spec to a version in the model registry."""

import getpass
import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from llmops_assets import compliance
from llmops_assets.develop import branch, pushes, weights
from llmops_assets.develop.baseline import evaluation_action, serving_baseline
from llmops_assets.develop.data_action import Split, data_action
from llmops_assets.develop.freezing import spec_to_freeze, taken_over
from llmops_assets.develop.harness_tasks import (
    hold_tasks_still,
    task_digests,
    tool_arguments,
)
from llmops_assets.develop.registry import LossPoint
from llmops_assets.develop.retraining import unchanged_since
from llmops_assets.develop.sources import find_source, hold_still
from llmops_assets.develop.specs import SOURCE_FILE
from llmops_assets.evidence.gates import CHECKPOINT_SAFE, DATA_COMPLIANCE, DEVELOPED, LEAKAGE
from llmops_assets.explained import explained
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import SPEC_FILE, Platform, frozen_spec
from llmops_assets.policy import check_floors
from llmops_assets.release import Release
from llmops_assets.reporting import materialized, produce
from llmops_assets.spec import (
    CommandWeights,
    DataFiles,
    HuggingFaceWeights,
    ImportedWeights,
    MLflowWeights,
    ModelSpec,
    TrainedWeights,
    canonical,
)
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action, Result, Workshop
from llmops_assets.tools import ToolRunner, module_command
from llmops_assets.triggers.requests import REQUESTED_BY_TAG
from llmops_assets.versions import source_version, versions_of

GROUP = "develop"
OWNERS = ["team:data-science"]
HEAVY_POOL = "heavy_compute"
"""Pool of the steps that use all cores; one at a time on one machine."""
# Models wear out in months. It is about the newest evaluation of any model: that none was
# made at all says that schedules, pushes and registrations have all ceased.
EVALUATION_FRESHNESS = dg.FreshnessPolicy.time_window(
    fail_window=timedelta(days=35), warn_window=timedelta(days=31)
)
SKIPPED_TAG = "llmops/skipped"
"""Why a run made no release; on the run of a schedule that found nothing new."""


class ModelSpecConfig(dg.Config):
    """Which spec to freeze, and whether to go on at all."""

    commit: str | None = None
    """A git revision of the repository of specs; unset: the file as it is now."""
    derived_from: str | None = None
    """The release that this one changes; unset: `spec_of`, or the model's newest before it."""
    spec_of: str | None = None
    """A release whose frozen spec is taken in place of a file."""
    unless_unchanged: bool = False
    """Make no release if data and code are those that the newest one learned from."""


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"yaml", "git"},
    code_version="2",
    # A release that has nothing new to learn yields none; the rest of the run is skipped.
    output_required=False,
)
def model_spec(
    context: dg.AssetExecutionContext, config: ModelSpecConfig, platform: dg.ResourceParam[Platform]
) -> Iterator[dg.MaterializeResult[ArtifactHandle]]:
    """The model's spec, frozen as it stands at its commit. It never changes within a release."""
    release = Release.parse(context.partition_key)
    with explained():
        result = platform.columns.published(release.key, "model_spec")
        if result is None:
            result = _freeze(context, config, platform, release)
        else:
            # Its commit or file may be gone by now, or be another.
            context.log.info(
                "this release keeps the spec that it froze before. For the spec as it is now: "
                f"`llmops release {release.model}`"
            )
        if result is None:
            return
        platform.columns.enlist(release.model, release.key)
        yield materialized(platform, result)


@dg.asset(partitions_def=RELEASES, group_name=GROUP, owners=OWNERS, kinds={"parquet"})
@explained()
def training_data(
    context: dg.AssetExecutionContext,
    model_spec: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """Rows to learn from: Parquet with columns prompt, completion and slice, and its schema."""
    return _data(context, platform, model_spec, "training")


@dg.asset(partitions_def=RELEASES, group_name=GROUP, owners=OWNERS, kinds={"parquet"})
@explained()
def evaluation_data(
    context: dg.AssetExecutionContext,
    model_spec: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """Rows held out from training, in the same form; every accuracy is measured on them."""
    return _data(context, platform, model_spec, "evaluation")


@dg.asset(partitions_def=RELEASES, group_name=GROUP, owners=OWNERS, kinds={"json"}, pool=HEAVY_POOL)
@explained()
def data_report(
    context: dg.AssetExecutionContext,
    training_data: ArtifactHandle,
    model_spec: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """What the training data are: declared licence and provenance, personal data found."""
    from llmops_assets.compliance.data_report import write_data_report

    release = context.partition_key
    data = frozen_spec(model_spec).data

    def report(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "data_report", workshop, context.log.info)
        found = write_data_report(
            training_data, data.license, data.provenance, workshop.output, tools
        )
        return {
            "rows": found.rows,
            "license": found.license,
            "provenance": found.provenance,
            "personal_data": found.personal_data.counts,
        }

    action = Action(
        asset="data_report",
        media_type="application/vnd.llmops.data-report.v1",
        inputs={"training_data": training_data.digest},
        parameters={"license": data.license, "provenance": data.provenance},
        versions={
            "compliance": source_version(Path(compliance.__path__[0])),
            **versions_of("presidio-analyzer"),
        },
    )
    return materialized(platform, produce(context, platform, action, report))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"pytorch", "huggingface"},
    # Nothing is learned from data that may not be used.
    deps=["data_report"],
    pool=HEAVY_POOL,
)
@explained()
def checkpoint(
    context: dg.AssetExecutionContext,
    model_spec: ArtifactHandle,
    training_data: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The weights: a Hugging Face directory with safetensors only, trained or imported."""
    release = context.partition_key
    spec = frozen_spec(model_spec)
    trained = isinstance(spec.weights, TrainedWeights | CommandWeights)
    if trained:
        # Launched alone, no blocking check is in the way of training on such data.
        platform.require(release, [LEAKAGE, DATA_COMPLIANCE], platform.column(release))
    # Once published, the source may change or go: the release has its own copy.
    result = platform.columns.published(release, "checkpoint")
    result = result or taken_over(platform, release, "checkpoint")
    if result is None:
        step = _checkpoint_step(context, platform, spec, training_data)
        result = produce(context, platform, step.action, step.make)
        if step.fetched is not None:
            shutil.rmtree(step.fetched, ignore_errors=True)
    extra: dict[str, Any] = {}
    history = weights.training_history(ArtifactHandle(result, platform.store).path)
    if trained and history is not None:
        from llmops_assets.develop.history import loss_curve

        page = platform.registry.log_training(
            spec.name, release, canonical(spec.weights), [LossPoint(*point) for point in history]
        )
        extra = {
            "loss": dg.MetadataValue.md(loss_curve(history)),
            "mlflow": dg.MetadataValue.url(page),
        }
    return materialized(platform, result, extra)


def _checkpoint_step(
    context: dg.AssetExecutionContext,
    platform: Platform,
    spec: ModelSpec,
    training_data: ArtifactHandle,
) -> weights.Step:
    release = context.partition_key
    repository = platform.repository(release)

    def tools(workshop: Workshop) -> ToolRunner:
        return platform.tools(release, "checkpoint", workshop, context.log.info)

    match spec.weights:
        case TrainedWeights():
            threads = platform.settings.threads
            return weights.trained(spec, training_data, repository, tools, threads)
        case CommandWeights() as source:
            return weights.trained_by_command(spec, source, training_data, repository, tools)
        case ImportedWeights() as source:
            return weights.from_path(spec, source, platform.settings, repository)
        case MLflowWeights() as source:
            folder = platform.settings.work / f"fetched-{release}"
            return weights.from_mlflow(spec, source, platform.mlflow_url, folder, tools)
        case HuggingFaceWeights() as source:
            return weights.from_huggingface(spec, source, tools)


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"pytorch", "parquet"},
    pool=HEAVY_POOL,
    freshness_policy=EVALUATION_FRESHNESS,
)
@explained()
def evaluation(
    context: dg.AssetExecutionContext,
    checkpoint: ArtifactHandle,
    evaluation_data: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The checkpoint's predictions and metrics on held-out data, overall and per slice."""
    release = context.partition_key
    spec = platform.spec(release)
    # The checkpoint is loaded here, perhaps in a run of its own that no check blocks.
    platform.require(release, [CHECKPOINT_SAFE], {"checkpoint": checkpoint})

    repository = platform.repository(release)

    def evaluate(of: Path, workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "evaluation", workshop, context.log.info)
        tasks = task_digests(spec.harness, repository)
        tools.run(
            "evaluation",
            module_command(
                "llmops_assets.develop.evaluate",
                "--checkpoint", of,
                "--evaluation-data", evaluation_data.path,
                "--max-tokens", str(spec.constraints.max_output_tokens),
                "--output", workshop.output,
                "--threads", str(platform.settings.threads),
                *tool_arguments(spec.harness, repository, workshop.scratch),
            ),
        )  # fmt: skip
        hold_tasks_still(spec.harness, repository, tasks)
        return json.loads((workshop.output / "evaluation.json").read_text(encoding="utf-8"))

    # Once published, the files of its tasks may change or go.
    result = platform.columns.published(release, "evaluation")
    if result is None:
        action = evaluation_action(spec, repository, checkpoint.digest, evaluation_data.digest)
        result = produce(context, platform, action, partial(evaluate, checkpoint.path))
    baseline = serving_baseline(platform.routes, platform.columns, spec.name)
    if baseline is not None:
        # On the same data, so that the regression gate compares row by row.
        same = evaluation_action(spec, repository, baseline.checkpoint, evaluation_data.digest)
        _, directory = platform.store.open(baseline.checkpoint)
        platform.columns.perform(release, same, partial(evaluate, directory))
    page = platform.registry.log_evaluation(
        spec.name,
        release,
        {
            name: float(value)
            for name in ("loss", "perplexity", "exact_match")
            if (value := result.facts[name]) is not None
        },
    )
    return materialized(platform, result, {"mlflow": dg.MetadataValue.url(page)})


@dg.asset(partitions_def=RELEASES, group_name=GROUP, owners=OWNERS, kinds={"mlflow"})
@explained()
def registered_model(
    context: dg.AssetExecutionContext,
    checkpoint: ArtifactHandle,
    evaluation: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The release's version in MLflow, with digests and commit as tags. One per release."""
    from llmops_assets.develop.registration import register

    release = context.partition_key
    column = platform.column(release)
    platform.require(release, DEVELOPED, column)
    result, page = register(platform.columns, platform.registry, release, column)
    return materialized(platform, result, {"mlflow": dg.MetadataValue.url(page)})


def _freeze(
    context: dg.AssetExecutionContext,
    config: ModelSpecConfig,
    platform: Platform,
    release: Release,
) -> Result | None:
    """Freezes the release's spec; None, and says so, if there is nothing new to learn."""
    spec, source = spec_to_freeze(platform, release, config.commit, config.spec_of)
    check_floors(spec, platform.policy.floors)
    if config.unless_unchanged:
        newest = unchanged_since(platform, spec, source)
        if newest is not None:
            reason = f"data and code are those that {newest} learned from"
            context.log.info(f"{reason}; no release is made")
            context.instance.add_run_tags(context.run.run_id, {SKIPPED_TAG: reason})
            # Nobody finds anything below this key, and a schedule may make one an hour.
            context.instance.delete_dynamic_partition(str(RELEASES.name), release.key)
            return None
    earlier = [key for key in platform.columns.releases(release.model) if key != release.key]
    parent = config.derived_from or config.spec_of or (earlier[-1] if earlier else None)

    def freeze(workshop: Workshop) -> Mapping[str, Any]:
        workshop.output.mkdir(parents=True)
        content = json.dumps(canonical(spec), indent=2, ensure_ascii=False)
        (workshop.output / SPEC_FILE).write_text(content + "\n", encoding="utf-8")
        (workshop.output / SOURCE_FILE).write_text(source.model_dump_json(indent=2) + "\n")
        return {
            "use_case": spec.use_case,
            "owner": spec.owner,
            "source": source.model_dump(mode="json"),
            "derived_from": parent or "nothing: the first release of this model",
            "requested_by": context.run.tags.get(REQUESTED_BY_TAG, getpass.getuser()),
        }

    action = Action(
        asset="model_spec",
        media_type="application/vnd.llmops.spec.v1",
        # The key is part of the action: who asked for a release is the release's own.
        parameters={
            "release": release.key,
            "spec": canonical(spec),
            "source": source.model_dump(),
        },
    )
    return produce(context, platform, action, freeze)


class PushConfig(dg.Config):
    """Which push to look at."""

    commit: str | None = None
    """The commit that was pushed; unset: the newest that was fetched."""
    previous: str | None = None
    """The commit that the branch was at before; unset: every spec counts as new."""


# In a pool of its own: pushes are shown in their order.
@dg.asset(group_name=GROUP, owners=OWNERS, kinds={"yaml", "git"}, pool="pushed_specs")
@explained()
def pushed_specs(config: PushConfig, platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    """The specs on the branch after a push: what became of each, and what it asked for.

    A deleted or renamed one is a proposal to retire what serves; nothing is deleted by it.
    """
    push = pushes.pushed(platform.settings, config.commit, config.previous)
    rows = [
        dg.TableRecord(
            {
                "file": change.file,
                "model": change.model,
                "what": change.what.value,
                "release": str(pushes.release_of(change, push) or ""),
                "detail": change.detail,
                "proposal": pushes.proposal(platform, change),
            }
        )
        for change in pushes.changes(platform, push)
    ]
    return dg.MaterializeResult(
        data_version=dg.DataVersion(push.commit),
        metadata={
            "commit": push.commit,
            "author": branch.author(platform.settings, push.commit),
            "compared_with": push.old or (
                "the newest releases" if push.since_releases else "nothing"
            ),
            "changes": dg.MetadataValue.table(rows)
            if rows
            else dg.MetadataValue.text("no spec changed"),
        },
    )  # fmt: skip


def _data(
    context: dg.AssetExecutionContext,
    platform: Platform,
    model_spec: ArtifactHandle,
    split: Split,
) -> dg.MaterializeResult[ArtifactHandle]:
    data = frozen_spec(model_spec).data
    asset = f"{split}_data"
    published = platform.columns.published(context.partition_key, asset)
    published = published or taken_over(platform, context.partition_key, asset)
    if published is not None:
        # The source may be gone by now; the release has its own copy.
        return materialized(platform, published)
    repository = platform.repository(context.partition_key)
    settings = canonical(data)
    file: Path | None = None
    if isinstance(data, DataFiles):
        file = find_source(platform.settings, getattr(data, split), repository)
        settings[split] = str(file)
    action = data_action(data, split, file)

    def build(workshop: Workshop) -> Mapping[str, Any]:
        platform.tools(context.partition_key, asset, workshop, context.log.info).run(
            "building data",
            module_command(
                "llmops_assets.develop.data",
                "--data", json.dumps(settings),
                "--split", split,
                "--output", workshop.output,
                "--root", repository,
            ),
        )  # fmt: skip
        if file is not None:
            hold_still(file, action.parameters["file"])
        return json.loads((workshop.output / "schema.json").read_text(encoding="utf-8"))

    return materialized(platform, produce(context, platform, action, build))
