"""Nothing that is not whole passes for a converted checkpoint or an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.outputs import (
    check_converted_weights,
    check_engine_directory,
)
from llmops_assets.tools import ToolRunner

from .conftest import build_command
from .doubles.installation import Installation

VERSION = "1.2.1"


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a directory's config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_whole_checkpoint_and_engine_pass(converted: Path, engine: Path) -> None:
    """And what they are is read from them."""
    checkpoint = check_converted_weights(converted)
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.mapping.weight_ranks == 2
    config = check_engine_directory(
        engine, version=VERSION, converted=converted, asked={"max_batch_size": 8}
    )
    assert config.pretrained_config == checkpoint
    assert config.build_config.max_seq_len == 512


def test_configuration_without_weights_is_refused(
    installation: Installation, tools: ToolRunner, tmp_path: Path
) -> None:
    """convert_checkpoint.py without a model makes one up and ends with exit code 0."""
    output = tmp_path / "converted"
    tools.run("conversion", installation.command("convert_checkpoint.py", "--output_dir", output))
    with pytest.raises(ToolchainError, match=r"no weights.*rank0.safetensors.*exit code 0"):
        check_converted_weights(output)


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        ("only_config", "holds a config.json and no weights"),
        ("missing_rank", "has not the ranks"),
        ("extra_rank", "has not the ranks"),
        ("empty_rank", "is empty"),
        ("cut_off_rank", "cut off|not a whole safetensors file"),
    ],
)
@pytest.mark.parametrize("tool", ["convert_checkpoint.py", "quantize.py"])
def test_broken_conversion_with_exit_code_zero_is_refused(
    tool: str,
    failure: str,
    problem: str,
    installation: Installation,
    hugging_face: Path,
    tools: ToolRunner,
    tmp_path: Path,
) -> None:
    """Disks fill up and ranks die without the tool's noticing."""
    installation.fail(tool, failure)
    output = tmp_path / "converted"
    tools.run(
        "conversion",
        installation.command(
            tool, "--model_dir", hugging_face, "--output_dir", output, "--tp_size", 2
        ),
    )
    with pytest.raises(ToolchainError, match=problem):
        check_converted_weights(output)


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        ("only_config", "holds a config.json and no weights"),
        ("missing_rank", r"has not the ranks.*Found: rank0.engine\."),
        ("extra_rank", "has not the ranks.*rank2.engine"),
        ("empty_rank", "rank1.engine is empty"),
        ("checkpoint_config", "the config.json of a converted checkpoint"),
    ],
)
def test_broken_build_with_exit_code_zero_is_refused(
    failure: str,
    problem: str,
    installation: Installation,
    converted: Path,
    tools: ToolRunner,
    tmp_path: Path,
) -> None:
    """An engine that lacks a rank would only be found out by a server that starts."""
    installation.fail("trtllm-build", failure)
    output = tmp_path / "engine"
    tools.run("build", build_command(installation, converted, output))
    with pytest.raises(ToolchainError, match=problem):
        check_engine_directory(output, version=VERSION, converted=converted)


def test_engine_that_cannot_hold_its_weights_is_refused(engine: Path, converted: Path) -> None:
    """A cut-off engine has no length of its own to compare with."""
    for rank in (0, 1):
        (engine / f"rank{rank}.engine").write_bytes(b"short")
    check_engine_directory(engine, version=VERSION)
    with pytest.raises(ToolchainError, match="too small to hold its weights"):
        check_engine_directory(engine, version=VERSION, converted=converted)


def test_stripped_engine_may_be_small(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """With --strip_plan and with --fast_build the weights are not in the plan."""
    for flag in ("--strip_plan", "--fast_build"):
        output = tmp_path / flag
        tools.run("build", [*build_command(installation, converted, output), flag])
        if flag == "--fast_build":
            for rank in (0, 1):
                (output / f"rank{rank}.engine").write_bytes(b"the kernels")
        check_engine_directory(output, version=VERSION, converted=converted)


def test_managed_weights_are_checked_for_every_rank(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """With --fast_build they are as much of the engine as the plans."""
    output = tmp_path / "engine"
    tools.run("build", [*build_command(installation, converted, output), "--fast_build"])
    managed = output / "rank1_managed_weights.safetensors"
    content = managed.read_bytes()
    managed.write_bytes(content[:-1])
    with pytest.raises(ToolchainError, match=f"cut off.*{len(content)} bytes"):
        check_engine_directory(output, version=VERSION)
    managed.unlink()
    with pytest.raises(ToolchainError, match="rank1_managed_weights"):
        check_engine_directory(output, version=VERSION)


def nested(*path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change of one key; None takes it out."""

    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value
        if value is None:
            del config[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nested("architecture", value=None), "architecture: Field required"),
        (nested("mapping", value=None), "mapping: Field required"),
        (nested("quantization", value=None), "quantization: Field required"),
        (nested("hidden_size", value=0), "hidden_size"),
        (nested("mapping", "world_size", value=4), r"world_size is 4.*cp_size is 2"),
        (nested("mapping", "moe_ep_size", value=2), r"moe_ep_size is 4, but tp_size is 2"),
        (nested("quantization", "quant_algo", value="MIXED_PRECISION"), "quant_cfg.json"),
        (nested("mapping", "pp_size", value="two"), "mapping.pp_size"),
    ],
)
def test_broken_checkpoint_configuration_is_refused(
    change: Callable[[dict[str, Any]], object], problem: str, converted: Path
) -> None:
    """Each key decides how many ranks there are, or how weights are read."""
    edit(converted, change)
    with pytest.raises(ToolchainError, match=problem):
        check_converted_weights(converted)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (nested("version", value=None), "version: Field required"),
        (nested("version", value="1.1.0"), "another version.*Expected: 1.2.1. Found: 1.1.0"),
        (nested("build_config", value=None), "build_config: Field required"),
        (nested("build_config", "max_seq_len", value=None), "build_config.max_seq_len"),
        (nested("build_config", "plugin_config", value=None), "plugin_config"),
        (nested("build_config", "max_batch_size", value=4), "asked for.*max_batch_size=8.*=4"),
        (nested("pretrained_config", "dtype", value="float16"), "not of the checkpoint.*bfloat16"),
        (
            nested("pretrained_config", "quantization", "quant_algo", value="FP8"),
            "not of the checkpoint.*FP8",
        ),
    ],
)
def test_broken_engine_configuration_is_refused(
    change: Callable[[dict[str, Any]], object], problem: str, engine: Path, converted: Path
) -> None:
    """It would serve other lengths, or another model, than the release says."""
    edit(engine, change)
    with pytest.raises(ToolchainError, match=problem):
        check_engine_directory(
            engine, version=VERSION, converted=converted, asked={"max_batch_size": 8}
        )


def test_parallelism_of_experts_may_be_worked_out_by_the_build(
    engine: Path, converted: Path
) -> None:
    """A checkpoint may leave it at -1."""
    edit(converted, nested("mapping", "moe_tp_size", value=-1))
    edit(converted, nested("mapping", "moe_ep_size", value=-1))
    check_engine_directory(engine, version=VERSION, converted=converted)


def test_ranks_of_context_parallelism_share_weights(converted: Path) -> None:
    """So there are fewer files of weights than ranks."""

    def spread(config: dict[str, Any]) -> None:
        config["mapping"].update(cp_size=2, world_size=4)

    edit(converted, spread)
    assert check_converted_weights(converted).mapping.world_size == 4


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_unreadable_configuration_is_refused(content: str, converted: Path) -> None:
    """A tool that was killed while it wrote leaves such."""
    (converted / "config.json").write_text(content)
    with pytest.raises(ToolchainError, match=r"config\.json"):
        check_converted_weights(converted)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    """A tool may write elsewhere than it was told to."""
    with pytest.raises(ToolchainError, match="cannot be read"):
        check_engine_directory(tmp_path / "engine", version=VERSION)


@pytest.mark.parametrize("length", [0, 7, 8, 40])
def test_weights_cut_off_anywhere_are_found(length: int, converted: Path) -> None:
    """In the length of the header, in the header, and in the tensors."""
    path = converted / "rank1.safetensors"
    for end in (length, path.stat().st_size - 1):
        shutil.copyfile(converted / "rank0.safetensors", path)
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(ToolchainError, match=r"rank1\.safetensors"):
            check_converted_weights(converted)


def test_timing_cache_inside_an_engine_is_refused(engine: Path) -> None:
    """It would become part of the artifact, and differ with every build."""
    (engine / "model.cache").write_bytes(b"times")
    with pytest.raises(ToolchainError, match=r"timing cache.*model\.cache"):
        check_engine_directory(engine, version=VERSION)
