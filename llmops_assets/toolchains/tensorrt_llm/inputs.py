"""What TensorRT-LLM's tools may be given: no code in a checkpoint, no data from a network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from llmops_assets.errors import ToolchainError

OFFLINE_CALIBRATION = {"HF_DATASETS_OFFLINE": "1"}
"""Environment of tools that calibrate. Their default is to download a dataset; the tool
runner keeps models from being downloaded, this the datasets of the library `datasets`."""

CALIBRATION_SUFFIXES = {".parquet", ".jsonl", ".json", ".csv", ".txt", ".arrow"}


def refuse_code(checkpoint: Path) -> None:
    """Refuses a Hugging Face directory that could run code of its own.

    The conversion scripts load the configuration with `trust_remote_code=True`
    (`AutoConfig` in `convert_checkpoint.py`), so an `auto_map` in it is an order to import
    Python from the directory, or from the network. The checkpoint's own gate looks for far
    more, but a conversion must not rely on who called it.

    Raises:
        ToolchainError: it holds a file of code, or a configuration that names some.
    """
    # NumPy comes with it.
    from llmops_assets.develop.checkpoints import code_keys

    problems = _code_files(checkpoint)
    for path in _files(checkpoint):
        if path.suffix.lower() == ".json":
            name = path.relative_to(checkpoint).as_posix()
            try:
                content = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                problems.append(f"{name} cannot be read ({error})")
                continue
            problems += [f"{name} has {key}" for key in code_keys(content)]
    if problems:
        raise ToolchainError(
            f"{checkpoint} could run code of its own while it is converted",
            expected="safetensors, JSON and text, without auto_map or Python files",
            found="; ".join(problems),
            cure="save the model as an architecture that transformers has itself, without code",
        )


def calibration_data(path: Path) -> Path:
    """A local dataset for `--calib_dataset`, as an absolute path.

    `convert_checkpoint.py` and `quantize.py` take the name of a dataset as well and download
    it, which would leave no trace of what the weights were calibrated with. The library
    `datasets` runs a Python script that it finds in a local folder, so there may be none.

    Raises:
        ToolchainError: there is no such folder, it holds no data, or it holds code.
    """
    folder = path.expanduser()
    if not folder.is_dir():
        raise ToolchainError(
            f"There is no calibration data at {path}",
            expected="a folder on this machine; nothing is downloaded",
            found=f"{path}, which is no folder",
            cure="put the rows into a folder as Parquet or JSON Lines, and name the folder",
        )
    if code := _code_files(folder):
        raise ToolchainError(
            f"The calibration data at {path} hold code, which would be run",
            expected="files of " + ", ".join(sorted(CALIBRATION_SUFFIXES)),
            found="; ".join(code),
            cure="put nothing but the rows into that folder",
        )
    data = [file for file in _files(folder) if file.suffix.lower() in CALIBRATION_SUFFIXES]
    if not any(file.stat().st_size for file in data):
        raise ToolchainError(
            f"The calibration data at {path} hold no rows",
            expected="files of " + ", ".join(sorted(CALIBRATION_SUFFIXES)),
            found=", ".join(file.name for file in data) or "none",
            cure="put the rows into that folder as Parquet or JSON Lines",
        )
    return folder.resolve()


def _code_files(directory: Path) -> list[str]:
    # NumPy comes with it.
    from llmops_assets.develop.checkpoints import CODE_SUFFIXES

    return [
        f"{path.relative_to(directory).as_posix()} is code"
        for path in _files(directory)
        if CODE_SUFFIXES & {suffix.lower() for suffix in path.suffixes}
    ]


def _files(directory: Path) -> Iterator[Path]:
    """Everything below a directory but its folders; links to folders are not followed."""
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            yield Path(folder, name)
