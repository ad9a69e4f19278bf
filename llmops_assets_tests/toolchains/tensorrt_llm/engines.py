"""Engine sections and checkpoints for tests, made short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmops_assets.spec import TensorRTLLMEngine

CALIBRATION: Mapping[str, Any] = {"data": "data/calibration"}
LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}
LLAMA_70B: Mapping[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def engine(**changes: Any) -> TensorRTLLMEngine:
    """A section for Llama on one H100, with these keys changed."""
    return TensorRTLLMEngine.model_validate(
        {"toolchain": "tensorrt_llm", "gpu": "h100-sxm", "family": "llama", **changes}
    )


def checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """A Hugging Face directory that has only its `config.json`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
