"""The families of models whose conversion is known, and what TensorRT-LLM does for each.

Scripts and their limits: `examples/models/{core,contrib}/<family>/convert_checkpoint.py`.
Quantisations: the support matrices of `docs/source/legacy/reference/precision.md` and of
each family's README. All were read in sources close to, not provably at, version 1.2.1.
What no source names is refused: it would fail after GPU minutes, or answer nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from llmops_assets.toolchains.tensorrt_llm.quantizations import Quantization

FamilyName = Literal["llama", "qwen", "gpt", "gemma", "phi", "commandr", "falcon"]

WEIGHT_ONLY: frozenset[Quantization] = frozenset({"none", "int8", "int4"})


def _besides_weights(*names: Quantization) -> frozenset[Quantization]:
    return WEIGHT_ONLY | frozenset(names)


@dataclass(frozen=True)
class Family:
    """What one `convert_checkpoint.py` converts, and what the engine then can do."""

    folder: PurePosixPath
    """Of its script, below `examples/models`."""
    architectures: tuple[str, ...]
    """Of checkpoints, as `architectures` in their `config.json` names them."""
    quantizations: frozenset[Quantization]
    pipeline: bool = True
    """Whether its layers can be spread over GPUs."""
    context: bool = False
    """Whether its script takes `--cp_size`."""
    experts: bool = False
    """Whether its script takes `--moe_tp_size` and `--moe_ep_size`."""

    @property
    def script(self) -> PurePosixPath:
        """Path below the folder `examples`."""
        return PurePosixPath("models") / self.folder / "convert_checkpoint.py"


FAMILIES: Mapping[FamilyName, Family] = {
    # Mistral and Mixtral have no script of their own.
    "llama": Family(
        folder=PurePosixPath("core/llama"),
        architectures=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        quantizations=_besides_weights("fp8", "int8_smoothquant", "int4_awq", "w4a8_awq", "nvfp4"),
        context=True,
        experts=True,
    ),
    "qwen": Family(
        folder=PurePosixPath("core/qwen"),
        architectures=(
            "QWenLMHeadModel",
            "Qwen2ForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
        ),
        quantizations=_besides_weights("fp8", "int8_smoothquant", "int4_awq"),
        context=True,
        experts=True,
    ),
    "gpt": Family(
        folder=PurePosixPath("core/gpt"),
        architectures=(
            "GPT2LMHeadModel",
            "GPTBigCodeForCausalLM",
            "Starcoder2ForCausalLM",
            "NemotronForCausalLM",
        ),
        quantizations=_besides_weights("fp8", "int8_smoothquant"),
    ),
    "gemma": Family(
        folder=PurePosixPath("core/gemma"),
        architectures=("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        quantizations=_besides_weights("fp8", "int8_smoothquant", "int4_awq", "w4a8_awq"),
        # "We don't support pipeline parallelism yet for Gemma", in its script.
        pipeline=False,
    ),
    "phi": Family(
        folder=PurePosixPath("core/phi"),
        architectures=(
            "PhiForCausalLM",
            "Phi3ForCausalLM",
            "Phi3SmallForCausalLM",
            "PhiMoEForCausalLM",
        ),
        quantizations=_besides_weights("fp8", "int8_smoothquant"),
        # "Pipeline parallelism is not supported", asserted by its script.
        pipeline=False,
        experts=True,
    ),
    "commandr": Family(
        folder=PurePosixPath("core/commandr"),
        architectures=("CohereForCausalLM",),
        quantizations=WEIGHT_ONLY,
    ),
    "falcon": Family(
        folder=PurePosixPath("contrib/falcon"),
        architectures=("FalconForCausalLM",),
        quantizations=_besides_weights("fp8", "int4_awq"),
    ),
}
