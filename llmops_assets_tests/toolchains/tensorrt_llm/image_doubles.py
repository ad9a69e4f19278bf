"""A double of a TensorRT-LLM image: the doubles of its tools, its templates and its GPUs."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llmops_assets.settings import Settings
from llmops_assets.toolchains.tensorrt_llm import toolchain
from llmops_assets.toolchains.tensorrt_llm.image import Image

from .doubles.installation import PACKAGE, REPOSITORY, Installation, install
from .sidecars import H100, TOOLKIT

TEMPLATES = Path(__file__).parent / "template_doubles"

PYTHON = """#!{python}
'''The image's Python: it runs scripts, and a double of our validation instead of that.'''
import os
import runpy
import sys

sys.path.insert(0, {repository!r})
sys.argv.pop(0)
if sys.argv[0] == "-m":
    assert sys.argv[1] == "llmops_assets.toolchains.tensorrt_llm.validation", sys.argv
    assert os.listdir(os.environ["PYTHONPATH"]) == ["llmops_assets"], "of ours, nothing else"
    sys.argv.pop(0)
    runpy.run_module("{package}.validation_double", run_name="__main__")
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Surroundings:
    """Where the steps of a test run; a test may move on to another image or other GPUs."""

    installation: Installation
    image: Image

    def move(self, **changes: Any) -> None:
        """Changes facts of the toolkit (`toolkit`) or of the GPUs (`gpus`)."""
        parts = {
            name: getattr(self.image, name).model_copy(update=update)
            for name, update in changes.items()
        }
        self.image = replace(self.image, **parts)


def enter_image(monkeypatch: pytest.MonkeyPatch, root: Path) -> Surroundings:
    """Lets every step of this process, and what it starts, run in an image below `root`.

    It has two H100. What would read the digest, the distributions and NVML is replaced; the
    tools are found on the PATH, as in a real image.
    """
    installation = install(root)
    shutil.copytree(TEMPLATES, root / "app" / "all_models")
    python = installation.bin / "python3"
    text = PYTHON.format(python=sys.executable, repository=str(REPOSITORY), package=PACKAGE)
    python.write_text(text, encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(installation.bin), prepend=":")
    here = Surroundings(installation, Image(toolkit=TOOLKIT, gpus=H100, root=root, python=python))

    def image_double(settings: Settings) -> Image:
        return here.image

    monkeypatch.setattr(toolchain, "image_here", image_double)
    return here
