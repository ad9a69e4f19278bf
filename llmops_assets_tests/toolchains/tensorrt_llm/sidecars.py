"""A sidecar for an engine that the doubles built."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from llmops_assets.toolchains.tensorrt_llm.nvml import GPUFacts
from llmops_assets.toolchains.tensorrt_llm.sidecar import Cost, Sidecar, Toolkit, write_sidecar

H100 = GPUFacts(
    name="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    count=2,
    memory_bytes=85520809984,
    driver="580.159.04",
    cuda="13.0",
)
TOOLKIT = Toolkit(
    tensorrt_llm="1.2.1", tensorrt="10.14.1.48", image_digest="sha256:" + "a" * 64, cuda="13.0.2"
)
SOURCES = {"checkpoint": "sha256:" + "1" * 64, "converted_weights": "sha256:" + "2" * 64}


def write(directory: Path) -> Sidecar:
    """Makes a directory an engine of two ranks."""
    return write_sidecar(
        directory,
        toolkit=TOOLKIT,
        gpu=H100,
        parameters={"max_batch_size": 8},
        commands=[["trtllm-build", "--max_batch_size", "8"]],
        sources=SOURCES,
        cost=Cost.of(600.0, 2, Decimal("2.50")),
    )
