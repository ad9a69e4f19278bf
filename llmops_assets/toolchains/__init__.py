"""The toolchains that make engines, by the name a spec gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmops_assets.errors import ToolchainError

if TYPE_CHECKING:
    from llmops_assets.settings import Settings
    from llmops_assets.spec import Engine
    from llmops_assets.toolchains.base import EngineToolchain


def toolchain_for(engine: Engine, settings: Settings | None = None) -> EngineToolchain[Any]:
    """The toolchain of a spec's engine section. Imports no other toolchain.

    Args:
        engine: the section.
        settings: of the platform; None for those of this process.

    Raises:
        ToolchainError: this installation has no such toolchain.
    """
    if engine.toolchain == "onnxruntime_genai":
        from llmops_assets.toolchains.onnxruntime_genai.toolchain import OnnxRuntimeGenAIToolchain

        return OnnxRuntimeGenAIToolchain()
    if engine.toolchain == "tensorrt_llm":
        from llmops_assets.settings import get_settings
        from llmops_assets.toolchains.tensorrt_llm.toolchain import toolchain_of

        return toolchain_of(engine, settings or get_settings())
    raise ToolchainError(
        f"There is no toolchain {engine.toolchain!r}",
        expected="onnxruntime_genai or tensorrt_llm",
        found=engine.toolchain,
        cure="name one that this version of llmops-assets has, under engine: in the spec",
    )
