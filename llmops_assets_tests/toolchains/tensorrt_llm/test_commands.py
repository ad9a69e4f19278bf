"""From a spec's engine section to the commands that TensorRT-LLM's tools get.

The tools cannot run here, so the expected arguments are written out, from the facts about
the tools; the code's own tables are not used to make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.commands import (
    build_command,
    conversion_command,
    conversion_script,
)
from llmops_assets_tests.toolchains.tensorrt_llm.engines import CALIBRATION, engine

CHECKPOINT = Path("/data/checkpoint")
CONVERTED = Path("/data/converted")
ENGINE = Path("/data/engine")
DATA = Path("/data/calibration")
TIMINGS = Path("/data/timings.cache")
EXAMPLES = Path("/app/examples")
PYTHON = Path("/usr/bin/python3")

PLACES = "--model_dir /data/checkpoint --output_dir /data/converted"
CALIBRATED = "--calib_size 512 --calib_max_seq_length 512 --batch_size 1 --seed 1234"
CORE = "models/core/{}/convert_checkpoint.py"


class Case(NamedTuple):
    section: Mapping[str, Any]
    script: str
    flags: str


def converts(family: str, flags: str, folder: str | None = None, **section: Any) -> Case:
    """A case in which the family's own script converts; `dtype` is first among its flags."""
    script = folder or CORE.format(family)
    return Case({"family": family, **section}, script, f"{PLACES} {flags}")


def quantizes(family: str, flags: str, ranks: str = "1 1 1", **section: Any) -> Case:
    """A case in which `quantize.py` converts; `ranks` are tp, pp and cp."""
    tensor, pipeline, context = ranks.split()
    qformat, _, rest = flags.partition(" ")
    cache, _, dtype = rest.partition(" ")
    places = f"{PLACES} --qformat {qformat} --calib_dataset /data/calibration"
    kv = "" if cache == "-" else f" --kv_cache_dtype {cache}"
    return Case(
        {"family": family, "calibration": CALIBRATION, **section},
        "quantization/quantize.py",
        f"{places}{kv} --dtype {dtype or 'auto'} --tp_size {tensor} --pp_size {pipeline} "
        f"--cp_size {context} {CALIBRATED}",
    )


def ways(**given: int) -> dict[str, Any]:
    return {"parallelism": given}


WEIGHT_ONLY_8 = "--use_weight_only --weight_only_precision int8"
WEIGHT_ONLY_4 = "--use_weight_only --weight_only_precision int4"
FP8_CACHE: Mapping[str, Any] = {"kv_cache": {"dtype": "fp8"}}
INT8_CACHE: Mapping[str, Any] = {"kv_cache": {"dtype": "int8"}}

CASES = {
    # Llama, Mistral and Mixtral.
    "llama": converts(
        "llama", "--dtype auto --tp_size 1 --pp_size 1 --workers 1 --cp_size 1"
    ),
    "llama bfloat16": converts(
        "llama", "--dtype bfloat16 --tp_size 1 --pp_size 1 --workers 1 --cp_size 1",
        dtype="bfloat16",
    ),
    "llama float32": converts(
        "llama", "--dtype float32 --tp_size 1 --pp_size 1 --workers 1 --cp_size 1",
        dtype="float32",
    ),
    "llama tp 2": converts(
        "llama", "--dtype auto --tp_size 2 --pp_size 1 --workers 1 --cp_size 1", **ways(tensor=2)
    ),
    "llama tp 4 pp 2": converts(
        "llama", "--dtype auto --tp_size 4 --pp_size 2 --workers 1 --cp_size 1",
        **ways(tensor=4, pipeline=2),
    ),
    "llama cp 2": converts(
        "llama", "--dtype auto --tp_size 1 --pp_size 1 --workers 1 --cp_size 2", **ways(context=2)
    ),
    "mixtral tp 4 of which ep 2": converts(
        "llama",
        "--dtype auto --tp_size 4 --pp_size 1 --workers 1 --cp_size 1 --moe_tp_size 2 "
        "--moe_ep_size 2",
        **ways(tensor=4, expert=2),
    ),
    "mixtral ep 8": converts(
        "llama",
        "--dtype auto --tp_size 8 --pp_size 1 --workers 1 --cp_size 1 --moe_tp_size 1 "
        "--moe_ep_size 8",
        **ways(tensor=8, expert=8),
    ),
    "llama int8": converts(
        "llama",
        f"--dtype auto {WEIGHT_ONLY_8} --tp_size 1 --pp_size 1 --workers 1 --cp_size 1",
        quantization="int8",
    ),
    "llama int4 tp 2": converts(
        "llama",
        f"--dtype auto {WEIGHT_ONLY_4} --tp_size 2 --pp_size 1 --workers 1 --cp_size 1",
        quantization="int4", **ways(tensor=2),
    ),
    "llama fp8": quantizes("llama", "fp8 -", quantization="fp8"),
    "llama fp8 and its cache": quantizes("llama", "fp8 fp8", quantization="fp8", **FP8_CACHE),
    "llama fp8 bfloat16 tp 4": quantizes(
        "llama", "fp8 fp8 bfloat16", "4 1 1", quantization="fp8", dtype="bfloat16",
        **FP8_CACHE, **ways(tensor=4),
    ),
    "llama fp8 tp 2 pp 2": quantizes(
        "llama", "fp8 -", "2 2 1", quantization="fp8", **ways(tensor=2, pipeline=2)
    ),
    "llama fp8 cp 2": quantizes("llama", "fp8 -", "1 1 2", quantization="fp8", **ways(context=2)),
    "llama smoothquant": quantizes("llama", "int8_sq -", quantization="int8_smoothquant"),
    "llama smoothquant int8 cache": quantizes(
        "llama", "int8_sq int8", quantization="int8_smoothquant", **INT8_CACHE
    ),
    "llama int4_awq": quantizes("llama", "int4_awq -", quantization="int4_awq"),
    "llama int4_awq on a10": quantizes(
        "llama", "int4_awq int8", quantization="int4_awq", gpu="a10", **INT8_CACHE
    ),
    "llama int4_awq tp 2": quantizes(
        "llama", "int4_awq -", "2 1 1", quantization="int4_awq", **ways(tensor=2)
    ),
    "llama w4a8_awq": quantizes("llama", "w4a8_awq -", quantization="w4a8_awq"),
    "llama w4a8_awq on l40s": quantizes(
        "llama", "w4a8_awq fp8", quantization="w4a8_awq", gpu="l40s", **FP8_CACHE
    ),
    "llama nvfp4": quantizes("llama", "nvfp4 -", quantization="nvfp4", gpu="b200"),
    "llama nvfp4 fp8 cache tp 8": quantizes(
        "llama", "nvfp4 fp8", "8 1 1", quantization="nvfp4", gpu="b200", **FP8_CACHE,
        **ways(tensor=8),
    ),
    "llama cache alone": quantizes("llama", "full_prec fp8", **FP8_CACHE),
    "llama int8 and its cache": quantizes(
        "llama", "int8_wo int8", quantization="int8", **INT8_CACHE
    ),
    "llama int4 and an fp8 cache": quantizes(
        "llama", "int4_wo fp8", quantization="int4", **FP8_CACHE
    ),
    # Qwen.
    "qwen": converts("qwen", "--dtype auto --tp_size 1 --pp_size 1 --workers 1 --cp_size 1"),
    "qwen tp 2 pp 2": converts(
        "qwen", "--dtype auto --tp_size 2 --pp_size 2 --workers 1 --cp_size 1",
        **ways(tensor=2, pipeline=2),
    ),
    "qwen moe": converts(
        "qwen",
        "--dtype auto --tp_size 4 --pp_size 1 --workers 1 --cp_size 1 --moe_tp_size 1 "
        "--moe_ep_size 4",
        **ways(tensor=4, expert=4),
    ),
    "qwen int8": converts(
        "qwen",
        f"--dtype auto {WEIGHT_ONLY_8} --tp_size 1 --pp_size 1 --workers 1 --cp_size 1",
        quantization="int8",
    ),
    "qwen fp8 tp 2": quantizes(
        "qwen", "fp8 fp8", "2 1 1", quantization="fp8", **FP8_CACHE, **ways(tensor=2)
    ),
    "qwen smoothquant": quantizes("qwen", "int8_sq -", quantization="int8_smoothquant"),
    "qwen int4_awq": quantizes("qwen", "int4_awq -", quantization="int4_awq"),
    # GPT-2, StarCoder, Nemotron: no context parallelism, no experts.
    "gpt tp 2": converts(
        "gpt", "--dtype auto --tp_size 2 --pp_size 1 --workers 1", **ways(tensor=2)
    ),
    "gpt pp 2 int4": converts(
        "gpt", f"--dtype auto {WEIGHT_ONLY_4} --tp_size 1 --pp_size 2 --workers 1",
        quantization="int4", **ways(pipeline=2),
    ),
    "gpt fp8": quantizes("gpt", "fp8 -", quantization="fp8"),
    "gpt smoothquant": quantizes("gpt", "int8_sq -", quantization="int8_smoothquant"),
    # Gemma: names of its own, one size for the world, one worker.
    "gemma": converts("gemma", "--dtype auto --ckpt-type hf --world-size 1"),
    "gemma tp 2 bfloat16": converts(
        "gemma", "--dtype bfloat16 --ckpt-type hf --world-size 2", dtype="bfloat16",
        **ways(tensor=2),
    ),
    "gemma int4": converts(
        "gemma", f"--dtype auto {WEIGHT_ONLY_4} --ckpt-type hf --world-size 1",
        quantization="int4",
    ),
    "gemma fp8": quantizes("gemma", "fp8 fp8", quantization="fp8", **FP8_CACHE),
    "gemma int4_awq tp 2": quantizes(
        "gemma", "int4_awq -", "2 1 1", quantization="int4_awq", **ways(tensor=2)
    ),
    # Phi: no pipeline.
    "phi": converts("phi", "--dtype auto --tp_size 1 --pp_size 1 --workers 1"),
    "phi moe": converts(
        "phi",
        "--dtype auto --tp_size 2 --pp_size 1 --workers 1 --moe_tp_size 1 --moe_ep_size 2",
        **ways(tensor=2, expert=2),
    ),
    "phi int8": converts(
        "phi", f"--dtype auto {WEIGHT_ONLY_8} --tp_size 1 --pp_size 1 --workers 1",
        quantization="int8",
    ),
    "phi fp8": quantizes(
        "phi", "fp8 fp8 bfloat16", quantization="fp8", dtype="bfloat16", **FP8_CACHE
    ),
    "phi smoothquant": quantizes(
        "phi", "int8_sq int8", quantization="int8_smoothquant", **INT8_CACHE
    ),
    # Command R: weights alone.
    "commandr tp 4": converts(
        "commandr", "--dtype auto --tp_size 4 --pp_size 1 --workers 1", **ways(tensor=4)
    ),
    "commandr int4": converts(
        "commandr", f"--dtype auto {WEIGHT_ONLY_4} --tp_size 1 --pp_size 1 --workers 1",
        quantization="int4",
    ),
    # Falcon lies among the contributed families.
    "falcon tp 2": converts(
        "falcon", "--dtype auto --tp_size 2 --pp_size 1 --workers 1",
        "models/contrib/falcon/convert_checkpoint.py", **ways(tensor=2),
    ),
    "falcon fp8": quantizes("falcon", "fp8 -", quantization="fp8"),
    "falcon int4_awq": quantizes("falcon", "int4_awq -", quantization="int4_awq"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_conversion(case: Case) -> None:
    """A wrong or missing flag costs a failed run, or an engine of something else."""
    section = engine(**case.section)
    script = conversion_script(section)
    data = DATA if section.calibration else None
    assert str(script) == case.script
    assert conversion_command(section, PYTHON, EXAMPLES / script, CHECKPOINT, CONVERTED, data) == [
        "/usr/bin/python3",
        f"/app/examples/{case.script}",
        *case.flags.split(),
    ]


DEFAULT_BUILD = {
    "checkpoint_dir": "/data/converted",
    "output_dir": "/data/engine",
    "output_timing_cache": "/data/timings.cache",
    "max_batch_size": "64",
    "max_input_len": "1024",
    "max_seq_len": "2048",
    "max_num_tokens": "8192",
    "max_beam_width": "1",
    "kv_cache_type": "paged",
    "tokens_per_block": "32",
    "workers": "1",
    "log_level": "info",
    "gemm_plugin": "auto",
    "remove_input_padding": "enable",
    "use_paged_context_fmha": "enable",
}
FP8: Mapping[str, Any] = {"quantization": "fp8", "calibration": CALIBRATION}


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ({}, {}),
        ({"family": "gemma", "dtype": "bfloat16"}, {}),
        # Parallelism and quantisation come from the checkpoint: only workers change.
        (ways(tensor=4), {"workers": "4"}),
        (ways(tensor=2, pipeline=2), {"workers": "4"}),
        (ways(tensor=2, context=2), {"workers": "4"}),
        (FP8, {}),
        ({**FP8, "kv_cache": {"dtype": "fp8", "tokens_per_block": 64}}, {"tokens_per_block": "64"}),
        ({**FP8, "plugins": {"gemm": "fp8"}}, {"gemm_plugin": "fp8"}),
        ({**FP8, "plugins": {"gemm_swiglu": True}}, {"gemm_swiglu_plugin": "fp8"}),
        (
            {**FP8, "plugins": {"low_latency_gemm": True, "gemm": "disable"}},
            {"low_latency_gemm_plugin": "fp8", "gemm_plugin": "disable"},
        ),
        (
            {**FP8, "plugins": {"low_latency_gemm_swiglu": True}},
            {"low_latency_gemm_swiglu_plugin": "fp8"},
        ),
        (
            {**FP8, **ways(tensor=2), "plugins": {"reduce_fusion": True, "user_buffer": True}},
            {"workers": "2", "reduce_fusion": "enable", "user_buffer": "enable"},
        ),
        (
            {**ways(tensor=2), "plugins": {"gemm_allreduce": "bfloat16"}},
            {"workers": "2", "gemm_allreduce_plugin": "bfloat16"},
        ),
        ({"plugins": {"multiple_profiles": True}}, {"multiple_profiles": "enable"}),
        (
            {"plugins": {"paged_context_attention": False}, "kv_cache": {"reuse": False}},
            {"use_paged_context_fmha": "disable"},
        ),
        (
            {
                "quantization": "nvfp4",
                "gpu": "b200",
                "calibration": CALIBRATION,
                "plugins": {"gemm": "nvfp4"},
            },
            {"gemm_plugin": "nvfp4"},
        ),
        (
            {
                "limits": {
                    "max_batch_size": 8,
                    "max_input_len": 4000,
                    "max_seq_len": 5000,
                    "max_num_tokens": 4096,
                    "max_beam_width": 4,
                }
            },
            {
                "max_batch_size": "8",
                "max_input_len": "4000",
                "max_seq_len": "5000",
                "max_num_tokens": "4096",
                "max_beam_width": "4",
            },
        ),
    ],
)
def test_build(section: Mapping[str, Any], changed: Mapping[str, str]) -> None:
    """Shapes and plugins are frozen into the engine; another flag is another engine."""
    command = build_command(engine(**section), CONVERTED, ENGINE, TIMINGS)
    assert command[0] == "trtllm-build"
    names, values = command[1::2], command[2::2]
    assert len(names) == len(values) == len(set(names))
    assert dict(zip(names, values, strict=True)) == {
        f"--{name}": value for name, value in {**DEFAULT_BUILD, **changed}.items()
    }


def test_build_starts_from_earlier_timings() -> None:
    """Without them every build of the same layers measures its kernels again."""
    command = build_command(engine(), CONVERTED, ENGINE, TIMINGS, Path("/data/earlier.cache"))
    assert command[command.index("--input_timing_cache") + 1] == "/data/earlier.cache"
    assert "--input_timing_cache" not in build_command(engine(), CONVERTED, ENGINE, TIMINGS)


def test_what_a_spec_says_of_calibration_is_passed_on() -> None:
    """Scales from other rows are other weights."""
    calibration = {**CALIBRATION, "samples": 64, "max_seq_length": 4096, "batch_size": 2, "seed": 7}
    section = engine(quantization="fp8", calibration=calibration)
    command = conversion_command(section, PYTHON, EXAMPLES / "q.py", CHECKPOINT, CONVERTED, DATA)
    wanted = "--calib_size 64 --calib_max_seq_length 4096 --batch_size 2 --seed 7"
    assert command[-8:] == wanted.split()


@pytest.mark.parametrize("data", [None, Path("/data/cnn_dailymail"), Path("/data/ScienceQA/rows")])
def test_public_calibration_data_is_refused(data: Path | None) -> None:
    """quantize.py downloads its default, and reads a path with such a name as that data set."""
    section = engine(quantization="fp8", calibration=CALIBRATION)
    with pytest.raises(ToolchainError, match="calibration data of its own"):
        conversion_command(section, PYTHON, EXAMPLES / "q.py", CHECKPOINT, CONVERTED, data)


def test_llmapi_converts_and_builds_nothing() -> None:
    """It serves the checkpoint; a command for it would be a mistake of ours."""
    section = engine(backend="llmapi", family=None)
    with pytest.raises(ToolchainError, match="converts and builds nothing"):
        conversion_script(section)
    with pytest.raises(ToolchainError, match="converts and builds nothing"):
        conversion_command(section, PYTHON, EXAMPLES / "c.py", CHECKPOINT, CONVERTED)
    with pytest.raises(ToolchainError, match="converts and builds nothing"):
        build_command(section, CONVERTED, ENGINE, TIMINGS)


def test_impossible_sections_get_no_command() -> None:
    """A release may be older than the rule that now refuses it."""
    section = engine(gpu="a100-80gb", quantization="fp8", calibration=CALIBRATION)
    for make in (
        lambda: conversion_script(section),
        lambda: conversion_command(section, PYTHON, EXAMPLES / "q.py", CHECKPOINT, CONVERTED, DATA),
        lambda: build_command(section, CONVERTED, ENGINE, TIMINGS),
    ):
        with pytest.raises(
            ToolchainError, match=r"quantization: fp8 needs compute capability 8\.9"
        ):
            make()
