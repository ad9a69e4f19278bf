"""The GPUs that an engine can be built for: compute capability, memory, what they run.

Data from NVIDIA's data sheets and its list of compute capabilities
(https://developer.nvidia.com/cuda-gpus). An engine runs only on the compute capability it
was built on, and no flag of `trtllm-build` chooses another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmops_assets.toolchains.tensorrt_llm.quantizations import (
    KEY_VALUE_CAPABILITY,
    RECIPES,
    Capability,
    KeyValueType,
    Quantization,
)

GPUName = Literal[
    "a100-40gb", "a100-80gb", "a30", "a10", "a40",
    "l4", "l40", "l40s", "rtx-6000-ada",
    "h100-sxm", "h100-pcie", "h100-nvl", "h200", "gh200",
    "b200", "b300", "rtx-pro-6000-blackwell",
]  # fmt: skip


@dataclass(frozen=True)
class GPU:
    """A GPU, as far as building for it is concerned."""

    compute_capability: Capability
    memory: int
    """Bytes: the data sheet's GB as 10^9, which a driver reports at least."""
    products: tuple[str, ...]
    """What the driver calls it, with dashes for spaces."""

    @property
    def architecture(self) -> str:
        """As engines name their target: `sm_90` for compute capability 9.0."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"

    def runs(self, quantization: Quantization) -> bool:
        """Whether it has the arithmetic that quantised weights need."""
        return self.compute_capability >= RECIPES[quantization].capability

    def caches(self, kv_cache: KeyValueType) -> bool:
        """Whether its kernels read a KV cache of this type."""
        return self.compute_capability >= KEY_VALUE_CAPABILITY[kv_cache]


def _gpu(major: int, minor: int, gigabytes: int, *products: str) -> GPU:
    return GPU(
        compute_capability=(major, minor),
        memory=gigabytes * 10**9,
        products=tuple(f"NVIDIA-{product}" for product in products),
    )


GPUS: Mapping[GPUName, GPU] = {
    "a100-40gb": _gpu(8, 0, 40, "A100-SXM4-40GB", "A100-PCIE-40GB"),
    "a100-80gb": _gpu(8, 0, 80, "A100-SXM4-80GB", "A100-80GB-PCIe"),
    "a30": _gpu(8, 0, 24, "A30"),
    "a10": _gpu(8, 6, 24, "A10"),
    "a40": _gpu(8, 6, 48, "A40"),
    "l4": _gpu(8, 9, 24, "L4"),
    "l40": _gpu(8, 9, 48, "L40"),
    "l40s": _gpu(8, 9, 48, "L40S"),
    "rtx-6000-ada": _gpu(8, 9, 48, "RTX-6000-Ada-Generation"),
    "h100-sxm": _gpu(9, 0, 80, "H100-80GB-HBM3"),
    "h100-pcie": _gpu(9, 0, 80, "H100-PCIe"),
    "h100-nvl": _gpu(9, 0, 94, "H100-NVL"),
    "h200": _gpu(9, 0, 141, "H200"),
    "gh200": _gpu(9, 0, 96, "GH200-480GB"),
    "b200": _gpu(10, 0, 180, "B200"),
    "b300": _gpu(10, 3, 270, "B300-SXM6-AC"),
    "rtx-pro-6000-blackwell": _gpu(12, 0, 96, "RTX-PRO-6000-Blackwell-Server-Edition"),
}
