"""What people complained about in NVIDIA's trackers, each caught by a gate before it serves.

One test for each row of the table that this toolchain was written from; the docstrings name the
issues (TRT: NVIDIA/TensorRT-LLM; be, srv: Triton's tensorrtllm_backend and server).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmops_assets.build.judgements import judge_parity, judge_target
from llmops_assets.errors import ArtifactCorruptError, SpecError, ToolchainError
from llmops_assets.evidence.verdicts import Judgement
from llmops_assets.serving.slot_process import PACKAGE, place, read_slot, verify
from llmops_assets.serving.slots import Deployment, Endpoint
from llmops_assets.settings import Settings
from llmops_assets.spec import ModelSpec, ParityGate, Rollout, parse_spec
from llmops_assets.toolchains.tensorrt_llm import toolchain
from llmops_assets.toolchains.tensorrt_llm.benchmark import Benchmark, read_level, write_dataset
from llmops_assets.toolchains.tensorrt_llm.compatibility import check_memory_released
from llmops_assets.toolchains.tensorrt_llm.packaging import check_package
from llmops_assets.toolchains.tensorrt_llm.toolchain import BuiltEngines
from llmops_assets.toolchains.tensorrt_llm.validation import tokenizer_parity
from llmops_assets.tools import ToolRunner
from llmops_assets_tests.release_rig import MODEL
from llmops_assets_tests.serving.conftest import artifact_of

from .conftest import write_hugging_face
from .image_doubles import Surroundings, enter_image
from .sidecars import SOURCES
from .specs import spec_text

SETTINGS = Settings()


@dataclass(frozen=True)
class Release:
    """A release of two ranks that the doubles of the tools built, and where."""

    here: Surroundings
    spec: ModelSpec
    toolchain: BuiltEngines
    checkpoint: Path
    engine: Path
    tools: ToolRunner

    def judged(self) -> Judgement:
        """What the gate `fits_target` says, which every deployment requires."""
        return judge_target(self.spec, self.engine, SETTINGS)

    def rewrite_sidecar(self, old: str, new: str) -> None:
        """Makes the engine one that something else built."""
        path = self.engine / "engine.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def package(self, output: Path) -> Path:
        self.toolchain.package(self.engine, self.checkpoint, output, self.spec)
        return output


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Release:
    here = enter_image(monkeypatch, tmp_path / "image")
    spec = parse_spec(spec_text("engine", 2), "test")
    assert spec.engine.toolchain == "tensorrt_llm"
    settings = SETTINGS.model_copy(update={"timing_caches": tmp_path / "caches"})
    toolchain = BuiltEngines(spec.engine, settings)
    tools = ToolRunner(work=tmp_path / "work", log=tmp_path / "log", timeout_seconds=20)
    checkpoint = write_hugging_face(tmp_path / "model")
    toolchain.convert(checkpoint, tmp_path / "converted", spec.engine, tools)
    engine = tmp_path / "engine"
    toolchain.build(tmp_path / "converted", engine, spec.engine, SOURCES, tools)
    return Release(here, spec, toolchain, checkpoint, engine, tools)


def test_whole_engine_passes(release: Release) -> None:
    """Otherwise the refusals below would show nothing."""
    assert release.judged().passed


def test_gate_needs_no_gpu(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks run in pods without one; there a whole engine got a verdict that it does not fit."""

    def nothing_here(settings: Settings) -> None:
        raise ToolchainError("There is no GPU here", cure="run the step elsewhere")

    monkeypatch.setattr(toolchain, "image_here", nothing_here)
    judgement = release.judged()
    assert judgement.passed, judgement.reason
    assert judgement.threshold == {"architecture": "sm_90"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tensorrt": "10.13.3.9"}, "TensorRT 10.14.1.48"),
        ({"tensorrt_llm": "1.1.0"}, "another"),
    ],
)
def test_other_toolkit_than_serves(
    change: Mapping[str, str], problem: str, release: Release
) -> None:
    """be#194, be#424, be#531, TRT#1695: a mismatch of versions showed when the engine loaded."""
    for key, value in change.items():
        old = getattr(release.here.image.toolkit, key)
        release.rewrite_sidecar(f'"{key}": "{old}"', f'"{key}": "{value}"')
    judgement = release.judged()
    assert not judgement.passed
    assert problem in judgement.reason


def test_other_image_than_serves(release: Release, tmp_path: Path) -> None:
    """be#531: a tag that moved on brings other templates and another server."""
    release.here.move(toolkit={"image_digest": "sha256:" + "f" * 64})
    assert release.spec.engine.toolchain == "tensorrt_llm"
    moved = BuiltEngines(release.spec.engine, SETTINGS)
    with pytest.raises(ToolchainError, match="another image"):
        moved.package(release.engine, release.checkpoint, tmp_path / "package", release.spec)


def test_other_compute_capability(release: Release) -> None:
    """TRT#222, TRT#3031: engines do not move between architectures."""
    release.rewrite_sidecar('"architecture": "sm_90"', '"architecture": "sm_80"')
    judgement = release.judged()
    assert not judgement.passed
    assert "built for other GPUs" in judgement.reason


def cut_off(engine: Path) -> None:
    path = engine / "rank1.engine"
    path.write_bytes(path.read_bytes()[:-1])


def lose_rank(engine: Path) -> None:
    (engine / "rank1.engine").unlink()


def lose_sidecar(engine: Path) -> None:
    (engine / "engine.json").rename(engine / "engine.json.partial")


@pytest.mark.parametrize("damage", [cut_off, lose_rank, lose_sidecar])
def test_partial_build(damage: Callable[[Path], None], release: Release, tmp_path: Path) -> None:
    """TRT#1038, TRT#1838: "Failed to deserialize cuda engine", of half an engine."""
    damage(release.engine)
    with pytest.raises(ToolchainError):
        release.toolchain.compatible(release.engine, release.toolchain.target())
    with pytest.raises(ToolchainError):
        release.package(tmp_path / "package")


def test_changed_byte(release: Release, tmp_path: Path) -> None:
    """TRT#1038: of the right size, so that only its digest tells; before the server starts."""
    package = release.package(tmp_path / "package")
    artifact = artifact_of(package)
    deployment = Deployment(artifact.digest, "parrot.v1", 1)
    slot = tmp_path / "slot"
    place(package, artifact, deployment, MODEL, Endpoint("127.0.0.1", 1, 2, 3), slot, b"")
    held = read_slot(slot)
    assert held is not None
    verify(slot, held)
    path = slot / PACKAGE / "engine" / "rank0.engine"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactCorruptError, match=r"rank0\.engine has other bytes"):
        verify(slot, held)


def templates(release: Release) -> Path:
    return release.here.image.templates("engine")


def test_placeholder_of_a_newer_image(release: Release, tmp_path: Path) -> None:
    """srv#8592, srv#7950, be#501: "Expected integer, got: $" when Triton read it."""
    path = templates(release) / "preprocessing" / "config.pbtxt"
    path.write_text(path.read_text() + "\nversion_policy { latest { num_versions: ${new} } }\n")
    with pytest.raises(ToolchainError, match="new"):
        release.package(tmp_path / "package")


def test_backend_that_no_template_names(release: Release, tmp_path: Path) -> None:
    """TRT#1803: "unable to find backend library for backend '${triton_backend}'"."""
    path = templates(release) / "tensorrt_llm" / "config.pbtxt"
    text = path.read_text()
    assert "${triton_backend}" in text
    path.write_text(text.replace("${triton_backend}", ""))
    with pytest.raises(ToolchainError, match="triton_backend"):
        release.package(tmp_path / "package")


def test_engine_elsewhere_than_mounted(release: Release, tmp_path: Path) -> None:
    """be#181, be#615, be#727, srv#8077, srv#6644: paths of the object storage in a config."""
    package = release.package(tmp_path / "package")
    check_package(package, MODEL)
    path = package / "repository" / "tensorrt_llm" / "config.pbtxt"
    text = path.read_text()
    assert "/opt/llmops/package/engine" in text
    path.write_text(text.replace("/opt/llmops/package/engine", "/tmp/folderAbCdEf/engine"))
    with pytest.raises(ToolchainError, match="where the server will have nothing"):
        check_package(package, MODEL)


class StartingTokenizer:
    """A double of a tokenizer that begins with a start token, as Llama's does."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(character) for character in text]
        return [1, *ids] if add_special_tokens else ids


@pytest.mark.parametrize("added", [True, False])
def test_missing_start_token(added: bool, tmp_path: Path) -> None:
    """be#234, be#445: garbage until add_special_tokens was true; the gate sees the token ids."""
    tokenizer = StartingTokenizer()
    equal = tokenizer_parity(tokenizer, tokenizer, ["a", "b"], add_special_tokens=added)
    (tmp_path / "validation.json").write_text(
        '{"prompts": 2, "token_agreement": 1.0, "logit_distance": {"largest": 0.0, "mean": 0.0}, '
        f'"tokenizer_parity": {{"prompts": 2, "equal": {equal}}}}}'
    )
    assert judge_parity(tmp_path, ParityGate()).passed is added


def test_key_value_cache_too_small(release: Release, tmp_path: Path) -> None:
    """be#366, be#168, TRT#494: by estimate before the build, and by the server's own metric."""
    assert release.spec.engine.toolchain == "tensorrt_llm"
    huge = write_hugging_face(
        tmp_path / "huge", num_hidden_layers=120, hidden_size=8192, intermediate_size=28672,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with pytest.raises(ToolchainError, match="does not fit"):
        release.toolchain.convert(huge, tmp_path / "output", release.spec.engine, release.tools)
    package = release.package(tmp_path / "package")
    release.toolchain.check_server(package, cache_metrics(8))
    # Before its first request a server says 0 of everything.
    for blocks in (7, 0):
        with pytest.raises(ToolchainError, match="KV cache is too small"):
            release.toolchain.check_server(package, cache_metrics(blocks))


def cache_metrics(blocks: int) -> str:
    """What Triton says of a KV cache with so many blocks of 32 tokens."""
    return "".join(
        f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{kind}",model="tensorrt_llm"}} '
        f"{value}\n"
        for kind, value in {"max": blocks, "tokens_per": 32}.items()
    )


def test_other_number_of_gpus(release: Release) -> None:
    """TRT#753: "Engine world size (2 * 1) != Runtime world size (1)"."""
    for tensor in (1, 4):
        spec = parse_spec(spec_text("engine", tensor), "test")
        judgement = judge_target(spec, release.engine, SETTINGS)
        assert not judgement.passed
        assert "another number of GPUs" in judgement.reason


def test_memory_kept_after_unloading() -> None:
    """be#48, srv#8969: also after a failed load; the next engine would lack it."""
    check_memory_released(before=2 * 2**30, after=2 * 2**30)
    with pytest.raises(ToolchainError, match="still held"):
        check_memory_released(before=2 * 2**30, after=60 * 2**30)


def test_reload_in_place() -> None:
    """srv#5757, srv#8117: a reload stalls requests, so a spec can ask for nothing else."""
    assert Rollout().strategy == "blue_green"
    with pytest.raises(ValidationError):
        Rollout.model_validate({"strategy": "reload"})


def test_two_models_of_one_name() -> None:
    """be#714, TRT#984: a server has one engine, and a model's name is none of its inner models."""
    for name in ("preprocessing", "postprocessing"):
        text = spec_text("engine").replace(f"name: {MODEL}", f"name: {name}")
        with pytest.raises(SpecError, match="line 1: name: is a model of every engine's package"):
            parse_spec(text, "test")
        parse_spec(text.replace("family: llama", "backend: llmapi"), "test")


def test_generator_that_cannot_count_is_refused() -> None:
    """llmapi repeats the answer in every piece, which AIPerf would count again: found out only
    when the package is in staging.
    """
    latency = "    staging: [{measure: end_to_end"
    text = spec_text("llmapi").replace(latency, f"    generator: aiperf\n{latency}")
    with pytest.raises(SpecError, match="AIPerf cannot count"):
        parse_spec(text, "test")
    parse_spec(text.replace("backend: llmapi", "family: llama"), "test")


def test_measured_with_pytorch_by_default(release: Release, tmp_path: Path) -> None:
    """TRT#8223: the default became PyTorch with 1.0, and it measured another model."""
    dataset = tmp_path / "dataset.jsonl"
    write_dataset([[1, 2]] * 8, 4, dataset)
    benchmark = Benchmark(
        backend="engine", model_name=MODEL, checkpoint=release.checkpoint,
        engine=release.engine, dataset=dataset, output=tmp_path, requests=8, concurrency=1,
        world_size=2,
    )  # fmt: skip
    command: list[Any] = benchmark.command()
    place = command.index("--backend")
    del command[place : place + 2]
    release.tools.run("trtllm-bench", command)
    with pytest.raises(ToolchainError, match="not about what serves"):
        read_level(benchmark)
