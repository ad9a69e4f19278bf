"""The timing cache saves time between builds and never lands where it does harm."""

from __future__ import annotations

from pathlib import Path

from llmops_assets.toolchains.tensorrt_llm.timing_cache import TimingCache
from llmops_assets.tools import ToolRunner

from .doubles.installation import Installation

H100 = "NVIDIA H100 80GB HBM3"
TENSORRT = "10.14.1.48"


def cache(folder: Path, work: Path, gpu: str = H100, tensorrt: str = TENSORRT) -> TimingCache:
    return TimingCache.of(folder, work, gpu=gpu, tensorrt=tensorrt)


def test_cache_is_kept_between_builds(
    installation: Installation, converted: Path, tools: ToolRunner, tmp_path: Path
) -> None:
    """The second build reads what the first one measured; none leaves one where it runs."""
    kept = tmp_path / "kept"
    sizes: list[int] = []
    for number in (1, 2):
        timings = cache(kept, tools.work)
        known = timings.prepare()
        assert (known is not None) == (number == 2)
        command = installation.command(
            "trtllm-build", "--checkpoint_dir", converted,
            "--output_dir", tmp_path / f"engine{number}",
            "--output_timing_cache", timings.written,
            *([] if known is None else ["--input_timing_cache", known]),
        )  # fmt: skip
        tools.run("build", command)
        assert timings.keep() is None
        sizes.append(timings.kept.stat().st_size)
    assert sizes[1] > sizes[0]
    assert [path.suffix for path in kept.iterdir()] == [".cache"]
    assert not (tools.work / "model.cache").exists()


def test_killed_build_leaves_the_kept_cache_alone(tmp_path: Path) -> None:
    """It works on a copy; what it left half-written is not read by the next."""
    first = cache(tmp_path / "kept", tmp_path / "work")
    first.prepare()
    first.written.write_bytes(b"whole")
    first.keep()
    killed = cache(tmp_path / "kept", tmp_path / "work")
    killed.prepare()
    killed.read.write_bytes(b"changed in place")
    killed.written.write_bytes(b"ha")
    following = cache(tmp_path / "kept", tmp_path / "work")
    following.prepare()
    assert following.read.read_bytes() == b"whole"
    assert not following.written.exists()


def test_lost_cache_is_told_and_no_error(tmp_path: Path) -> None:
    """It is found out when a whole engine is there, which took hours of a GPU."""
    timings = cache(tmp_path / "kept", tmp_path / "work")
    timings.prepare()
    assert "wrote no timing cache" in str(timings.keep())
    timings.written.touch()
    assert "wrote no timing cache" in str(timings.keep())
    assert not timings.kept.exists()
    timings.written.write_bytes(b"whole")
    (tmp_path / "kept").write_bytes(b"a file where the folder should be")
    assert "could not be kept" in str(timings.keep())


def test_each_gpu_and_version_has_its_own(tmp_path: Path) -> None:
    """Measurements of another GPU are wrong, and another version's are thrown away."""
    names = {
        cache(tmp_path, tmp_path, gpu, tensorrt).kept.name
        for gpu in (H100, "NVIDIA H100 PCIe", "../../etc/passwd")
        for tensorrt in (TENSORRT, "10.13.3.9")
    }
    assert len(names) == 6
    assert "nvidia-h100-80gb-hbm3-tensorrt-10.14.1.48.cache" in names
    assert all(cache(tmp_path, tmp_path, name).kept.parent == tmp_path for name in ("../x", "/x"))
