"""From a checkpoint to a package, through the real assets and gates, with doubles of the tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest
import yaml
from dagster import DagsterInstance, ExecuteInProcessResult

from llmops_assets.definitions import definitions_for
from llmops_assets.develop.data import DATA_FILE
from llmops_assets.develop.registration import Registration
from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer
from llmops_assets.errors import ToolchainError
from llmops_assets.evidence.gates import (
    ACCURACY,
    DATA_COMPLIANCE,
    FAIRNESS,
    LATENCY,
    REGISTERED,
    REGRESSION,
)
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.evidence.verdicts import verdicts
from llmops_assets.partitions import RELEASES
from llmops_assets.reports.lifecycle import lifecycle_table
from llmops_assets.settings import Settings
from llmops_assets.spec import parse_spec
from llmops_assets.storage.columns import Action
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.tensorrt_llm import toolchain
from llmops_assets.toolchains.tensorrt_llm.image import Image
from llmops_assets.toolchains.tensorrt_llm.sidecar import read_sidecar
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.release_rig import MODEL, PASSED, SPEC, PlatformOnDoubles, Rig

from .conftest import write_hugging_face
from .doubles.installation import Installation
from .image_doubles import Surroundings, enter_image
from .sidecars import SOURCES, TOOLKIT
from .specs import spec_text

RELEASE = "parrot.v1"
NEXT = "parrot.v2"
BY_HAND = "parrot.m20260101t000000"
BUILD = ("converted_weights", "engine", "engine_validation", "packaged_model")
ROWS = 100
CALIBRATED = "quantization: fp8, calibration: {data: rows}"


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Surroundings:
    return enter_image(monkeypatch, tmp_path / "image")


@pytest.fixture
def installation(surroundings: Surroundings) -> Installation:
    return surroundings.installation


@pytest.fixture
def rig(tmp_path: Path, installation: Installation) -> Iterator[Rig]:
    rig = Rig(tmp_path / "rig")
    rig.platform = PlatformOnDoubles(
        Settings(
            state=rig.root / "state", models=rig.models, gpu_hour_price=Decimal("3600"),
            tool_timeout_seconds=120, gpu_image_digest=TOOLKIT.image_digest,
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


DATES = (
    "data: {source: dates, locales: [en], training: {rows: 40, seed: 1}, "
    "evaluation: {rows: 110, seed: 2}}"
)
JUDGED_BY_THE_RIG = (DATA_COMPLIANCE, ACCURACY, FAIRNESS, REGRESSION, LATENCY)


@pytest.mark.parametrize(
    ("backend", "tensor", "evaluated"),
    [("engine", 1, True), ("engine", 2, False), ("llmapi", 1, False), ("llmapi", 2, False)],
)
def test_path_becomes_a_package(
    backend: str, tensor: int, evaluated: bool, rig: Rig, instance: DagsterInstance
) -> None:
    """From a directory that somebody has to the bill of materials of its package, through every
    asset and gate between them. Of one in four personal data are searched for and answers are
    evaluated, which takes a while.
    """
    # PyTorch comes with it.
    from llmops_assets_tests.tiny_llama import write_checkpoint

    write_checkpoint(rig.root / "checkpoint")
    text = spec_text(backend, tensor)
    text = text.replace(next(line for line in SPEC.splitlines() if line.startswith("data:")), DATES)
    if evaluated:
        # Weights are random, and so are answers.
        text = text.replace("{at_least: 0.9, every_slice: 0.8, regression: 0.05}", "{at_least: 0}")
        text = text.replace("fairness: {largest_gap: 0.1}", "fairness: null")
    rig.write_spec(text)
    sources = ["model_spec", "training_data", "evaluation_data", "checkpoint"]
    if evaluated:
        sources.append("data_report")
    assert failures(materialize(rig, instance, *sources, release=BY_HAND)) == {}
    if evaluated:
        assert failures(materialize(rig, instance, "evaluation", release=BY_HAND)) == {}
    else:
        rig.publish(BY_HAND, "data_report", {"content": "data_report"})
        rig.evaluate(BY_HAND)
        rig.judge(BY_HAND, JUDGED_BY_THE_RIG, PASSED)
    assert failures(materialize(rig, instance, "registered_model", *BUILD, release=BY_HAND)) == {}
    # Elsewhere and later, where the settings name the image of another day.
    settings = rig.platform.settings.model_copy(update={"gpu_image_digest": "sha256:" + "f" * 64})
    rig.platform = replace(rig.platform, settings=settings)
    materialize(rig, instance, "compliance_report", release=BY_HAND)
    column = rig.platform.column(BY_HAND)
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
    judged = verdicts(rig.platform.evidence, BY_HAND)
    for gate in ("weights_complete", "fits_target", "parity", "package_integrity", "package_safe"):
        assert judged[gate].passed, judged[gate].reason
    (bill,) = (path for path in column["compliance_report"].path.iterdir() if ".cdx" in path.name)
    components = json.loads(bill.read_text())["components"]
    (runtime,) = (part for part in components if part.get("bom-ref") == "runtime")
    assert runtime["name"] == "nvcr.io/nvidia/tritonserver"
    assert runtime["version"] == "26.07-trtllm-python-py3"
    assert sidecar.toolkit.image_digest.removeprefix("sha256:") in bill.read_text()
    assert "f" * 64 not in bill.read_text()


def test_package_that_is_there_is_found_without_a_gpu(
    rig: Rig, instance: DagsterInstance, surroundings: Surroundings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A release that only judges anew must not wait for a GPU to find out that it has all."""
    register(rig, spec_text("engine"))
    assert failures(materialize(rig, instance, *BUILD)) == {}

    def no_gpu(settings: Settings) -> Image:
        raise ToolchainError("there is no GPU here", cure="none")

    monkeypatch.setattr(toolchain, "image_here", no_gpu)
    assert failures(materialize(rig, instance, "packaged_model")) == {}


def test_mended_line_costs_the_steps_that_it_decides() -> None:
    """Else a comment in the packaging rebuilds every engine, for hours of a GPU."""
    folder = Path(toolchain.__file__).parent
    for step, modules in toolchain.SOURCES.items():
        assert all((folder / f"{module}.py").is_file() for module in modules), step
    assert set(toolchain.SOURCES) == set(BUILD)
    engine = set(toolchain.SOURCES["engine"])
    assert not engine & {"packaging", "templates", "validation", "benchmark", "toolchain"}


def test_lost_timing_cache_keeps_the_engine(
    rig: Rig, instance: DagsterInstance, installation: Installation
) -> None:
    """It is a whole engine that took hours; the next build is slower, and people are told."""
    register(rig, spec_text("engine"))
    installation.fail("trtllm-build", "no_timing_cache")
    assert failures(materialize(rig, instance, *BUILD[:2])) == {}
    facts = rig.platform.columns.get(RELEASE, "engine").facts
    assert any("wrote no timing cache" in warning for warning in facts["warnings"])


def test_measurements_are_facts(rig: Rig, instance: DagsterInstance) -> None:
    """What trtllm-bench measured was in a file that nobody read, and GPU seconds were lost."""
    register(rig, spec_text("engine", 2))
    assert failures(materialize(rig, instance, *BUILD[:3])) == {}
    facts = rig.platform.columns.get(RELEASE, "engine_validation").facts
    assert facts["throughput"]["levels"][0]["requests"] == 100
    assert facts["gpu_seconds"] > facts["seconds"] > 0
    assert facts["gpu_cost"] == pytest.approx(facts["gpu_seconds"])
    table = lifecycle_table(rig.platform.columns).set_index("metric")["value"]
    assert table["tokens_per_second_under_load"] > 0
    assert table["validation_gpu_time"] == facts["gpu_seconds"]
    assert table["engine_gpu_time"] > 0


@pytest.mark.parametrize("backend", ["engine", "llmapi"])
def test_what_is_validated_is_set_as_what_serves(backend: str, rig: Rig) -> None:
    """With the defaults of the LLM API and of trtllm-bench another cache and another scheduler
    are measured than Triton is given.
    """
    more = "kv_cache: {free_gpu_mem_fraction: 0.5, reuse: false}, scheduler: max_utilization"
    register(rig, spec_text(backend, more=more))
    column, spec = rig.platform.column(RELEASE), rig.platform.spec(RELEASE)
    section = spec.engine
    assert section.toolchain == "tensorrt_llm"
    tools = ToolRunner(work=rig.root / "work", log=rig.root / "log", timeout_seconds=60)
    chain = toolchain.toolchain_of(section, rig.platform.settings)
    model, converted, engine = column["checkpoint"].path, rig.root / "a", rig.root / "b"
    chain.convert(model, converted, section, tools)
    chain.build(converted, engine, section, SOURCES, tools)
    data = column["evaluation_data"].path
    chain.validate(model, engine, data, rig.root / "c", spec, rig.root, tools)
    settings = json.loads((tools.work / "llm-settings.json").read_text())
    assert settings["kv_cache_config"]["free_gpu_memory_fraction"] == 0.5
    assert settings["kv_cache_config"]["enable_block_reuse"] is False
    assert settings["scheduler_config"]["capacity_scheduler_policy"] == "MAX_UTILIZATION"
    (report,) = (tools.work / "benchmark").glob("report-*.json")
    world = json.loads(report.read_text())["world_info"]
    assert world["kv_cache_percentage"] == 0.5
    if backend == "engine":
        assert world["scheduling_policy"] == "MAX_UTILIZATION"
    else:
        frozen = yaml.safe_load((engine / "model.yaml").read_text())
        options = yaml.safe_load((tools.work / "llm-options.yaml").read_text())
        assert options == settings
        only_tritons = {"model", "backend", "triton_config"}
        assert options == {key: frozen[key] for key in frozen.keys() - only_tritons}


def test_weights_that_nothing_loads_are_not_packaged(rig: Rig, instance: DagsterInstance) -> None:
    """Some checkpoints hold their weights twice; the package would be twice as large."""
    register(rig, spec_text("llmapi"))
    model = rig.platform.column(RELEASE)["checkpoint"].path
    twice = rig.root / "twice"
    shutil.copytree(model, twice)
    for path in twice.iterdir():
        path.chmod(0o644)
    shutil.copyfile(model / "model.safetensors", twice / "consolidated.safetensors")
    index = {"weight_map": {"weights": "model.safetensors"}}
    (twice / "model.safetensors.index.json").write_text(json.dumps(index))
    section = rig.platform.spec(RELEASE).engine
    assert section.toolchain == "tensorrt_llm"
    tools = ToolRunner(work=rig.root / "work", log=rig.root / "log", timeout_seconds=20)
    output = rig.root / "converted"
    toolchain.toolchain_of(section, rig.platform.settings).convert(twice, output, section, tools)
    assert (output / "model.safetensors").is_file()
    assert not (output / "consolidated.safetensors").exists()


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


def test_build_says_what_it_took(rig: Rig, instance: DagsterInstance) -> None:
    """Seconds times GPUs times the settings' price, in the sidecar; paths stay out of it."""
    register(rig, spec_text("engine", 2))
    assert failures(materialize(rig, instance, *BUILD[:2])) == {}
    sidecar = read_sidecar(rig.platform.column(RELEASE)["engine"].path)
    assert sidecar.cost.amount == pytest.approx(Decimal(str(sidecar.cost.gpu_seconds)))
    convert, build = sidecar.commands
    assert "{checkpoint}" in convert
    assert "{converted}" in build
    facts = [rig.platform.columns.get(RELEASE, asset).facts for asset in BUILD[:2]]
    assert sidecar.cost.gpu_seconds == pytest.approx(
        sum(fact["gpu_seconds"] for fact in facts), abs=0.2
    )
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
