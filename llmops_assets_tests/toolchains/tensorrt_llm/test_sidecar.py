"""The sidecar says what the engine directory lacks, and makes it an engine."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmops_assets.errors import ToolchainError
from llmops_assets.toolchains.tensorrt_llm.sidecar import (
    SIDECAR,
    Cost,
    Toolkit,
    open_engine,
    portable,
    read_sidecar,
)

from .sidecars import SOURCES, write


def test_sidecar_holds_what_decides_where_an_engine_runs(engine: Path) -> None:
    """By the names that every toolchain's sidecar has, and TensorRT-LLM's own."""
    write(engine)
    content = json.loads((engine / SIDECAR).read_text())
    assert content["toolchain"] == "tensorrt_llm"
    assert content["target"]["architecture"] == "sm_90"
    assert content["target"]["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "count": 2,
        "memory_bytes": 85520809984, "driver": "580.159.04", "cuda": "13.0",
    }  # fmt: skip
    assert content["toolkit"] == {
        "tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48",
        "image_digest": "sha256:" + "a" * 64, "cuda": "13.0.2",
    }  # fmt: skip
    assert content["sources"] == SOURCES
    assert content["commands"] == [["trtllm-build", "--max_batch_size", "8"]]
    assert content["files"] == {
        path.name: path.stat().st_size for path in engine.iterdir() if path.name != SIDECAR
    }


def test_what_was_written_is_read_again(engine: Path) -> None:
    """Prices are decimals and must not become floats on the way."""
    written = write(engine)
    assert read_sidecar(engine) == written
    config, opened = open_engine(engine)
    assert opened == written
    assert config.version == "1.2.1"


@pytest.mark.parametrize(
    ("seconds", "gpus", "gpu_hour", "gpu_seconds", "amount"),
    [
        (600.0, 2, Decimal("2.50"), 1200.0, Decimal("0.83")),
        (3600.0, 4, Decimal("3"), 14400.0, Decimal("12.00")),
        (90.04, 1, None, 90.0, None),
    ],
)
def test_cost_counts_every_gpu(
    seconds: float, gpus: int, gpu_hour: Decimal | None, gpu_seconds: float, amount: Decimal | None
) -> None:
    """A build holds all its GPUs even where one works; without a price there is no amount."""
    cost = Cost.of(seconds, gpus, gpu_hour)
    assert cost.gpu_seconds == gpu_seconds
    assert cost.amount == amount


def test_image_is_known_by_digest_only() -> None:
    """A tag moves, and the engine must be served by the bytes that built it."""
    with pytest.raises(ValidationError, match="image_digest"):
        Toolkit(
            tensorrt_llm="1.2.1",
            tensorrt="10.14.1.48",
            image_digest="nvcr.io/nvidia/tritonserver:26.04-trtllm-python-py3",
        )


def test_engine_without_sidecar_is_none(engine: Path) -> None:
    """Whole as it may look: nobody verified it."""
    with pytest.raises(ToolchainError, match=r"is not an engine.*killed build"):
        open_engine(engine)


def test_commands_say_the_same_on_every_machine() -> None:
    """Folders of work differ with each run, and say where a machine keeps things."""
    command = [
        "trtllm-build", "--checkpoint_dir", "/w/1/in", "--output_dir=/w/1", "--other", "/w/12"
    ]  # fmt: skip
    assert portable(command, output=Path("/w/1"), converted=Path("/w/1/in")) == (
        "trtllm-build", "--checkpoint_dir", "{converted}", "--output_dir={output}",
        "--other", "/w/12",
    )  # fmt: skip


@pytest.mark.parametrize("key", ["toolkit", "target", "sources", "files", "cost"])
def test_incomplete_sidecar_is_refused(key: str, engine: Path) -> None:
    """What is missing could not be compared with the node that serves."""
    write(engine)
    content = json.loads((engine / SIDECAR).read_text())
    del content[key]
    (engine / SIDECAR).write_text(json.dumps(content))
    with pytest.raises(ToolchainError, match=f"{key}: Field required"):
        read_sidecar(engine)


def test_half_a_sidecar_is_refused(engine: Path) -> None:
    """Text that ends in the middle is no JSON."""
    write(engine)
    text = (engine / SIDECAR).read_text()
    (engine / SIDECAR).write_text(text[: len(text) // 2])
    with pytest.raises(ToolchainError, match="is incomplete"):
        read_sidecar(engine)


def test_engine_with_other_files_than_were_built_is_refused(engine: Path) -> None:
    """Copies to a node lose ends of large files; a TensorRT plan does not say how long it is."""
    write(engine)
    rank = engine / "rank1.engine"
    content = rank.read_bytes()
    rank.write_bytes(content[:-1])
    with pytest.raises(ToolchainError, match=f"rank1.engine: {len(content)} bytes"):
        open_engine(engine)
    rank.unlink()
    with pytest.raises(ToolchainError, match=r"rank1\.engine: None bytes"):
        open_engine(engine)
    rank.write_bytes(content)
    (engine / "lora").mkdir()
    (engine / "lora" / "adapter").touch()
    with pytest.raises(ToolchainError, match="lora/adapter: None bytes"):
        open_engine(engine)


def test_sidecar_must_agree_with_the_engine_about_its_version(engine: Path) -> None:
    """A sidecar of another build would name an image that cannot load the engine."""
    write(engine)
    config = engine / "config.json"
    config.write_text(config.read_text().replace('"version": "1.2.1"', '"version": "1.2.0"'))
    with pytest.raises(
        ToolchainError, match=r"another version.*Expected: 1\.2\.1\. Found: 1\.2\.0"
    ):
        open_engine(engine)
