"""What fits on a GPU, told from `config.json` before one is rented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.memory import check_memory, estimate, stored_bytes
from llmops_assets.toolchains.tensorrt_llm.shape import check_shape, read_shape
from llmops_assets_tests.toolchains.tensorrt_llm.engines import (
    CALIBRATION,
    LLAMA_8B,
    LLAMA_70B,
    checkpoint,
    engine,
)

FP8: Mapping[str, Any] = {"quantization": "fp8", "calibration": CALIBRATION}
MIXTRAL: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_scaling": None,
}
GPT_2: Mapping[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
FALCON_7B: Mapping[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "new_decoder_architecture": False,
    "vocab_size": 65024,
}
GEMMA_2_9B: Mapping[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}
QWEN_MOE: Mapping[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("config", "published", "tied"),
    [
        (LLAMA_8B, 8.03e9, 0),
        (LLAMA_70B, 70.6e9, 0),
        (MIXTRAL, 46.7e9, 0),
        (QWEN_MOE, 14.3e9, 0),
        # Their embedding is also their head; an engine holds both.
        (GPT_2, 124e6, 50257 * 768),
        (FALCON_7B, 6.92e9, 65024 * 4544),
        (GEMMA_2_9B, 9.24e9, 256000 * 3584),
    ],
)
def test_parameters_are_those_published(
    config: Mapping[str, Any], published: float, tied: int, tmp_path: Path
) -> None:
    """The sizes that the models' makers publish check the reading of each kind of config."""
    shape = read_shape(checkpoint(tmp_path, config))
    assert shape.parameters - tied == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("section", "config", "weights"),
    [
        # 6.98 billion parameters in layers, 525 million each in embedding and head.
        ({}, LLAMA_8B, 16.06e9),
        ({"dtype": "float32"}, LLAMA_8B, 32.1e9),
        (FP8, LLAMA_8B, 9.08e9),
        ({"quantization": "int8"}, LLAMA_8B, 9.08e9),
        ({"quantization": "int4"}, LLAMA_8B, 5.59e9),
        ({**FP8, "quantization": "int4_awq"}, LLAMA_8B, 5.70e9),
        ({**FP8, "quantization": "nvfp4", "gpu": "b200"}, LLAMA_8B, 6.03e9),
        # Of each rank: layers and head are split, the embedding is not.
        ({"parallelism": {"tensor": 2}}, LLAMA_8B, 8.56e9),
        ({**FP8, "parallelism": {"tensor": 4}}, LLAMA_70B, 19.74e9),
        # Stages: the first has the embedding, the last the head.
        ({"parallelism": {"pipeline": 2}}, LLAMA_8B, 8.03e9),
        # 16 ways, 8 key-value heads: each is held twice.
        ({"parallelism": {"tensor": 16}}, LLAMA_8B, 2.022e9),
    ],
)
def test_weights_of_a_rank(
    section: Mapping[str, Any], config: Mapping[str, Any], weights: float, tmp_path: Path
) -> None:
    """Calculated by hand from published shapes, in bytes."""
    found = estimate(read_shape(checkpoint(tmp_path, config)), engine(**section))
    assert found.weights == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize(
    ("section", "bytes_per_token"),
    [
        # Keys and values of 32 layers, 8 heads of 128, 2 bytes.
        ({}, 2 * 32 * 8 * 128 * 2),
        ({"dtype": "float32"}, 2 * 32 * 8 * 128 * 4),
        ({**FP8, "kv_cache": {"dtype": "fp8"}}, 2 * 32 * 8 * 128),
        ({**FP8, "kv_cache": {"dtype": "int8"}}, 2 * 32 * 8 * 128),
        ({"parallelism": {"tensor": 4}}, 2 * 32 * 2 * 128 * 2),
        ({"parallelism": {"pipeline": 2}}, 2 * 16 * 8 * 128 * 2),
        ({"parallelism": {"tensor": 16}}, 2 * 32 * 1 * 128 * 2),
    ],
)
def test_key_value_cache_of_a_token(
    section: Mapping[str, Any], bytes_per_token: int, tmp_path: Path
) -> None:
    """It decides how many requests are under way at once."""
    found = estimate(read_shape(checkpoint(tmp_path, LLAMA_8B)), engine(**section))
    assert found.key_value_per_token == bytes_per_token


def test_the_cache_takes_its_fraction_of_what_is_left(tmp_path: Path) -> None:
    """TensorRT-LLM takes it of the memory that is free once all else is loaded."""
    shape = read_shape(checkpoint(tmp_path, LLAMA_8B))
    half = estimate(shape, engine(kv_cache={"free_gpu_mem_fraction": 0.5}))
    left = half.memory - half.weights - half.activations - half.runtime
    assert half.memory == 80 * 10**9
    assert half.key_value_cache == left // 2
    assert half.tokens == half.key_value_cache // half.key_value_per_token
    assert half.longest_sequences == half.tokens // 2048
    # An 8B model leaves most of an H100 to its cache.
    assert half.longest_sequences > 64


def test_activations_grow_with_what_is_under_way(tmp_path: Path) -> None:
    """A larger step leaves less for the cache."""
    shape = read_shape(checkpoint(tmp_path, LLAMA_8B))
    small = estimate(shape, engine())
    large = estimate(shape, engine(limits={"max_num_tokens": 65536}))
    assert large.activations > 4 * small.activations
    assert large.key_value_cache < small.key_value_cache


@pytest.mark.parametrize(
    ("section", "config", "message"),
    [
        ({}, LLAMA_70B, "does not fit on 1 x h100-sxm"),
        ({"gpu": "l4", "parallelism": {"tensor": 4}}, LLAMA_70B, "does not fit on 4 x l4"),
        ({"gpu": "a100-40gb"}, MIXTRAL, "does not fit on 1 x a100-40gb"),
        # The weights fit, and what is left is no cache for one request.
        (
            {"gpu": "l4", "limits": {"max_seq_len": 131072, "max_num_tokens": 4096}},
            LLAMA_8B,
            "shorter than the longest request",
        ),
        (
            {
                "gpu": "l4",
                "limits": {"max_seq_len": 16384, "max_num_tokens": 4096, "max_beam_width": 4},
            },
            LLAMA_8B,
            "65536 tokens, limits.max_seq_len for each beam",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    section: Mapping[str, Any], config: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    """Otherwise it is found after converting and building, when the server loads."""
    wanted = engine(**section)
    with pytest.raises(ToolchainError, match=message):
        check_memory(estimate(read_shape(checkpoint(tmp_path, config)), wanted), wanted)


@pytest.mark.parametrize(
    ("section", "config"),
    [
        (FP8, LLAMA_8B),
        ({"gpu": "l4", "limits": {"max_num_tokens": 4096}}, LLAMA_8B),
        ({**FP8, "parallelism": {"tensor": 4}}, LLAMA_70B),
        ({"parallelism": {"tensor": 4}}, LLAMA_70B),
        ({**FP8, "quantization": "int4_awq"}, LLAMA_70B),
        ({"parallelism": {"tensor": 2, "expert": 2}}, MIXTRAL),
    ],
)
def test_what_is_known_to_fit_is_not_refused(
    section: Mapping[str, Any], config: Mapping[str, Any], tmp_path: Path
) -> None:
    """Sizes that people serve on such cards."""
    wanted = engine(**section)
    shape = read_shape(checkpoint(tmp_path, config))
    check_shape(shape, wanted)
    check_memory(estimate(shape, wanted), wanted)


def test_llmapi_takes_the_bytes_that_are_stored(tmp_path: Path) -> None:
    """A checkpoint that is quantised already is smaller than its shape says."""
    folder = checkpoint(tmp_path, LLAMA_8B)
    (folder / "model-1.safetensors").write_bytes(bytes(3000))
    (folder / "model-2.safetensors").write_bytes(bytes(1001))
    (folder / "training.bin").write_bytes(bytes(9))
    # The same weights once more: what nothing loads takes no memory.
    (folder / "consolidated.safetensors").write_bytes(bytes(4001))
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert stored_bytes(folder) == 4001
    section = engine(backend="llmapi", family=None, parallelism={"tensor": 2})
    assert estimate(read_shape(folder), section, stored_bytes(folder)).weights == 2001
    # An engine's weights are those that its build quantises.
    assert estimate(read_shape(folder), engine(), stored_bytes(folder)).weights > 10**9


@pytest.mark.parametrize(
    ("section", "config", "message"),
    [
        ({"family": "qwen"}, LLAMA_8B, "LlamaForCausalLM, and the script of qwen converts QWen"),
        ({"parallelism": {"tensor": 3}}, LLAMA_8B, "32 attention heads cannot be split 3 ways"),
        (
            {"parallelism": {"tensor": 4}},
            {**LLAMA_8B, "num_key_value_heads": 6},
            "6 key-value heads can be neither split nor repeated 4 ways",
        ),
        (
            {"parallelism": {"pipeline": 8}},
            {**LLAMA_8B, "num_hidden_layers": 4},
            "4 layers cannot be dealt out 8 ways",
        ),
        ({"parallelism": {"tensor": 2, "expert": 2}}, LLAMA_8B, "1 experts cannot be dealt out"),
        (
            {**FP8, "quantization": "int8_smoothquant"},
            MIXTRAL,
            "no SmoothQuant for Mixtral",
        ),
        (
            {"family": "gemma", "limits": {"max_seq_len": 8193}},
            GEMMA_2_9B,
            "the model knows 8192 positions",
        ),
        ({"family": "gpt", "limits": {"max_seq_len": 2048}}, GPT_2, "knows 1024 positions"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_section(
    section: Mapping[str, Any], config: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    """A spec cannot know them: the checkpoint is looked at before it is converted."""
    with pytest.raises(ToolchainError, match=message):
        check_shape(read_shape(checkpoint(tmp_path, config)), engine(**section))


def test_scaled_positions_are_not_judged(tmp_path: Path) -> None:
    """What a rotary scaling reaches is the model's matter; a plain one is a limit."""
    section = engine(limits={"max_seq_len": 200_000})
    check_shape(read_shape(checkpoint(tmp_path, LLAMA_8B)), section)
    plain = {**LLAMA_8B, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}
    with pytest.raises(ToolchainError, match="131072 positions"):
        check_shape(read_shape(checkpoint(tmp_path, plain)), section)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA_8B, "architectures": []}, "one entry in architectures"),
        ({key: LLAMA_8B[key] for key in LLAMA_8B if key != "hidden_size"}, "hidden_size or n_embd"),
        ({**LLAMA_8B, "num_hidden_layers": "many"}, "num_hidden_layers or n_layer"),
        ({**LLAMA_8B, "vocab_size": -1}, "a positive number vocab_size"),
        ({**MIXTRAL, "num_local_experts": True}, "num_local_experts or num_experts"),
    ],
)
def test_configs_that_describe_no_decoder(
    config: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    """An estimate from a guess would refuse or promise at random."""
    with pytest.raises(ToolchainError, match=message):
        read_shape(checkpoint(tmp_path, config))


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    """No checkpoint, or the wrong file under its name."""
    with pytest.raises(ToolchainError, match="cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ToolchainError, match="cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ToolchainError, match="a JSON object"):
        read_shape(tmp_path)
