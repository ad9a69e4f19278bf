"""An engine directory as trtllm-build leaves it, without an engine that could run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def engine_config(
    *,
    tensor_parallel: int = 1,
    max_input_len: int = 1024,
    max_seq_len: int = 2048,
    max_batch_size: int = 64,
    logits_dtype: str = "float32",
    gather_context_logits: bool = False,
) -> dict[str, Any]:
    """`config.json`, with the documented keys that are read here."""
    return {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "logits_dtype": logits_dtype,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "mapping": {
                "world_size": tensor_parallel, "tp_size": tensor_parallel, "pp_size": 1,
                "cp_size": 1, "moe_tp_size": tensor_parallel, "moe_ep_size": 1,
            },
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        },
        "build_config": {
            "max_input_len": max_input_len,
            "max_seq_len": max_seq_len,
            "max_batch_size": max_batch_size,
            "max_beam_width": 1,
            "max_num_tokens": 8192,
            "gather_context_logits": gather_context_logits,
            "plugin_config": {"tokens_per_block": 32},
        },
    }  # fmt: skip


def write_engine(directory: Path, **config: Any) -> Path:
    """The directory with a file of each rank and the sidecar's name."""
    content = engine_config(**config)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "engine.json").write_text("{}", encoding="utf-8")
    for rank in range(content["pretrained_config"]["mapping"]["world_size"]):
        (directory / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
    return directory


def write_tokenizer(directory: Path, **tokenizer_config: Any) -> Path:
    """A checkpoint with a tokenizer; there are weights, which no engine's package needs."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory
