"""Which versions NVIDIA's Triton containers hold, and what each of them can serve.

An engine runs only in the version that built it, so it is built in the image that serves
it. The table is NVIDIA's (Triton server, `docs/introduction/compatibility.md`); a release
that is not in it is refused rather than guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from llmops_assets.errors import ToolchainError

Backend = Literal["engine", "llmapi"]
"""`engine`: built by `trtllm-build`, served by Triton's C++ backend. `llmapi`: a Hugging Face
or quantised checkpoint, served by Triton's `llmapi` Python model."""

IMAGE = "nvcr.io/nvidia/tritonserver"
SUFFIX = "-trtllm-python-py3"
PINNED_TENSORRT_LLM = "1.2.1"
"""The version that releases are built with unless a spec's image says otherwise."""

# Before 1.0 scripts, defaults and the Python API were in other places; what is written for
# 1.x would fail there in ways that nobody looked at.
FIRST_SUPPORTED = (1, 0)
# NVIDIA removed trtllm-build, convert_checkpoint.py and the C++ backend after 1.3.0rc20
# (TensorRT-LLM, docs/source/legacy/tensorrt-backend-removal.md). 1.3.0 itself never had them,
# and a release candidate of 1.3 is no version to serve with.
FIRST_WITHOUT_ENGINES = (1, 3)


@dataclass(frozen=True)
class Container:
    """One release of the Triton container with TensorRT-LLM, Python 3.12."""

    release: str
    """Year and month, such as `26.04`."""
    tensorrt_llm: str
    tensorrt: str | None
    """None where the support matrix was not read."""

    @property
    def image(self) -> str:
        """Name and tag in NVIDIA's registry."""
        return f"{IMAGE}:{self.release}{SUFFIX}"


CONTAINERS = (
    Container("25.05", "0.19.0", None),
    Container("25.06", "0.20.0", None),
    Container("25.07", "0.20.0", None),
    Container("25.08", "0.21.0", None),
    Container("25.09", "1.0.0", "10.11.0.33"),
    Container("25.10", "1.0.0", "10.11.0.33"),
    Container("25.11", "1.0.3.2510", "10.13.3.9"),
    Container("25.12", "1.1.0", "10.13.3.9"),
    Container("26.01", "1.1.0", "10.13.3.9"),
    Container("26.02", "1.1.0", "10.13.3.9"),
    Container("26.03", "1.2.0", "10.14.1.48"),
    Container("26.04", "1.2.1", "10.14.1.48"),
    Container("26.05", "1.2.1", "10.14.1.48"),
    Container("26.06", "1.2.1", "10.14.1.48"),
    Container("26.07", "1.2.1", "10.14.1.48"),
)

PINNED_IMAGE = CONTAINERS[-1].image
"""The newest image that holds the pinned version."""

# A mirror may call the image anything before its tag; a digest may follow.
_TAG = re.compile(r":(\d\d\.\d\d)" + re.escape(SUFFIX) + r"(@sha256:[0-9a-f]{64})?")


def container_of(image: str) -> Container:
    """What is in an image.

    Args:
        image: a reference with NVIDIA's tag, in any registry, with or without a digest.

    Raises:
        ToolchainError: the tag is not one of a Triton container with TensorRT-LLM, or its
            release is not in the table.
    """
    match = _TAG.search(image)
    if match is None or match.end() != len(image):
        raise ToolchainError(
            f"{image} does not say which TensorRT-LLM is in it",
            expected=f"{IMAGE}:YY.MM{SUFFIX}, in any registry, with or without @sha256:…",
            found=image,
            cure="keep NVIDIA's tag when the image is copied to another registry",
        )
    for container in CONTAINERS:
        if container.release == match.group(1):
            return container
    raise ToolchainError(
        f"Nobody has looked up which TensorRT-LLM is in the Triton container {match.group(1)}",
        expected=f"a release from {CONTAINERS[0].release} to {CONTAINERS[-1].release}",
        found=match.group(1),
        cure="use a known release, or add this one to containers.py from Triton's support matrix",
    )


def known_container(image: str) -> Container | None:
    """What is in an image; None for one of one's own, or newer than the table, which is asked
    for its versions where it runs.
    """
    try:
        return container_of(image)
    except ToolchainError:
        return None


def containers_with(tensorrt_llm: str) -> tuple[Container, ...]:
    """The containers that hold exactly this version, oldest first; none if there are none."""
    return tuple(container for container in CONTAINERS if container.tensorrt_llm == tensorrt_llm)


def backend_refusal(backend: Backend, tensorrt_llm: str) -> str | None:
    """Why a version of TensorRT-LLM cannot be used with a backend; None if it can.

    Whether a container has the template of `llmapi` is for `templates.find_templates` to
    say: it looks.
    """
    release = Version(tensorrt_llm).release[:2]
    if release < FIRST_SUPPORTED:
        return f"below 1.0 scripts lie elsewhere and flags differ; take {PINNED_TENSORRT_LLM}"
    if backend == "engine" and release >= FIRST_WITHOUT_ENGINES:
        return (
            "from 1.3 on NVIDIA removed convert_checkpoint.py, trtllm-build and "
            f"inflight_batcher_llm; take {PINNED_TENSORRT_LLM}, or backend: llmapi"
        )
    return None


def check_backend(backend: Backend, tensorrt_llm: str) -> None:
    """Checks that a version of TensorRT-LLM has a backend; see `backend_refusal`.

    Raises:
        ToolchainError: it has not.
    """
    if (refusal := backend_refusal(backend, tensorrt_llm)) is not None:
        raise ToolchainError(
            f"TensorRT-LLM {tensorrt_llm} cannot be used with backend {backend}",
            found=refusal,
            cure=f"serve from {PINNED_IMAGE}, or change the backend in the spec",
        )
