"""The CPU toolchain on a real, tiny checkpoint: what it makes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import onnx
import pandas as pd
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from llmops_assets.errors import ToolchainError, ToolError
from llmops_assets.spec import OnnxRuntimeGenAIEngine
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.base import Target
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import check_model_directory
from llmops_assets_tests.tiny_llama import ROWS, TinyLlama, serving_spec, tiny_llama, tools

INT8 = OnnxRuntimeGenAIEngine(toolchain="onnxruntime_genai", precision="int8")
TOOLCHAIN = toolchain_for(INT8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")


@pytest.fixture(scope="module")
def int8_engine(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    TOOLCHAIN.build(tiny.converted, folder / "engine", INT8, tools(folder))
    return folder / "engine"


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_conversion_is_bit_deterministic(tiny: TinyLlama, tmp_path: Path) -> None:
    """Equal checkpoints must give equal engines, wherever they lie, or nothing is reused."""
    elsewhere = tmp_path / "another name"
    shutil.copytree(tiny.checkpoint, elsewhere)
    TOOLCHAIN.convert(elsewhere, tmp_path / "converted", INT8, tools(tmp_path))
    assert digests(tmp_path / "converted") == digests(tiny.converted)


def test_build_is_bit_deterministic(tiny: TinyLlama, int8_engine: Path, tmp_path: Path) -> None:
    """A rebuilt engine must keep its digest, and with it its verdicts."""
    TOOLCHAIN.build(tiny.converted, tmp_path / "engine", INT8, tools(tmp_path))
    assert digests(tmp_path / "engine") == digests(int8_engine)


def test_int8_engine_is_smaller_and_says_what_it_is(tiny: TinyLlama, int8_engine: Path) -> None:
    """The sidecar is all that deployment knows of the engine; fp32 in disguise must show."""
    sizes = [(d / "model.onnx.data").stat().st_size for d in (int8_engine, tiny.engine)]
    assert sizes[0] < sizes[1]
    model = onnx.load(str(int8_engine / "model.onnx"), load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MatMulNBits") == 11  # 5 in each of 2 layers, and the head
    assert "MatMul" not in operators
    assert json.loads((int8_engine / "engine.json").read_text()) == {
        "toolchain": "onnxruntime_genai",
        "versions": TOOLCHAIN.versions(),
        "target": {"architecture": Target.here().architecture},
        "parameters": {"precision": "int8", "block_size": 32},
    }


def test_served_tokenizer_is_the_checkpoints(tiny: TinyLlama) -> None:
    """The model builder saves the tokenizer anew; served must be what was trained with."""
    packaged = tiny.package / "repository" / "tiny" / "version" / "tokenizer.json"
    assert packaged.read_bytes() == (tiny.checkpoint / "tokenizer.json").read_bytes()


def test_engine_for_another_machine_is_refused(tiny: TinyLlama) -> None:
    """An engine must not reach a slot whose machine cannot run it."""
    TOOLCHAIN.compatible(tiny.engine, Target.here())
    with pytest.raises(ToolchainError, match="riscv64"):
        TOOLCHAIN.compatible(tiny.engine, Target(architecture="riscv64"))


def test_fp32_engine_answers_like_its_checkpoint(tiny: TinyLlama, tmp_path: Path) -> None:
    """Without quantisation any difference is a fault: a lost special token, a wrong mask."""
    TOOLCHAIN.validate(
        tiny.checkpoint, tiny.engine, tiny.evaluation_data, tmp_path / "out", tiny.spec,
        tools(tmp_path),
    )  # fmt: skip
    validation = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert validation["prompts"] == validation["prompts_equal"] == 50
    assert validation["token_agreement"] == 1
    assert 0 < validation["logit_distance"]["mean"] < validation["logit_distance"]["largest"] < 1e-4
    assert validation["tokenizer_parity"] == {"prompts": ROWS, "equal": ROWS}
    assert validation["rows"] == ROWS
    assert validation["slices"]["odd"] == {"rows": ROWS // 2, "exact_match": 0}
    latency, first = validation["latency_seconds"], validation["time_to_first_token_seconds"]
    assert latency["n"] == ROWS
    assert 0 < first["p50"] < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert validation["tokens_per_second"] > 0
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert list(predictions["prompt"]) == list(
        pd.read_parquet(tiny.evaluation_data / "data.parquet")["prompt"]
    )
    assert not predictions["correct"].any()


def test_validation_notices_other_weights_and_tokenizer(tiny: TinyLlama, tmp_path: Path) -> None:
    """The parity gate lives from these numbers.

    GenAI's own tokenizer once dropped the begin token; a loss like that must be counted,
    and so must broken weights.
    """
    engine = tmp_path / "engine"
    shutil.copytree(tiny.engine, engine)
    weights = bytearray((engine / "model.onnx.data").read_bytes())
    weights[:65536] = bytes(65536)
    (engine / "model.onnx.data").write_bytes(weights)
    tokenizer = json.loads((engine / "tokenizer.json").read_text())
    tokenizer["post_processor"]["single"].pop(0)
    (engine / "tokenizer.json").write_text(json.dumps(tokenizer))
    facts = TOOLCHAIN.validate(
        tiny.checkpoint, engine, tiny.evaluation_data, tmp_path / "out", tiny.spec, tools(tmp_path)
    )
    assert facts["tokenizer_parity"] == {"prompts": ROWS, "equal": 0}
    assert facts["token_agreement"] < 0.9
    assert facts["prompts_equal"] < 50
    assert facts["logit_distance"]["largest"] > 0.01


def test_validation_refuses_prompts_that_would_be_refused(tiny: TinyLlama, tmp_path: Path) -> None:
    """Accuracy on prompts that production does not answer would be a false promise."""
    constraints = tiny.spec.constraints.model_copy(update={"max_input_tokens": 8})
    spec = tiny.spec.model_copy(update={"constraints": constraints})
    with pytest.raises(ToolError, match="Row 0 of the evaluation data would be refused"):
        TOOLCHAIN.validate(
            tiny.checkpoint, tiny.engine, tiny.evaluation_data, tmp_path / "out", spec,
            tools(tmp_path),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_cut_off_weights_are_noticed(tiny: TinyLlama, tmp_path: Path) -> None:
    """A full disk leaves a short file, which ONNX Runtime may only notice when it serves."""
    shutil.copytree(tiny.converted, tmp_path / "converted")
    with (tmp_path / "converted" / "model.onnx.data").open("r+b") as weights:
        weights.truncate((tiny.converted / "model.onnx.data").stat().st_size - 1)
    with pytest.raises(ToolchainError, match=r"model\.onnx\.data is cut off"):
        TOOLCHAIN.build(tmp_path / "converted", tmp_path / "engine", INT8, tools(tmp_path))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("name", ["genai_config.json", "model.onnx", "tokenizer.json"])
def test_missing_file_is_named(tiny: TinyLlama, tmp_path: Path, name: str) -> None:
    """The reader of the failed step must see which file is missing."""
    shutil.copytree(tiny.converted, tmp_path / "converted")
    (tmp_path / "converted" / name).unlink()
    with pytest.raises(ToolchainError, match=f"no {name}"):
        check_model_directory(tmp_path / "converted")


def test_package_is_deterministic_and_triton_can_read_it(tiny: TinyLlama, tmp_path: Path) -> None:
    """Build once, promote the same bytes: the package's digest is what gets approved."""
    TOOLCHAIN.package(tiny.engine, tiny.checkpoint, tmp_path / "package", serving_spec())
    assert digests(tmp_path / "package") == digests(tiny.package)
    configuration = text_format.Parse(
        (tiny.package / "repository" / "tiny" / "config.pbtxt").read_text(),
        model_config_pb2.ModelConfig(),  # pyright: ignore[reportAttributeAccessIssue]
    )
    assert configuration.model_transaction_policy.decoupled
    assert configuration.version_policy.HasField("all")
    assert [tensor.name for tensor in configuration.input if not tensor.optional] == ["text_input"]


def test_package_refuses_requests_longer_than_the_context(tiny: TinyLlama, tmp_path: Path) -> None:
    """A request within the limits of the spec must not fail for want of context."""
    constraints = tiny.spec.constraints.model_copy(update={"max_output_tokens": 4033})
    spec = tiny.spec.model_copy(update={"constraints": constraints})
    with pytest.raises(ToolchainError, match="64 \\+ 4033 = 4097"):
        TOOLCHAIN.package(tiny.engine, tiny.checkpoint, tmp_path / "package", spec)
