"""Writes a small Llama with random weights; run by the image's Python, which has PyTorch.

Heads are of 64, which TensorRT-LLM's kernels have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmops_assets.develop.tokenizer import build_tokenizer, save_tokenizer


def write_llama(directory: Path) -> None:
    """The Hugging Face directory, in bfloat16."""
    tokenizer = build_tokenizer([])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    save_tokenizer(tokenizer, directory, 512)


if __name__ == "__main__":
    write_llama(Path(sys.argv[1]))
