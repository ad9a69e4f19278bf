"""The toolchains that make engines, by the name a spec gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmops_assets.errors import ToolchainError

if TYPE_CHECKING:
    from llmops_assets.spec import Engine
    from llmops_assets.toolchains.base import EngineToolchain


def toolchain_for(engine: Engine) -> EngineToolchain[Any]:
    """The toolchain of a spec's engine section. Imports no other toolchain.

    Raises:
        ToolchainError: this installation has no such toolchain.
    """
    if engine.toolchain == "onnxruntime_genai":
        from llmops_assets.toolchains.onnxruntime_genai.toolchain import OnnxRuntimeGenAIToolchain

        return OnnxRuntimeGenAIToolchain()
    raise ToolchainError(
        f"There is no toolchain {engine.toolchain!r}",
        expected="onnxruntime_genai",
        found=engine.toolchain,
        cure="name one that this version of llmops-assets has, under engine: in the spec",
    )
