"""The timing cache of TensorRT, kept between builds.

It holds the measured speed of kernels, so that a later build need not measure them again.
It only saves time: a build with a lost or foreign cache measures anew. Measurements are
those of one GPU and one version of TensorRT, so each pair of them has its own cache.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmops_assets.develop.directory import replace_file


@dataclass(frozen=True)
class TimingCache:
    """A cache that outlives builds, and the copy that one build works on.

    `kept` is the file between builds; `read` and `written` lie in the build's work folder.
    """

    kept: Path
    read: Path
    written: Path

    @classmethod
    def of(cls, folder: Path, work: Path, *, gpu: str, tensorrt: str) -> TimingCache:
        """The cache for one GPU and one version of TensorRT.

        Args:
            folder: keeps the caches of all GPUs and versions.
            work: the work folder of the build.
            gpu: name of the GPU, such as `NVIDIA H100 80GB HBM3`.
            tensorrt: version of TensorRT, such as `10.14.1.48`.
        """
        name = re.sub(r"[^a-z0-9.]+", "-", f"{gpu} tensorrt {tensorrt}".lower()).strip("-")
        return cls(
            kept=folder / f"{name}.cache",
            read=work / "timing-before.cache",
            written=work / "timing-after.cache",
        )

    def prepare(self) -> Path | None:
        """Copies the kept cache into the work folder, as two builds may run at once.

        Returns:
            The copy, for `--input_timing_cache`; None if there is no cache yet. What the build
            measures must go to `written`, by `--output_timing_cache`: the flag's default,
            `model.cache`, would land in whatever folder the tool was started in.
        """
        self.read.parent.mkdir(parents=True, exist_ok=True)
        for left in (self.read, self.written):
            left.unlink(missing_ok=True)
        if not self.kept.is_file():
            return None
        return shutil.copyfile(self.kept, self.read)

    def keep(self) -> str | None:
        """Keeps what the build measured; called when its engine is whole.

        Of two builds that end together one wins; no reader sees half a file.

        Returns:
            Why nothing was kept, for people; None if it was. It costs the next build time,
            and is no reason to throw an engine away.
        """
        if not self.written.is_file() or self.written.stat().st_size == 0:
            return "trtllm-build wrote no timing cache, so the next build measures anew"
        # A name of its own, as two builds may keep theirs at once.
        partial = self.kept.with_name(f"{self.kept.name}.{os.getpid()}.partial")
        try:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.written, partial)
            replace_file(partial, self.kept)
        except OSError as error:
            return f"the timing cache could not be kept, so the next build measures anew: {error}"
        return None
