"""From a checkpoint to a package, through the real assets and gates, with doubles of the tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.definitions import definitions_for
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.registration import Registration
from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.evidence.gates import REGISTERED
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.partitions import RELEASES
from llmops_assets.settings import Settings
from llmops_assets.spec import parse_spec
from llmops_assets.storage.columns import Action
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.tensorrt_llm.sidecar import read_sidecar
from llmops_assets_tests.release_rig import MODEL, PASSED, SPEC, PlatformOnDoubles, Rig

from .conftest import write_hugging_face
from .doubles.installation import Installation
from .image_doubles import enter_image

RELEASE = "parrot.v1"
NEXT = "parrot.v2"
BUILD = ("converted_weights", "engine", "engine_validation", "packaged_model")
ROWS = 100
LIMITS = "{max_batch_size: 8, max_input_len: 128, max_seq_len: 256}"
BACKENDS = {"engine": "family: llama", "llmapi": "backend: llmapi"}
CALIBRATED = "quantization: fp8, calibration: {data: rows}"


def spec_text(backend: str, tensor: int = 1, more: str = "dtype: auto") -> str:
    """The rig's spec with an engine section for H100."""
    section = (
        f"{{toolchain: tensorrt_llm, gpu: h100-sxm, {BACKENDS[backend]}, limits: {LIMITS}, "
        f"parallelism: {{tensor: {tensor}}}, {more}}}"
    )
    return SPEC.replace("{toolchain: onnxruntime_genai}", section)


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Installation:
    return enter_image(monkeypatch, tmp_path / "image").installation


@pytest.fixture
def rig(tmp_path: Path, installation: Installation) -> Iterator[Rig]:
    rig = Rig(tmp_path / "rig")
    rig.platform = PlatformOnDoubles(
        Settings(
            state=rig.root / "state", models=rig.models, gpu_hour_price=Decimal("3600"),
            tool_timeout_seconds=30,
        )
    )  # fmt: skip
    yield rig
    rig.close()


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def register(rig: Rig, text: str, release: str = RELEASE) -> None:
    """A release that was developed and registered, with a checkpoint of doubles."""
    rig.freeze(release, text)
    model = write_hugging_face(rig.root / release)
    save_tokenizer(build_tokenizer([]), model, 512)
    files: dict[str, str | bytes] = {
        path.name: path.read_bytes() for path in model.iterdir() if path.is_file()
    }
    rig.publish(release, "checkpoint", files)
    for asset in ("training_data", "data_report"):
        rig.publish(release, asset, {"content": asset})
    rows = pd.DataFrame(
        {
            "prompt": [f"{year}" for year in range(ROWS)],
            "completion": ["yes"] * ROWS,
            "slice": ["even", "odd"] * (ROWS // 2),
        }
    )
    rig.publish(release, "evaluation_data", {DATA_FILE: rows.to_parquet(index=False)})
    rig.evaluate(release)
    rig.platform.columns.record(
        release,
        Action("registered_model", "application/vnd.llmops.registration.v1"),
        Registration(model=MODEL, version=1, tags={}),
        pd.Timestamp.now(tz="UTC").to_pydatetime(),
    )
    rig.judge(release, REGISTERED, PASSED)


def materialize(
    rig: Rig, instance: DagsterInstance, *assets: str, release: str = RELEASE
) -> ExecuteInProcessResult:
    instance.add_dynamic_partitions(str(RELEASES.name), [release])
    job = definitions_for(rig.platform).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance, partition_key=release, raise_on_error=False,
        asset_selection=[dg.AssetKey(asset) for asset in assets],
    )  # fmt: skip


def failures(result: ExecuteInProcessResult) -> dict[str, str]:
    """What the UI shows of the failed steps."""
    found: dict[str, str] = {}
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            failure = data.user_failure_data
            found[str(event.step_key)] = str(
                failure.description if failure is not None else data.error
            )
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("backend", ["engine", "llmapi"])
def test_release_is_built(backend: str, tensor: int, rig: Rig, instance: DagsterInstance) -> None:
    """Every asset and gate of Build, and what each published is what the next one took."""
    register(rig, spec_text(backend, tensor))
    result = materialize(rig, instance, *BUILD)
    assert failures(result) == {}
    column = rig.platform.column(RELEASE)
    sidecar = read_sidecar(column["engine"].path)
    assert sidecar.sources == {
        asset: column[asset].digest for asset in ("checkpoint", "converted_weights")
    }
    assert sidecar.target.architecture == "sm_90"
    ranks = sorted(path.name for path in column["engine"].path.glob("rank*.engine"))
    expected = [f"rank{rank}.engine" for rank in range(tensor)]
    assert ranks == (expected if backend == "engine" else [])
    package = column["packaged_model"].path
    described = json.loads((package / "package.json").read_text())
    assert (described["backend"], described["world_size"]) == (backend, tensor)
    assert (package / "repository" / MODEL / "version").is_dir()
    measured = LatencySummary.model_validate_json(
        (column["engine_validation"].path / "benchmark.json").read_bytes()
    )
    assert [level.requests for level in measured.levels] == [100]
    judged = verdicts(rig.platform.store, RELEASE)
    for gate in ("weights_complete", "fits_target", "parity", "package_integrity"):
        assert judged[gate].passed, gate


def test_serving_setting_costs_a_package_and_no_build(rig: Rig, instance: DagsterInstance) -> None:
    """It is in Triton's configuration, not in the engine: the engine is reused, and the
    package must not be.
    """
    register(rig, spec_text("engine"))
    assert failures(materialize(rig, instance, *BUILD)) == {}
    first = rig.platform.column(RELEASE)
    register(rig, spec_text("engine", more="kv_cache: {free_gpu_mem_fraction: 0.5}"), NEXT)
    assert failures(materialize(rig, instance, *BUILD, release=NEXT)) == {}
    following = rig.platform.column(NEXT)
    assert following["engine"].digest == first["engine"].digest
    assert following["packaged_model"].digest != first["packaged_model"].digest
    text = (
        following["packaged_model"].path / "repository" / "tensorrt_llm" / "config.pbtxt"
    ).read_text()
    assert 'string_value: "0.5"' in text


@pytest.mark.parametrize("backend", ["engine", "llmapi"])
def test_package_is_found_safe(backend: str, rig: Rig, instance: DagsterInstance) -> None:
    """Engines and the code of the image's templates are no danger to the gate on packages, and
    its bill of materials names the image that serves, not the Triton of this machine.
    """
    register(rig, spec_text(backend))
    assert failures(materialize(rig, instance, *BUILD)) == {}
    materialize(rig, instance, "compliance_report")
    report = rig.platform.column(RELEASE)["compliance_report"]
    (bill,) = (path for path in report.path.iterdir() if ".cdx" in path.name)
    components = json.loads(bill.read_text())["components"]
    (runtime,) = (part for part in components if part.get("bom-ref") == "runtime")
    assert runtime["name"] == "nvcr.io/nvidia/tritonserver"
    assert runtime["version"] == "26.07-trtllm-python-py3"
    safe = verdicts(rig.platform.store, RELEASE)["package_safe"]
    assert safe.passed, safe.reason


def test_build_says_what_it_took(rig: Rig, instance: DagsterInstance) -> None:
    """Seconds times GPUs times the settings' price, in the sidecar; paths stay out of it."""
    register(rig, spec_text("engine", 2))
    assert failures(materialize(rig, instance, *BUILD[:2])) == {}
    sidecar = read_sidecar(rig.platform.column(RELEASE)["engine"].path)
    assert sidecar.cost.amount == pytest.approx(Decimal(str(sidecar.cost.gpu_seconds)))
    assert "{converted}" in sidecar.commands[0]
    assert str(rig.root) not in sidecar.model_dump_json()
    caches = rig.platform.settings.timing_cache_folder
    assert [path.suffix for path in caches.iterdir()] == [".cache"]


@pytest.mark.parametrize(
    ("tool", "failure", "asset"),
    [
        ("convert_checkpoint.py", "only_config", "converted_weights"),
        ("convert_checkpoint.py", "missing_rank", "converted_weights"),
        ("trtllm-build", "missing_rank", "engine"),
        ("trtllm-build", "building_failed", "engine"),
        ("trtllm-build", "killed", "engine"),
        ("trtllm-bench", "other_backend", "engine_validation"),
    ],
)
def test_failed_tool_publishes_nothing(
    tool: str, failure: str, asset: str, rig: Rig, instance: DagsterInstance,
    installation: Installation,
) -> None:  # fmt: skip
    """Neither the asset nor anything after it: the column shows how far the release came."""
    register(rig, spec_text("engine", 2))
    installation.fail(tool, failure)
    result = materialize(rig, instance, *BUILD)
    assert set(failures(result)) == {asset}
    published = set(rig.platform.column(RELEASE))
    assert published.isdisjoint(BUILD[BUILD.index(asset) :])
    assert published >= set(BUILD[: BUILD.index(asset)])


def test_release_that_cannot_be_built_starts_no_tool(
    rig: Rig, instance: DagsterInstance, installation: Installation
) -> None:
    """Four ways on a machine with two GPUs: the tools would find out after minutes."""
    register(rig, spec_text("engine", 4))
    result = materialize(rig, instance, *BUILD)
    (problem,) = failures(result).values()
    assert "4, one per rank" in problem
    assert not rig.platform.tool_log(RELEASE, "converted_weights").exists()


def parameters(rig: Rig, text: str) -> Any:
    engine = parse_spec(text, "test").engine
    return toolchain_for(engine, rig.platform.settings).conversion_parameters(engine)


def test_other_calibration_data_are_another_action(rig: Rig) -> None:
    """Scales come from the rows, so a release on other rows at the same path shares nothing."""
    data = rig.root / "rows"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "one"}\n')
    text = spec_text("engine", more=CALIBRATED)
    first = parameters(rig, text)
    assert parameters(rig, text) == first
    (data / "train.jsonl").write_text('{"text": "two"}\n')
    assert parameters(rig, text) != first
