"""Every refusal of an engine section, at its place and with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from llmops_assets.errors import SpecError, ToolchainError
from llmops_assets.spec import parse_spec
from llmops_assets.toolchains.tensorrt_llm.combinations import refusals, refuse_impossible
from llmops_assets_tests.test_spec import VALID
from llmops_assets_tests.toolchains.tensorrt_llm.engines import CALIBRATION, engine

FP8: Mapping[str, Any] = {"quantization": "fp8", "calibration": CALIBRATION}
LLMAPI: Mapping[str, Any] = {"backend": "llmapi", "family": None}
TRITON = "nvcr.io/nvidia/tritonserver:{}-trtllm-python-py3"
OWN = "registry.local/triton-of-ours:7"


def plugins(**given: Any) -> dict[str, Any]:
    return {"plugins": given}


def ways(**given: int) -> dict[str, Any]:
    return {"parallelism": given}


def limits(**given: int) -> dict[str, Any]:
    return {"limits": given}


@pytest.mark.parametrize(
    ("section", "place", "reason"),
    [
        ({"version": "1.3.0"}, "version", "from 1.3 on NVIDIA removed"),
        ({"version": "1.3.0rc15"}, "version", "from 1.3 on NVIDIA removed"),
        ({"version": "1.4.0rc1"}, "version", "from 1.3 on NVIDIA removed"),
        ({"version": "0.21.0"}, "version", "below 1.0"),
        ({**LLMAPI, "version": "0.21.0"}, "version", "below 1.0"),
        ({"version": "1.1.0"}, "image", "holds TensorRT-LLM 1.2.1, and version is 1.1.0"),
        (
            {"image": f"registry.local/{TRITON.format('25.12')}"},
            "image",
            "holds TensorRT-LLM 1.1.0",
        ),
        (
            {**LLMAPI, "image": f"{TRITON.format('26.03')}@sha256:{'0' * 64}"},
            "image",
            "holds TensorRT-LLM 1.2.0",
        ),
        # What belongs to the other backend.
        ({"backend": "llmapi"}, "family", "nothing is built"),
        ({**LLMAPI, **plugins(gemm="auto")}, "plugins", "nothing is built"),
        ({**LLMAPI, "calibration": CALIBRATION}, "calibration", "nothing is built"),
        ({**LLMAPI, "quantization": "fp8"}, "quantization", "quantised already"),
        ({**LLMAPI, "kv_cache": {"dtype": "int8"}}, "kv_cache.dtype", "auto or fp8"),
        ({**LLMAPI, **ways(tensor=2, context=2)}, "parallelism.context", "is not given it"),
        ({**LLMAPI, **ways(tensor=2, expert=2)}, "parallelism.expert", "is not given it"),
        ({**LLMAPI, **limits(max_beam_width=2)}, "limits.max_beam_width", "is not given it"),
        ({"family": None}, "family", "is needed to choose convert_checkpoint.py"),
        # What TensorRT-LLM does not name for a family.
        ({**FP8, "family": "commandr"}, "quantization", "does not name fp8 for commandr"),
        (
            {**FP8, "quantization": "nvfp4", "gpu": "b200", "family": "qwen"},
            "quantization",
            "does not name nvfp4 for qwen",
        ),
        ({**FP8, "quantization": "int4_awq", "family": "gpt"}, "quantization", "int4_awq for gpt"),
        (
            {**FP8, "quantization": "int8_smoothquant", "family": "falcon"},
            "quantization",
            "does not name int8_smoothquant for falcon",
        ),
        ({"family": "gemma", **ways(pipeline=2)}, "parallelism.pipeline", "none for gemma"),
        ({"family": "phi", **ways(pipeline=2)}, "parallelism.pipeline", "none for phi"),
        ({"family": "gpt", **ways(context=2)}, "parallelism.context", "no --cp_size"),
        ({"family": "falcon", **ways(tensor=2, expert=2)}, "parallelism.expert", "no --moe_ep"),
        ({**FP8, "dtype": "float32"}, "dtype", "float16 or bfloat16 only"),
        ({"quantization": "int4", "dtype": "float32"}, "dtype", "float16 or bfloat16 only"),
        # Calibration: of local data, and only where something is measured.
        ({"quantization": "fp8"}, "calibration", "is needed"),
        ({"quantization": "int4_awq"}, "calibration", "is needed"),
        ({"kv_cache": {"dtype": "fp8"}}, "calibration", "is needed"),
        ({"quantization": "int8", "kv_cache": {"dtype": "int8"}}, "calibration", "is needed"),
        ({"calibration": CALIBRATION}, "calibration", "needs none"),
        ({"quantization": "int8", "calibration": CALIBRATION}, "calibration", "needs none"),
        (
            {**FP8, "calibration": {"data": "data/cnn_dailymail"}},
            "calibration.data",
            "public data set",
        ),
        ({**FP8, **ways(tensor=2, expert=2)}, "parallelism.expert", "silently have none"),
        # What the GPU cannot do.
        ({**FP8, "gpu": "a100-80gb"}, "quantization", "8.9; a100-80gb has 8.0"),
        ({**FP8, "gpu": "a10", "quantization": "w4a8_awq"}, "quantization", "8.9; a10 has 8.6"),
        ({**FP8, "quantization": "nvfp4"}, "quantization", "10.0; h100-sxm has 9.0"),
        ({**FP8, "quantization": "nvfp4", "gpu": "l40s"}, "quantization", "10.0; l40s has 8.9"),
        (
            {"gpu": "a40", "calibration": CALIBRATION, "kv_cache": {"dtype": "fp8"}},
            "kv_cache.dtype",
            "fp8 needs compute capability 8.9; a40 has 8.6",
        ),
        (
            {**LLMAPI, "gpu": "a30", "kv_cache": {"dtype": "fp8"}},
            "kv_cache.dtype",
            "a30 has 8.0",
        ),
        # Plugins that belong to one type or one architecture.
        (plugins(gemm="fp8"), "plugins.gemm", "needs quantization: fp8"),
        ({**FP8, **plugins(gemm="nvfp4")}, "plugins.gemm", "needs quantization: nvfp4"),
        (plugins(gemm_swiglu=True), "plugins.gemm_swiglu", "needs quantization: fp8"),
        ({**FP8, **plugins(gemm_swiglu=True), "gpu": "l40s"}, "plugins.gemm_swiglu", "Hopper"),
        ({**FP8, **plugins(gemm_swiglu=True), "gpu": "b200"}, "plugins.gemm_swiglu", "Hopper"),
        (plugins(low_latency_gemm=True), "plugins.low_latency_gemm", "needs quantization: fp8"),
        (
            {**FP8, **plugins(low_latency_gemm=True), "gpu": "b200"},
            "plugins.low_latency_gemm",
            "not supported on compute capability 10.0",
        ),
        (
            plugins(low_latency_gemm_swiglu=True),
            "plugins.low_latency_gemm_swiglu",
            "needs quantization: fp8",
        ),
        (
            {**FP8, **plugins(low_latency_gemm_swiglu=True), "gpu": "b300"},
            "plugins.low_latency_gemm_swiglu",
            "not supported on compute capability 10.0",
        ),
        (
            {**ways(tensor=2), **plugins(user_buffer=True, reduce_fusion=True)},
            "plugins.user_buffer",
            "needs quantization: fp8",
        ),
        (
            {**FP8, **ways(tensor=2), **plugins(user_buffer=True)},
            "plugins.user_buffer",
            "needs reduce_fusion",
        ),
        (
            {
                **FP8,
                **ways(tensor=2),
                **plugins(user_buffer=True, reduce_fusion=True),
                "family": "qwen",
            },
            "plugins.user_buffer",
            "for llama alone",
        ),
        (plugins(reduce_fusion=True), "plugins.reduce_fusion", "parallelism.tensor is 1"),
        (plugins(gemm_allreduce="float16"), "plugins.gemm_allreduce", "parallelism.tensor is 1"),
        # Ranks.
        (ways(tensor=4, expert=3), "parallelism.expert", "moe_tp_size * moe_ep_size == tp_size"),
        (ways(tensor=8, pipeline=2), "parallelism", "16 GPUs are more than the 8"),
        ({**LLMAPI, **ways(tensor=16)}, "parallelism", "16 GPUs are more than the 8"),
        # Shapes.
        (limits(max_input_len=2048), "limits.max_seq_len", "no room for an answer"),
        (limits(max_num_tokens=512), "limits.max_num_tokens", "fit into no step"),
        (
            {"chunked_context": True, **limits(max_num_tokens=32)},
            "limits.max_num_tokens",
            "less than max_batch_size * max_beam_width",
        ),
        (
            limits(max_num_tokens=1024, max_batch_size=512, max_beam_width=4),
            "limits.max_num_tokens",
            "less than max_batch_size * max_beam_width",
        ),
        (
            {
                "chunked_context": True,
                "kv_cache": {"reuse": False},
                **plugins(paged_context_attention=False),
            },
            "chunked_context",
            "needs plugins.paged_context_attention",
        ),
        (
            plugins(paged_context_attention=False),
            "kv_cache.reuse",
            "needs plugins.paged_context_attention",
        ),
    ],
)
def test_refused(section: Mapping[str, Any], place: str, reason: str) -> None:
    """One reason alone, at its place: a section is not refused for something else as well."""
    ((found, message),) = refusals(engine(**section))
    assert ".".join(found) == place
    assert reason in message
    with pytest.raises(ToolchainError) as caught:
        refuse_impossible(engine(**section))
    assert caught.value.found == f"{place}: {message}"


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"version": "1.0.0", "image": TRITON.format("25.09")},
        {"version": "1.2.1", "image": TRITON.format("26.04")},
        # What is in an image of one's own is asked when it runs.
        {"version": "1.2.1.post1", "image": OWN},
        FP8,
        {**LLMAPI, "version": "1.3.0rc29", "image": OWN},
        {
            **LLMAPI,
            **ways(tensor=8),
            "version": "1.4.0rc1",
            "image": OWN,
            "chunked_context": True,
        },
        {**LLMAPI, "kv_cache": {"dtype": "fp8"}},
        {**ways(tensor=4, expert=4)},
        {"chunked_context": True, **limits(max_num_tokens=512)},
        {**plugins(paged_context_attention=False), "kv_cache": {"reuse": False}},
        {**FP8, **ways(tensor=2), **plugins(user_buffer=True, reduce_fusion=True)},
    ],
)
def test_possible(section: Mapping[str, Any]) -> None:
    """A rule that refuses too much keeps a team from building at all."""
    assert list(refusals(engine(**section))) == []
    refuse_impossible(engine(**section))


def test_all_reasons_are_named_at_once() -> None:
    """Each attempt is a release; mending one reason to see the next costs several."""
    section = engine(version="1.3.0", gpu="a100-40gb", quantization="fp8")
    with pytest.raises(ToolchainError) as caught:
        refuse_impossible(section)
    for place in ("version: ", "calibration: ", "quantization: "):
        assert place in str(caught.value.found)


ENGINE = """\
engine:
  toolchain: tensorrt_llm
  gpu: h100-sxm
  family: llama
"""
SPEC = VALID.replace("engine:\n  toolchain: onnxruntime_genai\n", ENGINE)


@pytest.mark.parametrize(
    ("right", "wrong", "line_with", "message"),
    [
        # Refusals of combinations.
        ("llama", "llama\n  version: 1.3.0", "version", "engine.version: from 1.3 on"),
        (
            "llama",
            "llama\n  parallelism:\n    tensor: 4\n    expert: 3",
            "expert",
            "engine.parallelism.expert: must divide tensor",
        ),
        ("llama", "llama\n  quantization: fp8", "engine:", "engine.calibration: is needed"),
        # Mistakes of a value: Pydantic puts the toolchain between.
        ("llama", "lama", "family", "engine.tensorrt_llm.family: Input should be 'llama'"),
        ("h100-sxm", "h100", "gpu", "engine.tensorrt_llm.gpu: Input should be 'a100-40gb'"),
        ("llama", "llama\n  precision: int8", "precision", "Extra inputs are not permitted"),
        ("llama", "llama\n  version: 1.2", "version", "valid string"),
        ("llama", "llama\n  version: latest", "version", "match pattern"),
        ("llama", "llama\n  image: tritonserver", "image", "match pattern"),
        ("llama", "llama\n  kv_cache: {tokens_per_block: 24}", "kv_cache", "tokens_per_block"),
        ("  toolchain: tensorrt_llm", "  toolchain: vllm", "engine", "'onnxruntime_genai', 'tens"),
        # The constraints of the use case, which the engine must be able to hold.
        (
            "max_input_tokens: 64",
            "max_input_tokens: 1025",
            "max_input_tokens",
            "more than engine.limits.max_input_len, 1024",
        ),
        (
            "max_output_tokens: 12",
            "max_output_tokens: 2000",
            "max_output_tokens",
            "requests of 2064 tokens; engine.limits.max_seq_len is 2048",
        ),
    ],
)
def test_a_spec_names_the_line(right: str, wrong: str, line_with: str, message: str) -> None:
    """`llmops spec validate` finds it before a release is made, and where to mend it."""
    assert parse_spec(SPEC, "t").engine.toolchain == "tensorrt_llm"
    text = SPEC.replace(right, wrong)
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "t")
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if line_with in row)
    assert str(caught.value.found).startswith(f"line {line}: ")
    assert message in str(caught.value.found)


def test_another_toolchains_keys_are_refused() -> None:
    """A spec that changes the toolchain and keeps its precision would silently lose it."""
    content = yaml.safe_load(SPEC)
    content["engine"] = {"toolchain": "onnxruntime_genai", "quantization": "fp8"}
    with pytest.raises(SpecError, match=r"engine\.onnxruntime_genai\.quantization: Extra"):
        parse_spec(yaml.safe_dump(content), "t")
