"""The CPU toolchain on a real, tiny checkpoint: what it makes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai
import pandas as pd
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from llmops_assets.develop import evaluate as evaluate_module
from llmops_assets.develop.evaluate import evaluate
from llmops_assets.develop.harness import scores
from llmops_assets.develop.harness_tasks import tool_arguments
from llmops_assets.develop.judgements import Results, judge_metrics
from llmops_assets.develop.metrics import PREDICTION_COLUMNS, TIME_COLUMNS, latency
from llmops_assets.errors import ToolchainError, ToolError
from llmops_assets.evidence.latency import LatencySummary
from llmops_assets.evidence.statistics import Decision
from llmops_assets.spec import OnnxRuntimeGenAIEngine, canonical, parse_spec
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.base import Target
from llmops_assets.toolchains.onnxruntime_genai.engine_directory import check_model_directory
from llmops_assets.toolchains.onnxruntime_genai.validate import validate
from llmops_assets_tests.harness_repository import CHOOSE, EXPECTED, WRITE, write_repository
from llmops_assets_tests.tiny_llama import ROWS, TinyLlama, serving_spec, tiny_llama, tools

INT8 = OnnxRuntimeGenAIEngine(toolchain="onnxruntime_genai", precision="int8")
INT4 = INT8.model_copy(update={"precision": "int4"})
TOOLCHAIN = toolchain_for(INT8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    return tiny_llama(tmp_path_factory.getbasetemp() / "tiny_llama")


@pytest.fixture(scope="module")
def int8_engine(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    TOOLCHAIN.build(tiny.converted, folder / "engine", INT8, {}, tools(folder))
    return folder / "engine"


@pytest.fixture(scope="module")
def int4_engine(tiny: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    TOOLCHAIN.build(tiny.converted, folder / "engine", INT4, {}, tools(folder))
    return folder / "engine"


def validation_of(tiny: TinyLlama, engine: Path, output: Path) -> dict[str, Any]:
    """What validation says, in this process: it takes a second where its own takes five."""
    limits = tiny.spec.constraints
    validate(
        tiny.checkpoint, engine, tiny.evaluation_data, output, threads=1,
        max_input_tokens=limits.max_input_tokens, max_output_tokens=limits.max_output_tokens,
    )  # fmt: skip
    return json.loads((output / "validation.json").read_text())


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


def test_conversion_knows_nothing_of_the_repository_around_it(tiny: TinyLlama) -> None:
    """The builder asks git for its commit, and once got ours: a commit changed the weights."""
    model = onnx.load(str(tiny.converted / "model.onnx"), load_external_data=False)
    commit = onnxruntime_genai.__commit__  # pyright: ignore[reportAttributeAccessIssue]
    assert model.producer_version == f"{onnxruntime_genai.__version__}+{commit[:7]}"


def test_build_is_bit_deterministic(tiny: TinyLlama, int8_engine: Path, tmp_path: Path) -> None:
    """A rebuilt engine must keep its digest, and with it its verdicts."""
    TOOLCHAIN.build(tiny.converted, tmp_path / "engine", INT8, {}, tools(tmp_path))
    assert digests(tmp_path / "engine") == digests(int8_engine)


def test_quantised_engines_are_smaller_and_say_what_they_are(
    tiny: TinyLlama, int8_engine: Path, int4_engine: Path
) -> None:
    """The sidecar is all that deployment knows of the engine; fp32 in disguise must show."""
    engines = (int4_engine, int8_engine, tiny.engine)
    int4, int8, fp32 = ((engine / "model.onnx.data").stat().st_size for engine in engines)
    assert int4 < int8 < fp32
    for precision, bits, engine in (("int8", 8, int8_engine), ("int4", 4, int4_engine)):
        model = onnx.load(str(engine / "model.onnx"), load_external_data=False)
        quantised = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        assert len(quantised) == 11  # 5 in each of 2 layers, and the head
        assert {onnx.helper.get_node_attr_value(node, "bits") for node in quantised} == {bits}
        assert "MatMul" not in [node.op_type for node in model.graph.node]
        assert json.loads((engine / "engine.json").read_text()) == {
            "toolchain": "onnxruntime_genai",
            "versions": TOOLCHAIN.versions("engine"),
            "target": {"architecture": Target.here().architecture},
            "parameters": {"precision": precision, "block_size": 32},
        }


def test_coarser_weights_answer_less_like_the_checkpoint(
    tiny: TinyLlama, int8_engine: Path, int4_engine: Path, tmp_path: Path
) -> None:
    """The parity gate must see what quantisation costs, or int4 passes as if it were fp32."""
    int8 = validation_of(tiny, int8_engine, tmp_path / "int8")
    int4 = validation_of(tiny, int4_engine, tmp_path / "int4")
    assert int4["token_agreement"] < int8["token_agreement"] < 1
    assert int4["logit_distance"]["largest"] > 3 * int8["logit_distance"]["largest"]
    # Perplexity hardly moves: it must never pass an engine alone.
    assert int4["perplexity"] == pytest.approx(int8["perplexity"], rel=0.01)


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
        tmp_path, tools(tmp_path),
    )  # fmt: skip
    validation = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert validation["prompts"] == validation["prompts_equal"] == 50
    assert validation["token_agreement"] == 1
    assert 0 < validation["logit_distance"]["mean"] < validation["logit_distance"]["largest"] < 1e-4
    assert validation["tokenizer_parity"] == {"prompts": ROWS, "equal": ROWS}
    assert validation["rows"] == ROWS
    assert validation["slices"]["odd"] == {"rows": ROWS // 2, "exact_match": 0}
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert tuple(predictions.columns) == PREDICTION_COLUMNS + TIME_COLUMNS
    assert not predictions["correct"].any()
    assert LatencySummary.model_validate(validation["latency"]) == latency(predictions)
    level = validation["latency"]["levels"][0]
    assert level["requests"] == ROWS
    assert 0 < level["time_to_first_token"]["p50"] < level["end_to_end"]["p50"]
    # Measured as the checkpoint is, row by row: what gates compare is the same thing.
    evaluate(tiny.checkpoint, tiny.evaluation_data, 12, tmp_path / "evaluation", threads=1)
    expected = pd.read_parquet(tmp_path / "evaluation" / "predictions.parquet")
    for column in ("prompt", "completion", "slice", "prediction", "tokens", "output_tokens"):
        assert list(predictions[column]) == list(expected[column])
    assert list(predictions["loss"]) == pytest.approx(list(expected["loss"]), rel=1e-5)
    assert validation["loss"] == pytest.approx(
        json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["loss"], rel=1e-5
    )


def test_tasks_of_the_harness_are_asked_of_checkpoint_and_engine(
    tiny: TinyLlama, tmp_path: Path
) -> None:
    """As the assets do it: a metric of the spec is judged on both, and on its own interval."""
    repository = write_repository(tmp_path / "repository", tiny.checkpoint)
    gate = {"choosing": {"at_least": 0.2}, "writing": {"at_least": 0.99}}
    spec = parse_spec(
        json.dumps(
            canonical(tiny.spec)
            | {"metrics": ["exact_match", *map(canonical, (CHOOSE, WRITE))]}
            | {"gates": canonical(tiny.spec.gates) | {"engine_accuracy": gate}}
        ),
        "tiny",
    )
    TOOLCHAIN.validate(
        tiny.checkpoint, tiny.engine, tiny.evaluation_data, tmp_path / "out", spec,
        repository, tools(tmp_path),
    )  # fmt: skip
    options = tool_arguments(spec.harness, repository, tmp_path)
    arguments = [
        "--checkpoint", tiny.checkpoint, "--evaluation-data", tiny.evaluation_data,
        "--max-tokens", 12, "--output", tmp_path / "evaluation", "--threads", 1, *options,
    ]  # fmt: skip
    assert evaluate_module.main(map(str, arguments)) == 0
    for folder in (tmp_path / "out", tmp_path / "evaluation"):
        assert scores(folder, "choosing") == scores(folder, "writing") == EXPECTED
    results = Results(tmp_path / "out", spec, repository)
    judgement = judge_metrics(results, spec.gates.engine_accuracy)
    decisions = {finding.metric: finding.decision for finding in judgement.findings}
    assert decisions == {"choosing": Decision.PASSED, "writing": Decision.FAILED}
    assert {finding.n for finding in judgement.findings} == {len(EXPECTED)}


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
        tiny.checkpoint, engine, tiny.evaluation_data, tmp_path / "out", tiny.spec,
        tmp_path, tools(tmp_path),
    )  # fmt: skip
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
            tmp_path, tools(tmp_path),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_validation_refuses_rows_that_the_engine_cannot_hold(
    tiny: TinyLlama, tmp_path: Path
) -> None:
    """The loss needs prompt and completion at once; the runtime's own error names no row."""
    engine = tmp_path / "engine"
    shutil.copytree(tiny.engine, engine)
    configuration = json.loads((engine / "genai_config.json").read_text())
    configuration["model"]["context_length"] = 16
    (engine / "genai_config.json").write_text(json.dumps(configuration))
    with pytest.raises(ToolchainError, match=r"Row 0 .* does not fit into the engine's context"):
        validation_of(tiny, engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cut_off_weights_are_noticed(tiny: TinyLlama, tmp_path: Path) -> None:
    """A full disk leaves a short file, which ONNX Runtime may only notice when it serves."""
    shutil.copytree(tiny.converted, tmp_path / "converted")
    with (tmp_path / "converted" / "model.onnx.data").open("r+b") as weights:
        weights.truncate((tiny.converted / "model.onnx.data").stat().st_size - 1)
    with pytest.raises(ToolchainError, match=r"model\.onnx\.data is cut off"):
        TOOLCHAIN.build(tmp_path / "converted", tmp_path / "engine", INT8, {}, tools(tmp_path))
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
