"""Develop: from a model spec to a version in the model registry."""

import getpass
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from llmops_assets import compliance
from llmops_assets.develop import specs
from llmops_assets.develop.baseline import evaluation_action, serving_baseline
from llmops_assets.develop.harness_tasks import (
    hold_tasks_still,
    task_digests,
    tool_arguments,
)
from llmops_assets.develop.registry import LossPoint
from llmops_assets.develop.sources import find_source, hold_still
from llmops_assets.evidence.gates import CHECKPOINT_SAFE, DATA_COMPLIANCE, DEVELOPED, LEAKAGE
from llmops_assets.explained import explained
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import SPEC_FILE, Platform, frozen_spec
from llmops_assets.policy import check_floors
from llmops_assets.release import Release
from llmops_assets.reporting import materialized, produce
from llmops_assets.spec import DataFiles, ImportedWeights, canonical
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Action, Workshop
from llmops_assets.storage.store import content_digest
from llmops_assets.tools import module_command
from llmops_assets.versions import source_version, versions_of

GROUP = "develop"
OWNERS = ["team:data-science"]
HEAVY_POOL = "heavy_compute"
"""Pool of the steps that use all cores; one at a time on one machine."""

DATA_MEDIA_TYPE = "application/vnd.llmops.data.v1"
CHECKPOINT_MEDIA_TYPE = "application/vnd.llmops.checkpoint.huggingface.v1"


class ModelSpecConfig(dg.Config):
    """Which spec to freeze."""

    commit: str | None = None
    """A git revision of the repository of specs; unset: the file as it is now."""
    derived_from: str | None = None
    """The release that this one changes; unset: the model's newest before it."""


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"yaml", "git"},
    code_version="1",
)
@explained()
def model_spec(
    context: dg.AssetExecutionContext, config: ModelSpecConfig, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult[ArtifactHandle]:
    """The model's spec, frozen as it stands at its commit. It never changes within a release."""
    release = Release.parse(context.partition_key)
    # A release that is named after a commit holds what stands there.
    commit = config.commit or release.commit
    spec, source = specs.load(platform.settings.models, release.model, commit)
    check_floors(spec, platform.policy.floors)
    earlier = [key for key in platform.columns.releases(release.model) if key != release.key]
    parent = config.derived_from or (earlier[-1] if earlier else None)

    def freeze(workshop: Workshop) -> Mapping[str, Any]:
        workshop.output.mkdir(parents=True)
        content = json.dumps(canonical(spec), indent=2, ensure_ascii=False)
        (workshop.output / SPEC_FILE).write_text(content + "\n", encoding="utf-8")
        (workshop.output / "source.json").write_text(source.model_dump_json(indent=2) + "\n")
        return {
            "use_case": spec.use_case,
            "owner": spec.owner,
            "source": source.model_dump(mode="json"),
            "derived_from": parent or "nothing: the first release of this model",
            "requested_by": context.run.tags.get("llmops/requested_by", getpass.getuser()),
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
    result = produce(context, platform, action, freeze)
    if result.action != action.digest:
        context.log.warning(
            "the spec's file has changed since this release froze it; the release keeps what "
            f"it froze. For the new one: `llmops release {release.model}`"
        )
    platform.columns.enlist(release.model, release.key)
    return materialized(platform, result)


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
    from llmops_assets.develop.checkpoints import import_checkpoint
    from llmops_assets.develop.history import loss_curve, read_history

    release = context.partition_key
    spec = frozen_spec(model_spec)
    if isinstance(spec.weights, ImportedWeights):
        if (published := platform.columns.published(release, "checkpoint")) is not None:
            # The source may be gone by now; the release has its own copy.
            return materialized(platform, published)
        source = find_source(platform.settings, spec.weights.path)
        content = content_digest(source)

        def bring_in(workshop: Workshop) -> Mapping[str, Any]:
            import_checkpoint(source, workshop.output)
            hold_still(workshop.output, content)
            return {"imported_from": str(source)}

        action = Action(
            asset="checkpoint",
            media_type=CHECKPOINT_MEDIA_TYPE,
            parameters={"content": content},
            versions={"import": "1"},
        )
        return materialized(platform, produce(context, platform, action, bring_in))

    # Launched alone, no blocking check is in the way of training on such data.
    platform.require(release, [LEAKAGE, DATA_COMPLIANCE], platform.column(release))
    max_tokens = spec.constraints.max_input_tokens + spec.constraints.max_output_tokens

    def train(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "checkpoint", workshop, context.log.info)
        run = tools.run(
            "training",
            module_command(
                "llmops_assets.develop.train",
                "--training-data", training_data.path,
                "--parameters", json.dumps(canonical(spec.weights)),
                "--max-tokens", str(max_tokens),
                "--output", workshop.output,
                "--work", workshop.scratch / "resume",
                "--threads", str(platform.settings.threads),
            ),
        )  # fmt: skip
        return {"training_seconds": run.seconds, "final_loss": read_history(workshop.output)[-1][1]}

    action = Action(
        asset="checkpoint",
        media_type=CHECKPOINT_MEDIA_TYPE,
        inputs={"training_data": training_data.digest},
        parameters={"weights": canonical(spec.weights), "max_tokens": max_tokens},
        versions={"train": "1", **versions_of("torch", "transformers", "tokenizers")},
    )
    result = produce(context, platform, action, train)
    history = read_history(ArtifactHandle(result, platform.store).path)
    page = platform.registry.log_training(
        spec.name, release, canonical(spec.weights), [LossPoint(*point) for point in history]
    )
    return materialized(
        platform,
        result,
        {"loss": dg.MetadataValue.md(loss_curve(history)), "mlflow": dg.MetadataValue.url(page)},
    )


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"pytorch", "parquet"},
    pool=HEAVY_POOL,
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


def _data(
    context: dg.AssetExecutionContext,
    platform: Platform,
    model_spec: ArtifactHandle,
    split: str,
) -> dg.MaterializeResult[ArtifactHandle]:
    data = frozen_spec(model_spec).data
    asset = f"{split}_data"
    if (published := platform.columns.published(context.partition_key, asset)) is not None:
        # The source may be gone by now; the release has its own copy.
        return materialized(platform, published)
    file: Path | None = None
    if isinstance(data, DataFiles):
        file = find_source(platform.settings, getattr(data, split))
        parameters: dict[str, Any] = {"file": content_digest(file)}
    else:
        parameters = {"data": canonical(data)}

    def build(workshop: Workshop) -> Mapping[str, Any]:
        platform.tools(context.partition_key, asset, workshop, context.log.info).run(
            "building data",
            module_command(
                "llmops_assets.develop.data",
                "--data", json.dumps(canonical(data)),
                "--split", split,
                "--output", workshop.output,
                "--root", platform.settings.models.parent,
            ),
        )  # fmt: skip
        if file is not None:
            hold_still(file, parameters["file"])
        return json.loads((workshop.output / "schema.json").read_text(encoding="utf-8"))

    action = Action(
        asset=asset,
        media_type=DATA_MEDIA_TYPE,
        parameters={**parameters, "split": split},
        versions={"data": "1", **versions_of("babel", "pyarrow")},
    )
    return materialized(platform, produce(context, platform, action, build))
