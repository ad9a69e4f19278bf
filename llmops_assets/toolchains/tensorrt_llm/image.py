"""The container image that a step with TensorRT-LLM runs in, and the GPUs it was given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.spec import TensorRTLLMEngine
from llmops_assets.toolchains.tensorrt_llm.containers import Backend, known_container
from llmops_assets.toolchains.tensorrt_llm.gpus import GPUS
from llmops_assets.toolchains.tensorrt_llm.image_python import find_python, toolkit_of
from llmops_assets.toolchains.tensorrt_llm.nvml import GPUFacts, gpus_here
from llmops_assets.toolchains.tensorrt_llm.scripts import EXAMPLE_FOLDERS, find_script
from llmops_assets.toolchains.tensorrt_llm.sidecar import Toolkit
from llmops_assets.toolchains.tensorrt_llm.templates import find_templates


@dataclass(frozen=True)
class Image:
    """What a step finds around itself."""

    toolkit: Toolkit
    gpus: GPUFacts
    python: Path
    """The interpreter that has TensorRT-LLM."""
    root: Path = Path("/")
    """Of the image's file system."""

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
        container = known_container(engine.image)
        digest = engine.image.partition("@")[2]
        gpu = GPUS[engine.gpu]
        needed = engine.parallelism.world_size
        differences = [
            (what, wanted, found)
            for what, wanted, found in (
                ("TensorRT-LLM", engine.version, self.toolkit.tensorrt_llm),
                ("TensorRT", container and container.tensorrt, self.toolkit.tensorrt),
                ("image", digest, self.toolkit.image_digest),
                ("GPU", gpu.architecture, self.gpus.architecture),
            )
            # A spec need not name a digest, and what is in an image of one's own is not known.
            if wanted and wanted != found
        ]
        if self.gpus.count < needed:
            differences.append(("GPUs", f"{needed}, one per rank", str(self.gpus.count)))
        if self.gpus.memory_bytes < gpu.memory:
            # An H100 of 80 GB and a slice of it are one architecture.
            at_least, found = f"{gpu.memory:,} bytes", f"{self.gpus.memory_bytes:,} bytes"
            differences.append(("GPU memory of at least", at_least, found))
        if differences:
            raise ToolchainError(
                "This step does not run where the spec's engine section says",
                expected=", ".join(f"{what} {wanted}" for what, wanted, _ in differences),
                found=", ".join(f"{what} {found}" for what, _, found in differences),
                cure=f"run it in {engine.image} on {needed} x {engine.gpu}",
            )


def image_digest(settings: Settings) -> str:
    """The digest of the image that this process runs in, as the settings name it.

    Raises:
        ToolchainError: they do not.
    """
    if settings.gpu_image_digest is None:
        raise ToolchainError(
            "Nobody said which image this step runs in",
            expected="the digest of the TensorRT-LLM image in LLMOPS_GPU_IMAGE_DIGEST",
            found="it is not set",
            cure="set it where the step is started, to the digest of the image that is started",
        )
    return settings.gpu_image_digest


def image_here(settings: Settings) -> Image:
    """The image that this process runs in.

    Raises:
        ToolchainError: there is no GPU or no TensorRT-LLM here, or nobody said which image
            this is; see `image_python` and `nvml.gpus_here`.
    """
    digest = image_digest(settings)
    python = find_python(settings)
    return Image(toolkit=toolkit_of(python, digest), gpus=gpus_here(), python=python)
