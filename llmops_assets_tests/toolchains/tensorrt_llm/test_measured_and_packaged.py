"""From what the doubles of the tools build to figures and a package, with our own commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.errors import ToolchainError
from llmops_assets.spec import Constraints
from llmops_assets.toolchains.base import ServingImage
from llmops_assets.toolchains.tensorrt_llm.benchmark import (
    Benchmark,
    read_summary,
    write_dataset,
)
from llmops_assets.toolchains.tensorrt_llm.packaging import (
    EngineServing,
    ServedBy,
    package_engine,
)
from llmops_assets.tools import ToolRunner

from .doubles.behaviour import FAILS
from .doubles.installation import Installation

REQUESTS = 24
TEMPLATES = Path(__file__).parent / "template_doubles" / "inflight_batcher_llm"


def measured(
    engine: Path, folder: Path, installation: Installation, tools: ToolRunner
) -> Benchmark:
    """A benchmark that the double has run."""
    dataset = folder / "dataset.jsonl"
    write_dataset([[1, 2, 3]] * REQUESTS, 16, dataset)
    benchmark = Benchmark(
        backend="engine", model_name="chat", checkpoint=folder / "model", engine=engine,
        dataset=dataset, output=folder, requests=REQUESTS, concurrency=4,
        world_size=2,
    )  # fmt: skip
    name, *arguments = benchmark.command()
    tools.run("the benchmark", installation.command(name, *arguments))
    return benchmark


def test_benchmark_is_measured(
    engine: Path, tmp_path: Path, installation: Installation, tools: ToolRunner
) -> None:
    """Our command and our parser meet the same tool."""
    summary = read_summary([measured(engine, tmp_path, installation, tools)])
    level = summary.at(4)
    assert level is not None
    assert (level.requests, level.errors) == (REQUESTS, 0)
    assert level.time_to_first_token.p50 is not None
    assert 0.02 <= level.time_to_first_token.p50 < 0.03
    assert level.inter_token_latency.p50 == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("failure", "problem"),
    [("other_backend", "not about what serves"), ("no_report", "left no report")],
)
def test_benchmark_of_something_else_is_refused(
    failure: str, problem: str, engine: Path, tmp_path: Path, installation: Installation,
    tools: ToolRunner,
) -> None:  # fmt: skip
    """Both end with exit code 0 (TensorRT-LLM#8223 for the first)."""
    installation.behave(**{FAILS: f"trtllm-bench:{failure}"})
    benchmark = measured(engine, tmp_path, installation, tools)
    with pytest.raises(ToolchainError, match=problem):
        read_summary([benchmark])


def test_built_engine_is_packaged(engine: Path, hugging_face: Path, tmp_path: Path) -> None:
    """What trtllm-build leaves is what a package needs; both ranks are in it."""
    package_engine(
        engine, hugging_face, TEMPLATES, tmp_path / "package", model="chat",
        constraints=Constraints(max_input_tokens=64, max_output_tokens=64),
        serving=EngineServing(max_batch_size=8),
        served=ServedBy(ServingImage("image", "tag", None), "1.2.1", "sm_90", world_size=2),
    )  # fmt: skip
    packaged = tmp_path / "package" / "engine"
    for rank in (0, 1):
        name = f"rank{rank}.engine"
        assert (packaged / name).read_bytes() == (engine / name).read_bytes()
