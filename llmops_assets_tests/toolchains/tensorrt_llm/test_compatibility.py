"""What may not be deployed where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.compatibility import (
    BuiltEngine,
    KeyValueCache,
    Node,
    check_engine,
    check_key_value_cache,
    check_memory_released,
    read_key_value_cache,
)
from llmops_assets.toolchains.tensorrt_llm.nvml import GPUFacts
from llmops_assets.toolchains.tensorrt_llm.outputs import EngineConfig
from llmops_assets.toolchains.tensorrt_llm.sidecar import Cost, Sidecar, Target, Toolkit

from .built_engine import engine_config

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


def container(release: str) -> str:
    return f"nvcr.io/nvidia/tritonserver:{release}-trtllm-python-py3"


ENGINE = BuiltEngine(
    tensorrt_llm="1.2.1",
    tensorrt="10.14.1.48",
    architecture="sm_90",
    image_digest=DIGEST,
    world_size=2,
)
NODE = Node(container("26.04"), DIGEST, "1.2.1", "10.14.1.48", "sm_90", gpus=2)


def sidecar() -> Sidecar:
    gpu = GPUFacts(
        name="NVIDIA H100 80GB HBM3", compute_capability="9.0", count=2, memory_bytes=1,
        driver="580.1", cuda="13.0",
    )  # fmt: skip
    return Sidecar(
        toolkit=Toolkit(tensorrt_llm="1.2.1", tensorrt="10.14.1.48", image_digest=DIGEST),
        target=Target(architecture=gpu.architecture, gpu=gpu),
        parameters={},
        commands=(),
        sources={"checkpoint": DIGEST},
        cost=Cost.of(1, 2, None),
        files={"rank0.engine": 1},
    )


def test_engine_is_read_from_its_own_files() -> None:
    """config.json lacks TensorRT and the GPU, the sidecar the ranks: both are needed."""
    config = EngineConfig.model_validate(engine_config(tensor_parallel=2, max_seq_len=4096))
    assert BuiltEngine.of(config, sidecar()) == ENGINE


def section(**changes: Any) -> TensorRTLLMEngine:
    content = {
        "toolchain": "tensorrt_llm", "gpu": "h100-sxm", "family": "llama",
        "parallelism": {"tensor": 2}, "image": container("26.04"),
    }  # fmt: skip
    return TensorRTLLMEngine.model_validate(content | changes)


def test_servers_are_as_the_spec_says() -> None:
    """The gate judges by data, on whatever machine: a digest counts where the spec pins one,
    and what is in an image of one's own is not known but for the version that the spec names.
    """
    assert Node.of(section()) == replace(NODE, image_digest=None)
    assert Node.of(section(image=f"{container('26.04')}@{DIGEST}")) == NODE
    own = Node.of(section(image="registry/triton:mine"))
    assert (own.tensorrt_llm, own.tensorrt) == ("1.2.1", None)
    check_engine(ENGINE, own)
    check_engine(ENGINE, Node.of(section()))
    with pytest.raises(ToolchainError, match="another image"):
        check_engine(ENGINE, Node.of(section(image=f"{container('26.04')}@{OTHER}")))


def test_engine_runs_where_it_was_built_for() -> None:
    """The refusals below must not refuse everything."""
    check_engine(ENGINE, NODE)


@pytest.mark.parametrize(
    ("engine", "node", "problem"),
    [
        # tensorrtllm_backend#194, #424, #531, TensorRT-LLM#1695, #1038, #1838
        ({"tensorrt_llm": "1.2.0"}, {}, r"another TensorRT-LLM .*Expected: TensorRT-LLM 1\.2\.1"),
        ({"tensorrt": "10.13.3.9"}, {}, r"another TensorRT than .*10\.14\.1\.48"),
        ({"tensorrt": None}, {}, "another TensorRT than"),
        ({}, {"tensorrt_llm": "1.2.0"}, "another TensorRT-LLM"),
        ({}, {"image_digest": OTHER}, "another image"),
        ({}, {"tensorrt_llm": "0.21.0"}, "0.21.0"),
        # TensorRT-LLM#222, #3031
        ({}, {"architecture": "sm_89"}, "built for other GPUs"),
        # TensorRT-LLM#753
        ({}, {"gpus": 1}, "another number of GPUs"),
        ({}, {"gpus": 4}, "another number of GPUs"),
        ({"world_size": 1}, {}, "another number of GPUs"),
    ],
)
def test_engine_is_refused(engine: dict[str, Any], node: dict[str, Any], problem: str) -> None:
    """Each fails in TensorRT-LLM only when the engine loads, minutes into a deployment."""
    with pytest.raises(ToolchainError, match=problem):
        check_engine(replace(ENGINE, **engine), replace(NODE, **node))


def test_key_value_cache_of_exactly_the_longest_sequence_suffices() -> None:
    """TensorRT-LLM starts with that; refusing it would waste memory."""
    check_key_value_cache(KeyValueCache(blocks=128, tokens_per_block=32), 4096)


@pytest.mark.parametrize("blocks", [127, 0])  # tensorrtllm_backend#366, #168, TensorRT-LLM#494
def test_key_value_cache_that_is_too_small_is_refused(blocks: int) -> None:
    """A server with too small a cache answers short prompts and fails the first long one."""
    with pytest.raises(ToolchainError, match="KV cache is too small"):
        check_key_value_cache(KeyValueCache(blocks, 32), 4096)


METRICS = """\
# HELP nv_trt_llm_kv_cache_block_metrics TRT LLM KV cache block metrics
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 32
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 1500
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="other",version="1"} 7
"""  # noqa: E501


def test_key_value_cache_of_a_running_server_is_read() -> None:
    """What an estimate promised counts less than what the server found free."""
    assert read_key_value_cache(METRICS, "tensorrt_llm") == KeyValueCache(1500, 32)


@pytest.mark.parametrize(("text", "model"), [("", "tensorrt_llm"), (METRICS, "other")])
def test_server_that_says_nothing_of_its_cache_is_refused(text: str, model: str) -> None:
    """No answer must not count as enough."""
    with pytest.raises(ToolchainError, match="says nothing of the KV cache"):
        read_key_value_cache(text, model)


def test_memory_that_an_ended_server_holds_is_found() -> None:
    """tensorrtllm_backend#48, server#8969: the next engine would find too little."""
    check_memory_released(before=2**30, after=2**30 + 2**28)
    with pytest.raises(ToolchainError, match="still held"):
        check_memory_released(before=2**30, after=2**30 + 2**28 + 1)
