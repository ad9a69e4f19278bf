"""`model.yaml` of Triton's `llmapi` model: what a build would otherwise fix.

It is frozen with the checkpoint into the engine artifact and packaged byte for byte, so it
names the checkpoint by the one path at which every server has it.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.combinations import refuse_impossible

PACKAGE_MOUNT = PurePosixPath("/opt/llmops/package")
"""Where a server has its package: the same path in staging, blue and green."""
CHECKPOINT = "checkpoint"
MODEL_YAML = "model.yaml"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LlmApiTritonConfig(_Frozen):
    """The part of `model.yaml` that goes to Triton."""

    max_batch_size: Literal[0] = Field(default=0, description="The model does not batch itself.")
    decoupled: Literal[True] = Field(default=True, description="Streaming needs it.")


class LlmApiKeyValueCache(_Frozen):
    """`tensorrt_llm.llmapi.KvCacheConfig`, as far as it is set."""

    dtype: Literal["auto", "fp8"] = "auto"
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0, lt=1)
    enable_block_reuse: bool = True
    tokens_per_block: int = Field(default=32, ge=1)


class LlmApiScheduler(_Frozen):
    """`tensorrt_llm.llmapi.SchedulerConfig`, as far as it is set."""

    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"] = (
        "GUARANTEED_NO_EVICT"
    )


class LlmApiModel(_Frozen):
    """The file: arguments of `tensorrt_llm.LLM`, and what Triton itself needs."""

    model: Literal["/opt/llmops/package/checkpoint"] = "/opt/llmops/package/checkpoint"
    backend: Literal["pytorch"] = "pytorch"
    dtype: str = "auto"
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    max_batch_size: int = Field(ge=1)
    max_num_tokens: int = Field(ge=1)
    max_seq_len: int = Field(ge=1)
    enable_chunked_prefill: bool = False
    kv_cache_config: LlmApiKeyValueCache = LlmApiKeyValueCache()
    scheduler_config: LlmApiScheduler = LlmApiScheduler()
    triton_config: LlmApiTritonConfig = LlmApiTritonConfig()

    @classmethod
    def of(cls, engine: TensorRTLLMEngine) -> LlmApiModel:
        """What a spec's engine section with backend llmapi says.

        Raises:
            ToolchainError: it asks for what `model.yaml` cannot say, or else is impossible.
        """
        refuse_impossible(engine)
        parallelism = engine.parallelism
        return cls(
            dtype=engine.dtype,
            tensor_parallel_size=parallelism.tensor,
            pipeline_parallel_size=parallelism.pipeline,
            max_batch_size=engine.limits.max_batch_size,
            max_num_tokens=engine.limits.max_num_tokens,
            max_seq_len=engine.limits.max_seq_len,
            enable_chunked_prefill=engine.chunked_context,
            kv_cache_config=LlmApiKeyValueCache(
                # int8 needs an engine's scales, and was refused.
                dtype="fp8" if engine.kv_cache.dtype == "fp8" else "auto",
                free_gpu_memory_fraction=engine.kv_cache.free_gpu_mem_fraction,
                enable_block_reuse=engine.kv_cache.reuse,
                tokens_per_block=engine.kv_cache.tokens_per_block,
            ),
            scheduler_config=LlmApiScheduler(
                capacity_scheduler_policy="MAX_UTILIZATION"
                if engine.scheduler == "max_utilization"
                else "GUARANTEED_NO_EVICT"
            ),
        )

    def as_yaml(self) -> str:
        """The file's text; equal settings give equal bytes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=True)


def read_llmapi_model(path: Path) -> LlmApiModel:
    """Reads a frozen `model.yaml`.

    Raises:
        ToolchainError: it does not exist or is not one that `LlmApiModel.as_yaml` writes.
    """
    try:
        return LlmApiModel.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise ToolchainError(
            f"{path} is not a frozen model.yaml",
            expected="what LlmApiModel.as_yaml writes",
            found=error,
            cure="materialize the engine again",
        ) from error
