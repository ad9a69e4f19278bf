"""What the tables of GPUs and scripts say, and how a script is found."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.families import FAMILIES
from llmops_assets.toolchains.tensorrt_llm.flags import CONVERSION_FLAGS
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS, GPUName
from llmops_assets.toolchains.tensorrt_llm.quantizations import RECIPES, Quantization
from llmops_assets.toolchains.tensorrt_llm.scripts import EXAMPLE_FOLDERS, QUANTIZE, find_script

AMPERE: set[Quantization] = {"none", "int8", "int8_smoothquant", "int4", "int4_awq"}
ADA: set[Quantization] = {*AMPERE, "fp8", "w4a8_awq"}
BLACKWELL: set[Quantization] = {*ADA, "nvfp4"}
LLAMA = FAMILIES["llama"].script


@pytest.mark.parametrize(
    ("name", "architecture", "quantizations"),
    [
        ("a100-80gb", "sm_80", AMPERE),
        ("a10", "sm_86", AMPERE),
        ("l40s", "sm_89", ADA),
        ("h100-sxm", "sm_90", ADA),
        ("h200", "sm_90", ADA),
        ("b200", "sm_100", BLACKWELL),
        ("b300", "sm_103", BLACKWELL),
        ("rtx-pro-6000-blackwell", "sm_120", BLACKWELL),
    ],
)
def test_what_a_gpu_runs(
    name: GPUName, architecture: str, quantizations: set[Quantization]
) -> None:
    """8.9 is less than 10.0, which a comparison of texts or decimals gets wrong."""
    gpu = GPUS[name]
    assert gpu.architecture == architecture
    assert {quantization for quantization in RECIPES if gpu.runs(quantization)} == quantizations
    assert gpu.caches("fp8") == ("fp8" in quantizations)
    assert gpu.caches("int8")


def test_every_family_has_its_flags() -> None:
    """A family without them would pass validation and fail in the conversion."""
    assert CONVERSION_FLAGS.keys() == FAMILIES.keys()


def put(folder: Path, relative: PurePosixPath) -> Path:
    script = folder / relative
    script.parent.mkdir(parents=True)
    script.write_text("")
    return script


def test_both_images_places_are_probed(tmp_path: Path) -> None:
    """NVIDIA's two images keep the examples in different folders."""
    assert [str(folder) for folder in EXAMPLE_FOLDERS] == [
        "/app/tensorrt_llm/examples",
        "/app/examples",
    ]
    release, triton = tmp_path / "release", tmp_path / "triton"
    only = put(triton, LLAMA)
    assert find_script(LLAMA, (release, triton)) == only
    both = put(release, LLAMA)
    assert find_script(LLAMA, (release, triton)) == both


def test_a_missing_script_names_the_places(tmp_path: Path) -> None:
    """An image of version 1.3 has none; one below 1.0 has it elsewhere."""
    with pytest.raises(ToolchainError, match=r"no quantization/quantize\.py") as caught:
        find_script(QUANTIZE, (tmp_path / "a", tmp_path / "b"))
    assert str(tmp_path / "b" / QUANTIZE) in str(caught.value.expected)
    assert caught.value.found == "neither"
    put(tmp_path / "b", PurePosixPath("llama/convert_checkpoint.py"))
    with pytest.raises(ToolchainError, match=r"as images below version 1\.0 have it"):
        find_script(LLAMA, (tmp_path / "a", tmp_path / "b"))
