"""Specs for tests, made short."""

from __future__ import annotations

from llmops_assets_tests.release_rig import SPEC

LIMITS = "{max_batch_size: 8, max_input_len: 128, max_seq_len: 256}"
BACKENDS = {"engine": "family: llama", "llmapi": "backend: llmapi"}


def spec_text(backend: str, tensor: int = 1, more: str = "dtype: auto") -> str:
    """The rig's spec with an engine section for H100."""
    section = (
        f"{{toolchain: tensorrt_llm, gpu: h100-sxm, {BACKENDS[backend]}, limits: {LIMITS}, "
        f"parallelism: {{tensor: {tensor}}}, {more}}}"
    )
    return SPEC.replace("{toolchain: onnxruntime_genai}", section)
