"""A step refuses to start anywhere else than the spec says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.errors import SpecError, ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.spec import parse_spec
from llmops_assets.toolchains.tensorrt_llm.image import Image, image_here

from .engines import engine
from .sidecars import H100, TOOLKIT
from .specs import spec_text

PYTHON = Path("/usr/bin/python3")
OTHER = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3@sha256:" + "f" * 64


def test_where_the_spec_says() -> None:
    """Otherwise the refusals below would show nothing."""
    Image(TOOLKIT, H100, PYTHON).check(engine(parallelism={"tensor": 2}))


@pytest.mark.parametrize(
    "section",
    [
        {"image": "registry.local/ours/triton:nightly"},
        {"backend": "llmapi", "family": None, "version": "1.3.0",
         "image": "nvcr.io/nvidia/tritonserver:26.10-trtllm-python-py3"},
    ],
)  # fmt: skip
def test_image_that_is_not_in_the_table(section: Mapping[str, Any]) -> None:
    """One's own, or newer than the table: a valid spec, so that a step must be able to run."""
    section = {"version": "1.2.1", **section}
    toolkit = TOOLKIT.model_copy(update={"tensorrt_llm": section["version"], "tensorrt": None})
    Image(toolkit, H100, PYTHON).check(engine(**section))
    with pytest.raises(ToolchainError, match=r"TensorRT-LLM 1\.1\.0"):
        other = toolkit.model_copy(update={"tensorrt_llm": "1.1.0"})
        Image(other, H100, PYTHON).check(engine(**section))


@pytest.mark.parametrize(
    ("section", "toolkit", "gpus", "problem"),
    [
        ({"image": OTHER}, {}, {}, "image sha256:a"),
        ({"gpu": "a100-80gb"}, {}, {}, "GPU sm_90"),
        ({"parallelism": {"tensor": 2}}, {}, {"count": 1}, "GPUs 1"),
        # A slice of a GPU, or a smaller model of the same architecture.
        ({"gpu": "h200"}, {}, {}, "GPU memory of at least 85,520,809,984 bytes"),
        ({}, {"tensorrt_llm": "1.2.0"}, {}, "TensorRT-LLM 1.2.0"),
        ({}, {"tensorrt": "10.13.3.9"}, {}, "TensorRT 10.13.3.9"),
    ],
)
def test_elsewhere(
    section: Mapping[str, Any], toolkit: Mapping[str, Any], gpus: Mapping[str, Any], problem: str
) -> None:
    """What it built there would not load where it serves, hours later."""
    here = Image(TOOLKIT.model_copy(update=toolkit), H100.model_copy(update=gpus), PYTHON)
    with pytest.raises(ToolchainError, match="does not run where") as caught:
        here.check(engine(**section))
    assert problem in str(caught.value)


def test_image_that_nobody_named() -> None:
    """A guessed digest would let an engine be served by another image than built it."""
    with pytest.raises(ToolchainError, match="LLMOPS_GPU_IMAGE_DIGEST"):
        image_here(Settings(gpu_image_digest=None))


@pytest.mark.parametrize(
    ("metric", "gate", "problem"),
    [
        ("perplexity", "perplexity: {at_most: 5}", "needs logits of prompts"),
        ("{name: gsm, task: gsm8k}", "gsm: {at_least: 0.5}", "do not run"),
    ],
)
def test_gate_on_what_is_not_measured(metric: str, gate: str, problem: str) -> None:
    """It could never pass, which would show only after the GPU hours of a build."""
    text = spec_text("engine").replace("[exact_match]", f"[exact_match, {metric}]")
    parse_spec(text, "test")
    text = text.replace("engine_accuracy: {", f"engine_accuracy: {{{gate}, ")
    with pytest.raises(SpecError, match=problem):
        parse_spec(text, "test")
