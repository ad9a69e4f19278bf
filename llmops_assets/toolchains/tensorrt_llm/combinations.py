"""What a spec's engine section may not ask for, found before a GPU minute is spent.

Each refusal says why. The same list is shown by `llmops spec validate`, with lines, and
raised by the toolchain's steps, whose spec may be older than a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.containers import backend_refusal, known_container
from llmops_assets.toolchains.tensorrt_llm.families import FAMILIES
from llmops_assets.toolchains.tensorrt_llm.flags import special_data_set
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.quantizations import (
    BLACKWELL,
    RECIPES,
    needs_calibration,
)

if TYPE_CHECKING:
    # A spec's own sections are checked by what is here.
    from llmops_assets.spec import TensorRTLLMEngine

Refusal = tuple[tuple[str, ...], str]
"""A place within the engine section, and what is wrong there."""

LARGEST_NODE = 8
"""GPUs of one machine, at most: a slot is one Triton server on one machine."""
HOPPER = (9, 0)


def refusals(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    """All that is impossible about an engine section; nothing if it can be built."""
    yield from _version(engine)
    if engine.backend == "llmapi":
        yield from _mixed_with_llmapi(engine)
    else:
        yield from _family(engine)
        yield from _calibration(engine)
        yield from _plugins(engine)
    yield from _gpu(engine)
    yield from _parallelism(engine)
    yield from _limits(engine)


def refuse_impossible(engine: TensorRTLLMEngine) -> None:
    """Stops a step whose engine section is impossible.

    Raises:
        ToolchainError: the section asks for something impossible; all of it is named.
    """
    if found := [f"{'.'.join(place)}: {message}" for place, message in refusals(engine)]:
        raise ToolchainError(
            "The spec's engine section asks for what TensorRT-LLM cannot build or serve",
            found="; ".join(found),
            cure="correct the engine section and make a new release",
        )


def _version(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    container = known_container(engine.image)
    if (refusal := backend_refusal(engine.backend, engine.version)) is not None:
        yield ("version",), refusal
    elif container is not None and container.tensorrt_llm != engine.version:
        held = container.tensorrt_llm
        yield ("image",), f"holds TensorRT-LLM {held}, and version is {engine.version}"


def _mixed_with_llmapi(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    """The llmapi backend loads a Hugging Face checkpoint as it is: nothing is converted."""
    for name, value in {
        "family": engine.family,
        "calibration": engine.calibration,
        "plugins": engine.plugins,
        "max_queue_size": engine.max_queue_size,
    }.items():
        if value is not None:
            yield (
                (name,),
                "belongs to backend: engine; llmapi serves the checkpoint, nothing is built",
            )
    if engine.quantization != "none":
        yield (
            ("quantization",),
            "belongs to backend: engine; llmapi serves the checkpoint as it is, so import one "
            "that is quantised already",
        )
    # Nothing that model.yaml does not say may look as if it were obeyed.
    for place, value in {
        ("parallelism", "context"): engine.parallelism.context,
        ("parallelism", "expert"): engine.parallelism.expert,
        ("limits", "max_beam_width"): engine.limits.max_beam_width,
    }.items():
        if value > 1:
            yield place, "belongs to backend: engine; model.yaml of llmapi is not given it"
    if engine.kv_cache.dtype == "int8":
        yield ("kv_cache", "dtype"), "int8 needs an engine's scales; llmapi takes auto or fp8"


def _family(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    if engine.family is None:
        yield (
            ("family",),
            "is needed to choose convert_checkpoint.py; one of " + ", ".join(FAMILIES),
        )
        return
    family = FAMILIES[engine.family]
    ways = engine.parallelism
    if engine.quantization not in family.quantizations:
        yield (
            ("quantization",),
            f"TensorRT-LLM does not name {engine.quantization} for {engine.family}; it has "
            + ", ".join(sorted(family.quantizations)),
        )
    if engine.quantization != "none" and engine.dtype == "float32":
        yield ("dtype",), "quantised weights are multiplied with float16 or bfloat16 only"
    if ways.pipeline > 1 and not family.pipeline:
        yield ("parallelism", "pipeline"), f"TensorRT-LLM has none for {engine.family}"
    if ways.context > 1 and not family.context:
        yield ("parallelism", "context"), f"the script of {engine.family} has no --cp_size"
    if ways.expert > 1 and not family.experts:
        yield ("parallelism", "expert"), f"the script of {engine.family} has no --moe_ep_size"


def _calibration(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    calibration = engine.calibration
    if not needs_calibration(engine.quantization, engine.kv_cache.dtype):
        if calibration is not None:
            yield (
                ("calibration",),
                f"quantization {engine.quantization} with a KV cache of its own type needs none",
            )
        return
    if calibration is None:
        yield (
            ("calibration",),
            "is needed: scales are measured on data, and quantize.py would download its own",
        )
    elif (name := special_data_set(calibration.data)) is not None:
        yield (
            ("calibration", "data"),
            f"quantize.py takes a path with {name} in it for the public data set; rename it",
        )
    if engine.parallelism.expert > 1:
        yield (
            ("parallelism", "expert"),
            "quantize.py has no flag for it, and its checkpoint would silently have none",
        )


def _plugins(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    """As `tensorrt_llm/plugin/plugin.py` says of each, in its help and when it validates."""
    plugins = engine.built_with
    tensor = engine.parallelism.tensor
    for name, value in {
        "gemm": plugins.gemm == "fp8",
        "gemm_swiglu": plugins.gemm_swiglu,
        "low_latency_gemm": plugins.low_latency_gemm,
        "low_latency_gemm_swiglu": plugins.low_latency_gemm_swiglu,
        "user_buffer": plugins.user_buffer,
    }.items():
        if value and engine.quantization != "fp8":
            yield ("plugins", name), "computes in fp8 and needs quantization: fp8"
    if plugins.gemm == "nvfp4" and engine.quantization != "nvfp4":
        yield ("plugins", "gemm"), "computes in nvfp4 and needs quantization: nvfp4"
    if plugins.gemm_swiglu and GPUS[engine.gpu].compute_capability != HOPPER:
        yield ("plugins", "gemm_swiglu"), "is made for Hopper alone, compute capability 9.0"
    for name, value in {
        "low_latency_gemm": plugins.low_latency_gemm,
        "low_latency_gemm_swiglu": plugins.low_latency_gemm_swiglu,
    }.items():
        if value and GPUS[engine.gpu].compute_capability >= BLACKWELL:
            yield ("plugins", name), "is not supported on compute capability 10.0 and above"
    if plugins.user_buffer and not plugins.reduce_fusion:
        yield ("plugins", "user_buffer"), "needs reduce_fusion: true"
    if plugins.user_buffer and engine.family not in {None, "llama"}:
        yield ("plugins", "user_buffer"), "is made for llama alone"
    for name, value in {
        "reduce_fusion": plugins.reduce_fusion,
        "gemm_allreduce": plugins.gemm_allreduce is not None,
    }.items():
        if value and tensor == 1:
            yield ("plugins", name), "speeds up what GPUs exchange; parallelism.tensor is 1"


def _gpu(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    gpu = GPUS[engine.gpu]
    major, minor = gpu.compute_capability
    if not gpu.runs(engine.quantization):
        needed = ".".join(map(str, RECIPES[engine.quantization].capability))
        yield (
            ("quantization",),
            f"{engine.quantization} needs compute capability {needed}; {engine.gpu} has "
            f"{major}.{minor}",
        )
    if not gpu.caches(engine.kv_cache.dtype):
        yield (
            ("kv_cache", "dtype"),
            f"{engine.kv_cache.dtype} needs compute capability 8.9; {engine.gpu} has "
            f"{major}.{minor}",
        )


def _parallelism(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    ways = engine.parallelism
    if ways.tensor % ways.expert:
        yield (
            ("parallelism", "expert"),
            "must divide tensor: TensorRT-LLM asserts moe_tp_size * moe_ep_size == tp_size",
        )
    if ways.world_size > LARGEST_NODE:
        yield (
            ("parallelism",),
            f"{ways.world_size} GPUs are more than the {LARGEST_NODE} of one machine, on which "
            "a slot's Triton server runs",
        )


def _limits(engine: TensorRTLLMEngine) -> Iterator[Refusal]:
    limits = engine.limits
    if limits.max_input_len >= limits.max_seq_len:
        yield (
            ("limits", "max_seq_len"),
            f"{limits.max_seq_len} tokens leave no room for an answer after max_input_len "
            f"{limits.max_input_len}; it counts prompt and answer",
        )
    if limits.max_num_tokens < limits.max_input_len and not engine.chunked_context:
        yield (
            ("limits", "max_num_tokens"),
            f"{limits.max_num_tokens} is less than max_input_len {limits.max_input_len}: the "
            "longest prompt would fit into no step; raise it, or set chunked_context",
        )
    if limits.max_num_tokens < limits.max_batch_size * limits.max_beam_width:
        yield (
            ("limits", "max_num_tokens"),
            f"{limits.max_num_tokens} is less than max_batch_size * max_beam_width: a step makes "
            "one token for each",
        )
    if engine.chunked_context and not engine.paged_context:
        yield ("chunked_context",), "needs plugins.paged_context_attention"
    if engine.kv_cache.reuse and not engine.paged_context:
        yield ("kv_cache", "reuse"), "needs plugins.paged_context_attention"
