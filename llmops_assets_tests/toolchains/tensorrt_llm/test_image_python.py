"""The image's Python is found beside the platform's, and only it is asked for TensorRT-LLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmops_assets
from llmops_assets.errors import ToolchainError
from llmops_assets.settings import Settings
from llmops_assets.toolchains.tensorrt_llm import image_python
from llmops_assets.toolchains.tensorrt_llm.image_python import (
    find_python,
    toolkit_of,
    with_our_modules,
)

DIGEST = "sha256:" + "a" * 64
# A double of an interpreter: it runs the real question, with distributions of its own.
INTERPRETER = """#!{python} -S
import sys

sys.path.insert(0, {distributions!r})
assert sys.argv[1:3] == ["-I", "-c"], sys.argv
exec(sys.argv[3])
"""


def interpreter(folder: Path, **distributions: str) -> Path:
    """A double of a Python with these distributions."""
    for name, version in distributions.items():
        metadata = folder / "distributions" / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = folder / "python3"
    python.write_text(
        INTERPRETER.format(python=sys.executable, distributions=str(folder / "distributions"))
    )
    python.chmod(0o755)
    return python


def test_toolkit_is_what_that_python_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The platform's own environment has no TensorRT-LLM; a wheel's suffix is the same library,
    and what CUDA the image has is not what its driver supports.
    """
    monkeypatch.setenv("CUDA_VERSION", "13.0.2")
    python = interpreter(tmp_path, tensorrt_llm="1.2.1", tensorrt="10.14.1.48.post1")
    toolkit = toolkit_of(python, DIGEST)
    assert (toolkit.tensorrt_llm, toolkit.tensorrt) == ("1.2.1", "10.14.1.48")
    assert (toolkit.cuda, toolkit.image_digest) == ("13.0.2", DIGEST)


def test_tensorrt_is_gone_from_1_3_on(tmp_path: Path) -> None:
    """TensorRT-LLM is needed, TensorRT is not."""
    assert toolkit_of(interpreter(tmp_path, tensorrt_llm="1.3.0"), DIGEST).tensorrt is None


def test_python_without_tensorrt_llm_is_refused(tmp_path: Path) -> None:
    """The commonest mistake: the step runs in another image, or asks the platform's Python."""
    with pytest.raises(ToolchainError, match=r"not installed here.*LLMOPS_TENSORRT_LLM_PYTHON"):
        toolkit_of(interpreter(tmp_path), DIGEST)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/false\n")
    broken.chmod(0o755)
    with pytest.raises(ToolchainError, match="does not say which TensorRT-LLM"):
        toolkit_of(broken, DIGEST)


def test_python_is_found_outside_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An activated environment is first on the PATH, and its python3 has no TensorRT-LLM."""
    assert sys.prefix != sys.base_prefix, "tests run in a virtual environment"
    path = [f"{sys.prefix}/bin", str(interpreter(tmp_path).parent)]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    assert find_python(Settings()) == tmp_path / "python3"
    monkeypatch.setenv("PATH", path[0])
    with pytest.raises(ToolchainError, match="no python3 on the PATH"):
        find_python(Settings())


def test_settings_name_the_python(tmp_path: Path) -> None:
    """Where the image has several."""
    python = interpreter(tmp_path)
    assert find_python(Settings(tensorrt_llm_python=python)) == python
    with pytest.raises(ToolchainError, match="has tensorrt_llm"):
        find_python(Settings(tensorrt_llm_python=tmp_path / "none"))


def test_our_python_is_taken_where_it_has_tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody installed the platform into the image's Python all the same."""
    monkeypatch.setattr(image_python.importlib.util, "find_spec", lambda name: object())
    assert find_python(Settings()) == Path(sys.executable)


def test_image_gets_our_package_and_nothing_else_of_ours(tmp_path: Path) -> None:
    """Beside our package may lie NumPy, transformers and PyTorch in other versions, and NVIDIA
    tested TensorRT-LLM with those of its image; nor does the work folder's content count.
    """
    (tmp_path / "json.py").write_text("raise SystemExit('the working directory is searched')")
    environment = with_our_modules(tmp_path / "modules")
    assert with_our_modules(tmp_path / "modules") == environment  # after a killed step
    code = "import json, sys, llmops_assets.tools as ours; print(ours.__file__, sys.path[0])"
    # Without what is installed, as another interpreter sees it.
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, timeout=30,
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert Path(found[0]).resolve() == Path(llmops_assets.__path__[0]).resolve() / "tools.py"
    assert found[1] == str(tmp_path / "modules")
    assert [path.name for path in (tmp_path / "modules").iterdir()] == ["llmops_assets"]
