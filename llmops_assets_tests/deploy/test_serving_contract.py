"""A package is asked, and its server chosen, as the package says; here one of TensorRT-LLM."""

from __future__ import annotations

import json
from collections.abc import Iterator

import dagster as dg
import pandas as pd
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.build.packaging import PACKAGE_MEDIA_TYPE
from llmops_assets.definitions import definitions_for
from llmops_assets.deploy.delivery import LoadedPackage, load
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.errors import SlotError
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.local.slots import SupervisedSlots
from llmops_assets.partitions import RELEASES
from llmops_assets.serving.package_description import PackageDescription
from llmops_assets.serving.slots import Environment
from llmops_assets.toolchains.base import ServingImage
from llmops_assets.toolchains.tensorrt_llm.packaging import ENSEMBLE_CONTRACT

from ..fakes import ensemble_pieces
from ..release_rig import MODEL, SPEC, Rig, deploy
from ..toolchains.tensorrt_llm.built_engine import engine_config

pytestmark = pytest.mark.timeout(120)
RELEASE = "parrot.v1"
IMAGE = ServingImage("nvcr.io/nvidia/tritonserver", "26.07-trtllm-python-py3", "sha256:" + "a" * 64)
DESCRIBED = {
    "image": {"name": IMAGE.name, "tag": IMAGE.tag, "digest": IMAGE.digest},
    "architecture": "sm_90",
    "world_size": 1,
    "asked": ENSEMBLE_CONTRACT.model_dump(mode="json"),
}
SECTION = (
    "{toolchain: tensorrt_llm, gpu: h100-sxm, family: llama, "
    "limits: {max_batch_size: 8, max_input_len: 128, max_seq_len: 256}}"
)
TEXT = SPEC.replace("{toolchain: onnxruntime_genai}", SECTION).replace(
    "    staging: [{measure: end_to_end, at_most: 5}]\n",
    "    staging: [{measure: end_to_end, percentile: p50, at_most: 5}]\n    requests: 6\n",
)


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    """A Dagster of the test's own, in memory."""
    with DagsterInstance.ephemeral() as instance:
        yield instance


def cache(blocks: int) -> str:
    """What Triton says of an engine's KV cache."""
    name = "nv_trt_llm_kv_cache_block_metrics"
    return "".join(
        f'{name}{{kv_cache_block_type="{kind}",model="tensorrt_llm"}} {value}\n'
        for kind, value in {"max": blocks, "tokens_per": 32}.items()
    )


@pytest.fixture
def built(rig: Rig) -> Rig:
    """A release of TensorRT-LLM at the end of Build."""
    rows = pd.DataFrame({"prompt": ["hello"], "completion": ["world"], "slice": ["all"]})
    rig.publish(RELEASE, "evaluation_data", {DATA_FILE: rows.to_parquet(index=False)})
    config = engine_config(max_seq_len=256)
    rig.publish(
        RELEASE,
        "packaged_model",
        {"package.json": json.dumps(DESCRIBED), "engine/config.json": json.dumps(config)},
        PACKAGE_MEDIA_TYPE,
    )
    rig.build(RELEASE, 1, TEXT)
    slots = rig.platform.slots
    slots.images.add(str(IMAGE))
    slots.pieces = ensemble_pieces
    slots.metrics = cache(8)
    return rig


def run_job(rig: Rig, instance: DagsterInstance, name: str) -> ExecuteInProcessResult:
    config = {"approver": "bob", "decision": "approve", "reason": "it answers well"}
    return definitions_for(rig.platform).resolve_job_def(name).execute_in_process(
        instance=instance, partition_key=RELEASE, raise_on_error=False,
        run_config={"ops": {"production_approval": {"config": config}}},
    )  # fmt: skip


def stage(rig: Rig, instance: DagsterInstance) -> ExecuteInProcessResult:
    instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
    job = definitions_for(rig.platform).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, partition_key=RELEASE, raise_on_error=False,
        asset_selection=[dg.AssetKey("staging_deployment")],
    )  # fmt: skip


def document(rig: Rig) -> LoadedPackage:
    handle = rig.platform.column(RELEASE)["staging_deployment"]
    return LoadedPackage.model_validate_json(handle.document)


def test_release_of_tensorrt_llm_passes_staging(built: Rig, instance: DagsterInstance) -> None:
    """Its answers have no finish reason and count by piece: none of them was ever whole."""
    assert stage(built, instance).success
    latency = document(built).latency
    assert latency is not None
    assert {(level.requests, level.errors) for level in latency.levels} == {(6, 0)}
    (state,) = built.platform.slots.slots(Environment.STAGING, MODEL)
    bodies = [body for path, body in built.platform.slots.requests(state.slot) if body]
    assert all(body["return_num_output_tokens"] is True for body in bodies)


def test_gateway_is_asked_by_the_same_contract(built: Rig, instance: DagsterInstance) -> None:
    """The canary would wait for an answer of the model's own length, under another name."""
    assert stage(built, instance).success
    assert run_job(built, instance, "promote").success
    asked = built.platform.gateway.asked
    assert asked
    assert all(body["return_num_output_tokens"] is True for body in asked)


def test_server_with_too_small_a_cache_fails_the_smoke(
    built: Rig, instance: DagsterInstance
) -> None:
    """It answers the short known questions all the same, and would fail the first long one."""
    built.platform.slots.metrics = cache(7)
    object.__setattr__(
        built.platform,
        "settings",
        built.platform.settings.model_copy(update={"http_timeout_seconds": 1}),
    )
    assert not stage(built, instance).success
    found = verdicts(built.platform.evidence, RELEASE)["staging_smoke"]
    assert not found.passed
    assert "KV cache is too small" in found.reason
    assert document(built).latency is None


def test_package_that_no_slot_can_serve_touches_nothing(
    built: Rig, instance: DagsterInstance
) -> None:
    """Up to 70 GB would be copied, and the warm release lost, before its server failed."""
    built.platform.slots.images.clear()
    result = stage(built, instance)
    assert not result.success
    assert built.platform.slots.calls == []


def test_local_slots_refuse_what_needs_an_image(rig: Rig) -> None:
    """The Triton of a wheel has no TensorRT-LLM; the reader is told where it can be served."""
    slots = SupervisedSlots(rig.platform.settings, rig.platform.store)
    slots.check_serves(PackageDescription())
    with pytest.raises(SlotError, match=r"cannot serve .*tritonserver:26\.07.*on a cluster"):
        slots.check_serves(PackageDescription.model_validate(DESCRIBED))


def test_refused_package_leaves_the_warm_release_on_the_route(rig: Rig) -> None:
    """Its place is claimed only for what can be served there."""
    for version in (1, 2):
        rig.build(f"parrot.v{version}", version)
        deploy(rig, version)
    before = rig.platform.routes.current(Environment.PRODUCTION, MODEL)
    deployment = rig.deployment("parrot.v1", 7)
    package = rig.platform.store.describe(deployment.package)
    described = PackageDescription.model_validate(DESCRIBED)
    with pytest.raises(SlotError, match="No slot has"):
        load(
            rig.platform.slots, rig.platform.routes, Environment.PRODUCTION, MODEL, package,
            described, deployment, "ada",
        )  # fmt: skip
    assert rig.platform.routes.current(Environment.PRODUCTION, MODEL) == before
