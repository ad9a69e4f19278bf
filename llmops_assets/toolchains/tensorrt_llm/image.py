"""The container image that a step with TensorRT-LLM runs in, and the GPUs it was given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.containers import Backend, container_of
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.nvml import GPUFacts, gpus_here
from llmops_assets.toolchains.tensorrt_llm.scripts import EXAMPLE_FOLDERS, find_script
from llmops_assets.toolchains.tensorrt_llm.sidecar import Toolkit, toolkit_here
from llmops_assets.toolchains.tensorrt_llm.templates import find_templates


@dataclass(frozen=True)
class Image:
    """What a step finds around itself."""

    toolkit: Toolkit
    gpus: GPUFacts
    root: Path = Path("/")
    """Of the image's file system."""
    python: str = sys.executable
    """The interpreter that has both TensorRT-LLM and this package."""

    def script(self, relative: PurePosixPath) -> Path:
        """A script below `examples`; see `scripts.find_script`.

        Raises:
            ToolchainError: the image has none.
        """
        return find_script(
            relative, [self.root / folder.relative_to("/") for folder in EXAMPLE_FOLDERS]
        )

    def templates(self, backend: Backend) -> Path:
        """The folder of a backend's templates; see `templates.find_templates`.

        Raises:
            ToolchainError: the image has none, so it cannot serve this backend.
        """
        return find_templates(backend, self.root)

    def check(self, engine: TensorRTLLMEngine) -> None:
        """Checks that this is the image and these are the GPUs that a spec names.

        Raises:
            ToolchainError: naming everything that is not.
        """
        container = container_of(engine.image)
        digest = engine.image.partition("@")[2]
        gpu = GPUS[engine.gpu]
        needed = engine.parallelism.world_size
        differences = [
            (what, wanted, found)
            for what, wanted, found in (
                ("TensorRT-LLM", engine.version, self.toolkit.tensorrt_llm),
                ("TensorRT", container.tensorrt, self.toolkit.tensorrt),
                ("image", digest, self.toolkit.image_digest),
                ("GPU", gpu.architecture, self.gpus.architecture),
            )
            # A spec need not name a digest, and not every container's TensorRT is known.
            if wanted and wanted != found
        ]
        if self.gpus.count < needed:
            differences.append(("GPUs", f"{needed}, one per rank", str(self.gpus.count)))
        if differences:
            raise ToolchainError(
                "This step does not run where the spec's engine section says",
                expected=", ".join(f"{what} {wanted}" for what, wanted, _ in differences),
                found=", ".join(f"{what} {found}" for what, _, found in differences),
                cure=f"run it in {engine.image} on {needed} x {engine.gpu}",
            )


def image_here(settings: Settings) -> Image:
    """The image that this process runs in.

    Raises:
        ToolchainError: there is no GPU or no TensorRT-LLM here, or nobody said which image
            this is.
    """
    if settings.gpu_image_digest is None:
        raise ToolchainError(
            "Nobody said which image this step runs in",
            expected="the digest of the TensorRT-LLM image in LLMOPS_GPU_IMAGE_DIGEST",
            found="it is not set",
            cure="set it where the step is started, to the digest of the image that is started",
        )
    return Image(toolkit=toolkit_here(settings.gpu_image_digest), gpus=gpus_here())
