"""What each quantisation is: its size, the GPUs that can run it, the tool that makes it.

Which GPU runs which is ModelOpt's support matrix
(https://nvidia.github.io/Model-Optimizer/guides/0_support_matrix.html): FP8 and W4A8 from
Ada on, FP4 from Blackwell on, INT8 and INT4 from Ampere on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Quantization = Literal[
    "none", "fp8", "int8", "int8_smoothquant", "int4", "int4_awq", "w4a8_awq", "nvfp4"
]
KeyValueType = Literal["auto", "fp8", "int8"]
"""Of the KV cache's entries; `auto` is the type of the activations."""

Capability = tuple[int, int]
"""A CUDA compute capability: major, minor."""

AMPERE: Capability = (8, 0)
ADA: Capability = (8, 9)
BLACKWELL: Capability = (10, 0)


@dataclass(frozen=True)
class Recipe:
    """How weights become smaller."""

    bits: float | None
    """Of one weight of a linear layer, its share of the scales included; None: as `dtype`."""
    capability: Capability
    """The smallest that can run it."""
    qformat: str
    """What `quantize.py` calls it."""
    weight_only_precision: Literal["int8", "int4"] | None = None
    """What `convert_checkpoint.py` calls it, where it needs no calibration."""


RECIPES: Mapping[Quantization, Recipe] = {
    "none": Recipe(bits=None, capability=AMPERE, qformat="full_prec"),
    "fp8": Recipe(bits=8, capability=ADA, qformat="fp8"),
    "int8": Recipe(bits=8, capability=AMPERE, qformat="int8_wo", weight_only_precision="int8"),
    "int8_smoothquant": Recipe(bits=8, capability=AMPERE, qformat="int8_sq"),
    "int4": Recipe(bits=4, capability=AMPERE, qformat="int4_wo", weight_only_precision="int4"),
    # One 16-bit scale for each block of 128 weights, which is quantize.py's own default.
    "int4_awq": Recipe(bits=4 + 16 / 128, capability=AMPERE, qformat="int4_awq"),
    "w4a8_awq": Recipe(bits=4 + 16 / 128, capability=ADA, qformat="w4a8_awq"),
    # One 8-bit scale for each block of 16 weights, which is the format's definition.
    "nvfp4": Recipe(bits=4 + 8 / 16, capability=BLACKWELL, qformat="nvfp4"),
}

KEY_VALUE_BITS: Mapping[KeyValueType, int | None] = {"auto": None, "fp8": 8, "int8": 8}
"""Of one entry; None: as `dtype`."""
KEY_VALUE_CAPABILITY: Mapping[KeyValueType, Capability] = {
    "auto": AMPERE,
    "fp8": ADA,
    "int8": AMPERE,
}


def needs_calibration(quantization: Quantization, kv_cache: KeyValueType) -> bool:
    """Whether scales must be measured on data: then `quantize.py` makes the checkpoint.

    `convert_checkpoint.py` makes it otherwise: without quantisation, or with that of the
    weights alone, whose scales follow from the weights.
    """
    without_data = quantization == "none" or RECIPES[quantization].weight_only_precision is not None
    return not without_data or kv_cache != "auto"
