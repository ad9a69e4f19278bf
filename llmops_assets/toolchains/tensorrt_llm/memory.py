"""How much of a GPU's memory an engine takes, before a GPU minute is spent.

An estimate for the rank that takes most, from the checkpoint's `config.json`, meant to
refuse what cannot fit and not what may. Weights and KV cache follow from the shape.
Activations and what CUDA, cuBLAS and NCCL keep are assumptions, named below; what counts
in the end is the server's own report, which the package's checks read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.checkpoints import weight_files
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.quantizations import KEY_VALUE_BITS, RECIPES
from llmops_assets.toolchains.tensorrt_llm.shape import ModelShape

RUNTIME_BYTES = 10**9
"""Assumed of CUDA's context, its libraries and their workspaces, on each GPU."""
# `auto` is the checkpoint's type, and float16 for one in float32, as the scripts say.
BITS = {"auto": 16, "float32": 32, "float16": 16, "bfloat16": 16}
LOGIT_BYTES = 4
"""Logits are float32 by default."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the rank that takes most, and what they suffice for."""

    gpu: str
    memory: int
    """Of one GPU."""
    weights: int
    activations: int
    runtime: int
    key_value_per_token: int
    key_value_cache: int
    """What the cache may take: its fraction of what all else leaves; 0 if nothing is left."""
    max_seq_len: int

    @property
    def tokens(self) -> int:
        """That the KV cache holds, of all requests together."""
        return self.key_value_cache // self.key_value_per_token

    @property
    def longest_sequences(self) -> int:
        """Requests of `max_seq_len` tokens that can be under way at once."""
        return self.tokens // self.max_seq_len


def estimate(
    shape: ModelShape, engine: TensorRTLLMEngine, stored: int | None = None
) -> MemoryEstimate:
    """What the engine, or the checkpoint under the llmapi backend, takes of its GPU.

    Args:
        shape: the checkpoint's.
        engine: the spec's section.
        stored: bytes of the checkpoint's weights, `stored_bytes`: what is served where
            nothing is converted. None: from the shape.
    """
    gpu = GPUS[engine.gpu]
    weights = _weights(shape, engine)
    if engine.backend == "llmapi" and stored is not None:
        # What is replicated on each rank is within the accuracy of an estimate.
        weights = -(-stored // engine.parallelism.world_size)
    activations = _activations(shape, engine)
    free = max(0, gpu.memory - weights - activations - RUNTIME_BYTES)
    return MemoryEstimate(
        gpu=engine.gpu,
        memory=gpu.memory,
        weights=weights,
        activations=activations,
        runtime=RUNTIME_BYTES,
        key_value_per_token=_key_value_per_token(shape, engine),
        key_value_cache=int(free * engine.kv_cache.free_gpu_mem_fraction),
        max_seq_len=engine.limits.max_seq_len,
    )


def check_memory(found: MemoryEstimate, engine: TensorRTLLMEngine) -> None:
    """Checks that the weights fit, and a KV cache for one request of the greatest length.

    A cache for fewer than `max_batch_size` such requests is no error: others wait.

    Raises:
        ToolchainError: they do not, with the sizes.
    """
    taken = found.weights + found.activations + found.runtime
    if taken >= found.memory:
        raise ToolchainError(
            f"The model does not fit on {engine.parallelism.world_size} x {found.gpu}",
            expected=f"at most {_gigabytes(found.memory)} on each GPU",
            found=f"about {_gigabytes(found.weights)} of weights, {_gigabytes(found.activations)} "
            f"of activations and {_gigabytes(found.runtime)} of the runtime",
            cure="spread it over more GPUs, quantise it, or choose a GPU with more memory",
        )
    needed = found.max_seq_len * engine.limits.max_beam_width
    if found.tokens < needed:
        raise ToolchainError(
            f"The KV cache that {found.gpu} has room for is shorter than the longest request",
            expected=f"{needed} tokens, limits.max_seq_len for each beam",
            found=f"about {found.tokens} tokens in {_gigabytes(found.key_value_cache)}, at "
            f"{found.key_value_per_token} bytes a token",
            cure="lower limits.max_seq_len, quantise the KV cache, or spread the model over "
            "more GPUs",
        )


def stored_bytes(checkpoint: Path) -> int:
    """Bytes of a Hugging Face directory's weights that are loaded; see `weight_files`."""
    return sum(path.stat().st_size for path in weight_files(checkpoint))


def _weights(shape: ModelShape, engine: TensorRTLLMEngine) -> int:
    """Of the worst rank. Embedding and head keep the type of the activations; every rank of
    the first pipeline stage has the whole embedding, the head is split.
    """
    ways = engine.parallelism
    full = _activation_bits(engine)
    quantised = RECIPES[engine.quantization].bits or full
    layers = -(-shape.layers // ways.pipeline)
    # Where there are fewer key-value heads than ways, each way has one, repeated.
    repeated = max(0, ways.tensor - shape.key_value_heads)
    extra = 2 * shape.hidden * repeated * shape.head_size
    in_layers = layers * (shape.layer_parameters + extra) / ways.tensor * quantised
    embedding = shape.embedding_parameters * full
    head = embedding / ways.tensor
    outside = embedding + head if ways.pipeline == 1 else max(embedding, head)
    return int((in_layers + outside) / 8)


def _activations(shape: ModelShape, engine: TensorRTLLMEngine) -> int:
    """Assumed: for each token of a step the residual stream twice, queries, keys and values,
    and a layer's intermediate values; and float32 logits of every sequence.
    """
    ways, limits = engine.parallelism, engine.limits
    heads = (shape.heads + 2 * shape.key_value_heads) * shape.head_size
    width = 2 * shape.hidden + (heads + 2 * shape.intermediate) // ways.tensor
    in_flight = limits.max_num_tokens * width * _activation_bits(engine) // 8
    return (
        in_flight + limits.max_batch_size * limits.max_beam_width * shape.vocabulary * LOGIT_BYTES
    )


def _key_value_per_token(shape: ModelShape, engine: TensorRTLLMEngine) -> int:
    ways = engine.parallelism
    bits = KEY_VALUE_BITS[engine.kv_cache.dtype] or _activation_bits(engine)
    layers = -(-shape.layers // ways.pipeline)
    heads = -(-shape.key_value_heads // ways.tensor)
    return 2 * layers * heads * shape.head_size * bits // 8


def _activation_bits(engine: TensorRTLLMEngine) -> int:
    return BITS[engine.dtype]


def _gigabytes(size: int) -> str:
    return f"{size / 10**9:.1f} GB"
