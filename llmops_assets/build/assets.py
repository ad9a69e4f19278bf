"""Build: from a checkpoint to a package that Triton can serve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llmops_assets import compliance
from llmops_assets.build.packaging import PACKAGE_MEDIA_TYPE, tree_of
from llmops_assets.develop.assets import HEAVY_POOL
from llmops_assets.develop.harness_tasks import hold_tasks_still, task_digests
from llmops_assets.evidence.gates import FITS_TARGET, REGISTERED
from llmops_assets.evidence.package_signature import sign_once
from llmops_assets.explained import explained
from llmops_assets.partitions import RELEASES
from llmops_assets.platform import Platform, frozen_spec
from llmops_assets.reporting import materialized, produce
from llmops_assets.serving.package_description import read_package
from llmops_assets.spec import canonical
from llmops_assets.storage.artifacts import ArtifactHandle, digests
from llmops_assets.storage.columns import Action, Workshop
from llmops_assets.storage.store import canonical_json, digest_of
from llmops_assets.toolchains import toolchain_for
from llmops_assets.versions import source_version, versions_of

GROUP = "build"
OWNERS = ["team:ml-engineering"]


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"onnx", "tensorrt"},
    # Building starts once the release is registered, as the workflow has it.
    deps=["registered_model"],
    pool=HEAVY_POOL,
)
@explained()
def converted_weights(
    context: dg.AssetExecutionContext,
    checkpoint: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The weights in the toolchain's own checkpoint format."""
    release = context.partition_key
    platform.require(release, REGISTERED, platform.column(release))
    engine_spec = platform.spec(release).engine
    toolchain = toolchain_for(engine_spec, platform.settings)

    def convert(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "converted_weights", workshop, context.log.info)
        return toolchain.convert(checkpoint.path, workshop.output, engine_spec, tools)

    action = Action(
        asset="converted_weights",
        media_type=f"application/vnd.llmops.weights.{toolchain.name}.v1",
        inputs={"checkpoint": checkpoint.digest},
        parameters=toolchain.conversion_parameters(engine_spec),
        versions=toolchain.versions("converted_weights"),
    )
    return materialized(platform, produce(context, platform, action, convert))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"onnx", "tensorrt"},
    pool=HEAVY_POOL,
)
@explained()
def engine(
    context: dg.AssetExecutionContext,
    converted_weights: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """The engine for its target, with a sidecar: architecture, tool versions, flags."""
    release = context.partition_key
    engine_spec = platform.spec(release).engine
    toolchain = toolchain_for(engine_spec, platform.settings)

    def build(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "engine", workshop, context.log.info)
        # With what the weights were made from, as the engine's sidecar travels alone.
        sources = {
            **converted_weights.result.inputs,
            "converted_weights": converted_weights.digest,
        }
        return toolchain.build(converted_weights.path, workshop.output, engine_spec, sources, tools)

    action = Action(
        asset="engine",
        media_type=f"application/vnd.llmops.engine.{toolchain.name}.v1",
        inputs={"converted_weights": converted_weights.digest},
        parameters=toolchain.build_parameters(engine_spec),
        versions=toolchain.versions("engine"),
    )
    result = produce(context, platform, action, build)
    size = platform.store.describe(result.artifact).size
    return materialized(
        platform,
        result,
        {
            "engine_bytes": size,
            "compression_ratio": converted_weights.artifact.size / size,
            "build_seconds": (result.finished - result.started).total_seconds(),
        },
    )


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"onnx", "tensorrt", "parquet"},
    pool=HEAVY_POOL,
)
@explained()
def engine_validation(
    context: dg.AssetExecutionContext,
    engine: ArtifactHandle,
    checkpoint: ArtifactHandle,
    evaluation_data: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """Local inference beside the checkpoint: agreement, accuracy, latency, throughput."""
    release = context.partition_key
    spec = platform.spec(release)
    toolchain = toolchain_for(spec.engine, platform.settings)
    platform.require(release, [FITS_TARGET], {"engine": engine})
    if (published := platform.columns.published(release, "engine_validation")) is not None:
        # The files of its tasks may have changed or gone by now.
        return materialized(platform, published)
    repository = platform.repository(release)
    tasks = task_digests(spec.harness, repository)

    def validate(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "engine_validation", workshop, context.log.info)
        facts = toolchain.validate(
            checkpoint.path,
            engine.path,
            evaluation_data.path,
            workshop.output,
            spec,
            repository,
            tools,
        )
        hold_tasks_still(spec.harness, repository, tasks)
        return facts

    action = Action(
        asset="engine_validation",
        media_type="application/vnd.llmops.validation.v1",
        inputs={
            "engine": engine.digest,
            "checkpoint": checkpoint.digest,
            "evaluation_data": evaluation_data.digest,
        },
        parameters={
            "constraints": canonical(spec.constraints),
            "threads": spec.serving.threads,
            "harness": tasks,
            **toolchain.validation_parameters(spec),
        },
        versions=toolchain.versions("engine_validation"),
    )
    return materialized(platform, produce(context, platform, action, validate))


@dg.asset(
    partitions_def=RELEASES,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"triton", "onnx", "tensorrt"},
    # Not an input: the package is the same bytes however well they were validated.
    deps=["engine_validation"],
    pool=HEAVY_POOL,
)
@explained()
def packaged_model(
    context: dg.AssetExecutionContext,
    engine: ArtifactHandle,
    checkpoint: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """A signed Triton model repository: engine, config and tokenizer, no version or release."""
    spec = platform.spec(context.partition_key)
    toolchain = toolchain_for(spec.engine, platform.settings)

    def package(workshop: Workshop) -> Mapping[str, Any]:
        return toolchain.package(engine.path, checkpoint.path, workshop.output, spec)

    action = Action(
        asset="packaged_model",
        media_type=PACKAGE_MEDIA_TYPE,
        inputs={"engine": engine.digest, "checkpoint": checkpoint.digest},
        parameters={
            "model": spec.name,
            "serving": canonical(spec.serving),
            "constraints": canonical(spec.constraints),
            **toolchain.package_parameters(spec.engine),
        },
        versions=toolchain.versions("packaged_model"),
    )
    result = produce(context, platform, action, package)
    # Also of a package that another release made: with new keys it needs a new signature.
    signature = sign_once(platform.store, result.artifact, platform.settings)
    tree = tree_of(platform.store.describe(result.artifact))
    return materialized(
        platform,
        result,
        {"tree": dg.MetadataValue.md(f"```\n{tree}\n```"), "signature": signature},
    )


@dg.asset(partitions_def=RELEASES, group_name=GROUP, owners=OWNERS, kinds={"json"}, pool=HEAVY_POOL)
@explained()
def compliance_report(
    context: dg.AssetExecutionContext,
    packaged_model: ArtifactHandle,
    checkpoint: ArtifactHandle,
    training_data: ArtifactHandle,
    evaluation_data: ArtifactHandle,
    evaluation: ArtifactHandle,
    model_spec: ArtifactHandle,
    platform: dg.ResourceParam[Platform],
) -> dg.MaterializeResult[ArtifactHandle]:
    """What the package is: formats, secrets, licences, model card, and a CycloneDX ML-BOM."""
    from llmops_assets.compliance.package_report import declare, scan_package, serving_environment

    release = context.partition_key
    spec = frozen_spec(model_spec)
    inputs = {
        "packaged_model": packaged_model,
        "checkpoint": checkpoint,
        "training_data": training_data,
        "evaluation_data": evaluation_data,
        "evaluation": evaluation,
    }
    toolchain = toolchain_for(spec.engine, platform.settings)
    runtime, dependencies = serving_environment(
        toolchain.serving_distributions, read_package(packaged_model.path).image
    )

    def report(workshop: Workshop) -> Mapping[str, Any]:
        tools = platform.tools(release, "compliance_report", workshop, context.log.info)
        declaration = declare(spec, inputs, runtime, dependencies)
        found = scan_package(
            declaration, packaged_model.path, checkpoint.path, workshop.output, tools
        )
        return {
            "license": found.card.license,
            "model_card": found.card_from,
            "data_license": found.data_license,
            "dependencies": found.dependencies,
        }

    action = Action(
        asset="compliance_report",
        media_type="application/vnd.llmops.compliance-report.v1",
        inputs=digests(inputs),
        parameters={
            "model": spec.name,
            "card": canonical(spec.card),
            "license": spec.data.license,
            "provenance": spec.data.provenance,
        },
        versions={
            "compliance": source_version(Path(compliance.__path__[0])),
            "environment": digest_of(
                canonical_json([package.model_dump(mode="json") for package in dependencies])
            ),
            **versions_of("cyclonedx-python-lib", "detect-secrets", "fickling"),
            runtime.name: runtime.version,
            **({"image": runtime.digest} if runtime.kind == "container" and runtime.digest else {}),
        },
    )
    return materialized(platform, produce(context, platform, action, report))
