"""Which versions are in which container, and what they can serve."""

from __future__ import annotations

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.combinations import refusals
from llmops_assets.toolchains.tensorrt_llm.containers import (
    CONTAINERS,
    PINNED_IMAGE,
    PINNED_TENSORRT_LLM,
    Backend,
    Container,
    backend_refusal,
    check_backend,
    container_of,
    containers_with,
    known_container,
)

from .engines import engine

MATRIX = {
    "25.05": ("0.19.0", None),
    "25.06": ("0.20.0", None),
    "25.07": ("0.20.0", None),
    "25.08": ("0.21.0", None),
    "25.09": ("1.0.0", "10.11.0.33"),
    "25.10": ("1.0.0", "10.11.0.33"),
    "25.11": ("1.0.3.2510", "10.13.3.9"),
    "25.12": ("1.1.0", "10.13.3.9"),
    "26.01": ("1.1.0", "10.13.3.9"),
    "26.02": ("1.1.0", "10.13.3.9"),
    "26.03": ("1.2.0", "10.14.1.48"),
    "26.04": ("1.2.1", "10.14.1.48"),
    "26.05": ("1.2.1", "10.14.1.48"),
    "26.06": ("1.2.1", "10.14.1.48"),
    "26.07": ("1.2.1", "10.14.1.48"),
}
DIGEST = "sha256:" + "a" * 64
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


def test_table_is_nvidias_support_matrix() -> None:
    """A wrong row builds engines that the serving image refuses; both must be changed."""
    assert {row.release: (row.tensorrt_llm, row.tensorrt) for row in CONTAINERS} == MATRIX


def test_pinned_version_is_served_by_several_containers() -> None:
    """Without one, every cure that names it would be wrong."""
    assert [row.release for row in containers_with(PINNED_TENSORRT_LLM)] == [
        "26.04", "26.05", "26.06", "26.07",
    ]  # fmt: skip
    assert containers_with("9.9.9") == ()


@pytest.mark.parametrize(
    "image",
    [IMAGE, f"{IMAGE}@{DIGEST}", "registry.local:5000/mirror/triton:26.07-trtllm-python-py3"],
)
def test_image_is_known_by_its_tag_in_any_registry(image: str) -> None:
    """Clusters pull from mirrors and pin digests."""
    assert container_of(image).tensorrt_llm == "1.2.1"


def test_table_names_the_image_it_knows() -> None:
    """What an error tells to use must be something that is accepted."""
    assert container_of(CONTAINERS[-1].image) is CONTAINERS[-1]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ("nvcr.io/nvidia/tritonserver:26.08-trtllm-python-py3", "Nobody has looked up"),
        ("nvcr.io/nvidia/tritonserver:26.07-py3", "does not say which"),
        ("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3-ours", "does not say which"),
        (f"{IMAGE}@sha256:12", "does not say which"),
        (f"nvcr.io/nvidia/tritonserver@{DIGEST}", "does not say which"),
        ("triton", "does not say which"),
    ],
)
def test_unknown_image_is_refused(image: str, problem: str) -> None:
    """A guess would show as an engine that does not load, or loads and is not what was tested."""
    with pytest.raises(ToolchainError, match=problem):
        container_of(image)


@pytest.mark.parametrize(
    ("backend", "version"),
    [("engine", "1.0.0"), ("engine", "1.2.1"), ("llmapi", "1.2.1"), ("llmapi", "1.3.0rc29")],
)
def test_backend_is_allowed(backend: Backend, version: str) -> None:
    """The refusals below must not refuse everything."""
    check_backend(backend, version)


@pytest.mark.parametrize(
    ("backend", "version", "problem"),
    [
        ("engine", "1.3.0", "NVIDIA removed"),
        ("engine", "1.3.0rc20", "NVIDIA removed"),
        ("engine", "1.4.0rc1", "NVIDIA removed"),
        ("engine", "0.21.0", "below 1.0"),
        ("llmapi", "0.19.0", "below 1.0"),
    ],
)
def test_backend_is_refused(backend: Backend, version: str, problem: str) -> None:
    """NVIDIA removed trtllm-build and the C++ backend; it would show as a missing command."""
    with pytest.raises(ToolchainError, match=problem):
        check_backend(backend, version)


@pytest.mark.parametrize("row", CONTAINERS, ids=lambda row: row.release)
def test_spec_may_name_every_container_that_is_supported(row: Container) -> None:
    """A version of four numbers was in the table, and no spec could be written for it."""
    section = {"image": row.image, "version": row.tensorrt_llm}
    assert list(refusals(engine(**section))) == [] or row.tensorrt_llm.startswith("0.")


def test_spec_and_table_pin_one_version() -> None:
    """Two defaults would drift apart, and each spec without a version be refused."""
    section = engine()
    assert (section.version, section.image) == (PINNED_TENSORRT_LLM, PINNED_IMAGE)
    assert known_container(section.image) is container_of(PINNED_IMAGE)


@pytest.mark.parametrize("version", ["0.21.0", "1.3.0rc20"])
def test_spec_and_image_know_one_end_of_engines(version: str) -> None:
    """What a spec may say and what an image may serve are one rule."""
    found = dict(refusals(engine(version=version, image="ours/triton:1")))
    assert found[("version",)] == backend_refusal("engine", version)
