"""The image's own Python, which has TensorRT-LLM.

The platform lives beside it in a virtual environment of its own: installed into the image's
Python it would replace packages that NVIDIA tested TensorRT-LLM with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.version import Version

import llmops_assets
from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.toolchains.tensorrt_llm.sidecar import Toolkit

SECONDS_TO_START = 60.0
DISTRIBUTIONS = """
import importlib.metadata, json
found = {}
for name in ("tensorrt_llm", "tensorrt"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def find_python(settings: Settings) -> Path:
    """The interpreter that has TensorRT-LLM.

    The one of the settings; else this one, if TensorRT-LLM is installed here; else the
    `python3` on the PATH outside of the virtual environment that this process runs in.

    Raises:
        ToolchainError: there is none.
    """
    if settings.tensorrt_llm_python is not None:
        found = shutil.which(settings.tensorrt_llm_python)
    elif importlib.util.find_spec("tensorrt_llm") is not None:
        found = sys.executable
    else:
        found = shutil.which("python3", path=_path_outside())
    if found is None:
        raise ToolchainError(
            "There is no Python of the image of TensorRT-LLM",
            expected="an interpreter that has tensorrt_llm",
            found=settings.tensorrt_llm_python or "no python3 on the PATH",
            cure="run the step in that image, or set LLMOPS_TENSORRT_LLM_PYTHON to its Python",
        )
    return Path(found)


def _path_outside() -> str:
    """The PATH without this process's virtual environment."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if sys.prefix == sys.base_prefix:
        return os.pathsep.join(folders)
    ours = Path(sys.prefix, "bin").resolve()
    return os.pathsep.join(folder for folder in folders if Path(folder).resolve() != ours)


def toolkit_of(python: Path, image_digest: str) -> Toolkit:
    """The versions that an interpreter has, which is the one of the image that builds.

    Raises:
        ToolchainError: it cannot be asked, or has no TensorRT-LLM.
    """
    try:
        answer = subprocess.run(
            # Isolated: what the image has, not what this process's environment adds to it.
            [python, "-I", "-c", DISTRIBUTIONS],
            capture_output=True, text=True, check=True, timeout=SECONDS_TO_START,
        ).stdout  # fmt: skip
        versions: Mapping[str, str | None] = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ToolchainError(
            f"{python} does not say which TensorRT-LLM it has",
            expected="the image's Python",
            found=error,
            cure="set LLMOPS_TENSORRT_LLM_PYTHON to the Python that has tensorrt_llm",
        ) from error
    if (tensorrt_llm := versions["tensorrt_llm"]) is None:
        raise ToolchainError(
            "TensorRT-LLM is not installed here",
            expected="the image of TensorRT-LLM that the settings name",
            found=f"no distribution tensorrt_llm in {python}",
            cure="run the step in that image, or set LLMOPS_TENSORRT_LLM_PYTHON to the Python "
            "that has it",
        )
    tensorrt = versions["tensorrt"]
    return Toolkit(
        tensorrt_llm=tensorrt_llm,
        # Wheels of it may be called 10.14.1.48.post1, which is the same library.
        tensorrt=None if tensorrt is None else Version(tensorrt).base_version,
        image_digest=image_digest,
        cuda=os.environ.get("CUDA_VERSION"),
    )


def with_our_modules(folder: Path) -> dict[str, str]:
    """Environment in which the image's Python finds this package, and nothing else of ours.

    Args:
        folder: of the step's own; a link to the package is put there, as beside the package
            may lie all that is installed with it, in versions that are not the image's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / llmops_assets.__name__
    link.unlink(missing_ok=True)
    link.symlink_to(Path(llmops_assets.__path__[0]).resolve(), target_is_directory=True)
    # Nor does what lies in the working directory count as a module (Python 3.11 on).
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
