"""A spec's engine section as the commands that carry it out.

Paths are absolute: the tools look for others in their working directory.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.combinations import refuse_impossible
from llmops_assets.toolchains.tensorrt_llm.families import FAMILIES, FamilyName
from llmops_assets.toolchains.tensorrt_llm.flags import (
    CONVERSION_FLAGS,
    BuildFlags,
    ConversionFlags,
    QuantizeFlags,
    special_data_set,
)
from llmops_assets.toolchains.tensorrt_llm.quantizations import RECIPES, needs_calibration
from llmops_assets.toolchains.tensorrt_llm.scripts import QUANTIZE

BUILD = "trtllm-build"


def conversion_script(engine: TensorRTLLMEngine) -> PurePosixPath:
    """The script that makes the TensorRT-LLM checkpoint, as a path below `examples`.

    `quantize.py` where scales must be measured, else `convert_checkpoint.py` of the family.

    Raises:
        ToolchainError: the section asks for something impossible, or converts nothing.
    """
    family = _family(engine)
    if needs_calibration(engine.quantization, engine.kv_cache.dtype):
        return QUANTIZE
    return FAMILIES[family].script


def conversion_command(
    engine: TensorRTLLMEngine,
    python: Path,
    script: Path,
    checkpoint: Path,
    output: Path,
    calibration_data: Path | None = None,
) -> list[str]:
    """Hugging Face directory to TensorRT-LLM checkpoint: `config.json` and one file a rank.

    Args:
        engine: the spec's section.
        python: of the image, which has TensorRT-LLM.
        script: `conversion_script`, as `scripts.find_script` found it.
        checkpoint: Hugging Face directory.
        output: directory to write.
        calibration_data: the data set's directory, for `quantize.py`.

    Raises:
        ToolchainError: the section asks for something impossible, or the calibration data
            are missing or would be taken for a public data set.
    """
    family = _family(engine)
    if needs_calibration(engine.quantization, engine.kv_cache.dtype):
        flags = _quantize(engine, checkpoint, output, calibration_data).arguments()
    else:
        flags = _convert(engine, family, checkpoint, output).arguments()
    return [str(python), str(script), *flags]


def build_command(
    engine: TensorRTLLMEngine,
    checkpoint: Path,
    output: Path,
    timing_cache: Path,
    known_timings: Path | None = None,
) -> list[str]:
    """TensorRT-LLM checkpoint to engine: `config.json` and one `rank<r>.engine` a rank.

    Args:
        engine: the spec's section.
        checkpoint: TensorRT-LLM checkpoint.
        output: directory to write.
        timing_cache: file that the build's timings are written to.
        known_timings: file of an earlier build, if there is one.

    Raises:
        ToolchainError: the section asks for something impossible, or builds nothing.
    """
    _family(engine)
    limits, cache, plugins = engine.limits, engine.kv_cache, engine.built_with
    flags = BuildFlags(
        checkpoint_dir=checkpoint,
        output_dir=output,
        output_timing_cache=timing_cache,
        input_timing_cache=known_timings,
        max_batch_size=limits.max_batch_size,
        max_input_len=limits.max_input_len,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        max_beam_width=limits.max_beam_width,
        # What in-flight batching needs, said though it is the default.
        kv_cache_type="paged",
        remove_input_padding="enable",
        tokens_per_block=cache.tokens_per_block,
        # One process a rank, at most one a GPU; with one, GPU 0 builds all in turn.
        workers=engine.parallelism.world_size,
        log_level="info",
        gemm_plugin=plugins.gemm,
        gemm_swiglu_plugin="fp8" if plugins.gemm_swiglu else None,
        low_latency_gemm_plugin="fp8" if plugins.low_latency_gemm else None,
        low_latency_gemm_swiglu_plugin="fp8" if plugins.low_latency_gemm_swiglu else None,
        gemm_allreduce_plugin=plugins.gemm_allreduce,
        use_paged_context_fmha="enable" if plugins.paged_context_attention else "disable",
        reduce_fusion="enable" if plugins.reduce_fusion else None,
        user_buffer="enable" if plugins.user_buffer else None,
        multiple_profiles="enable" if plugins.multiple_profiles else None,
    )
    return [BUILD, *flags.arguments()]


def _family(engine: TensorRTLLMEngine) -> FamilyName:
    """The family of a section that can be built."""
    refuse_impossible(engine)
    if engine.family is None:
        raise ToolchainError(
            "The llmapi backend converts and builds nothing",
            expected="backend: engine",
            found=f"backend: {engine.backend}",
            cure="report this with the spec: the step should not have been reached",
        )
    return engine.family


def _convert(
    engine: TensorRTLLMEngine, family: FamilyName, checkpoint: Path, output: Path
) -> ConversionFlags:
    ways = engine.parallelism
    precision = RECIPES[engine.quantization].weight_only_precision
    values: dict[str, Any] = {
        "model_dir": checkpoint,
        "output_dir": output,
        "dtype": engine.dtype,
        "use_weight_only": precision is not None,
        "weight_only_precision": precision,
    }
    if family == "gemma":
        values["world_size"] = ways.tensor
    else:
        values |= {"tp_size": ways.tensor, "pp_size": ways.pipeline}
    if FAMILIES[family].context:
        values["cp_size"] = ways.context
    if ways.expert > 1:
        values |= {"moe_tp_size": ways.tensor // ways.expert, "moe_ep_size": ways.expert}
    return CONVERSION_FLAGS[family](**values)


def _quantize(
    engine: TensorRTLLMEngine, checkpoint: Path, output: Path, data: Path | None
) -> QuantizeFlags:
    calibration = engine.calibration
    public: str | None = None
    if calibration is None or data is None or (public := special_data_set(data)) is not None:
        raise ToolchainError(
            "quantize.py needs calibration data of its own",
            expected="the directory that the spec's engine.calibration.data names",
            found="none" if data is None else f"{data}, which reads as public data set {public}",
            cure="put the data into a directory of another name, and name it in the spec",
        )
    ways, cache = engine.parallelism, engine.kv_cache.dtype
    return QuantizeFlags.model_validate(
        {
            "model_dir": checkpoint,
            "output_dir": output,
            "qformat": RECIPES[engine.quantization].qformat,
            "calib_dataset": data,
            "kv_cache_dtype": None if cache == "auto" else cache,
            "dtype": engine.dtype,
            "tp_size": ways.tensor,
            "pp_size": ways.pipeline,
            "cp_size": ways.context,
            "calib_size": calibration.samples,
            "calib_max_seq_length": calibration.max_seq_length,
            "batch_size": calibration.batch_size,
            "seed": calibration.seed,
        }
    )
