"""Importing a Hugging Face directory, and finding out whether it is safe and complete.

Nothing here trusts the files: none is unpickled, no code of theirs is run or imported,
and memory stays bounded however large they are. What is not known to be harmless is a
problem, so a new way to smuggle code in has to be allowed before it can pass.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import DataError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What is taken from places that also hold other things: the same weights as pickles, the
# environment of a training run, plots.
PARTS = (
    "*.safetensors", "*.safetensors.index.json", CONFIG_FILE, "generation_config.json",
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip

TEXT_SUFFIXES = {".txt", ".md", ".jinja", ".tiktoken"}
TEXT_NAMES = {"LICENSE", "NOTICE", "USE_POLICY", ".gitattributes", ".gitignore"}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
CODE_SUFFIXES = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".exe"}

# How a file starts that can hold a pickle or hide one (PEP 3154 and pickletools for the
# pickle protocols from 2 on; torch.save writes a zip since 1.6 and wrote a tar before).
MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes around a pickle"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x93NUMPY", "a NumPy file, which can hold a pickle"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x7fELF", "a program"),
    (b"\x89HDF", "an HDF5 file, which can hold code"),
)
TAR_MAGIC_AT, TAR_MAGIC = 257, b"ustar"

# A config key that makes transformers import code from the directory or the network.
CODE_KEYS = ("auto_map", "custom_pipelines")
TRUST_KEY = "trust_remote_code"

LARGEST_TEXT_BYTES = 128 * 2**20
CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FloatFormat:
    """How a non-finite number looks: the bits of `mask` that are all set.

    `unsigned` is the NumPy type of the same width that the bits are read as.
    """

    unsigned: str
    mask: int


EXACT_FORMATS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Types whose every value is a finite number."""

# Names as safetensors writes them. In E4M3 ("FN") only NaN exists, with all other bits
# set; in the IEEE formats an exponent of ones means infinity or NaN.
FLOAT_FORMATS = {
    "F64": FloatFormat("<u8", 0x7FF0_0000_0000_0000),
    "F32": FloatFormat("<u4", 0x7F80_0000),
    "F16": FloatFormat("<u2", 0x7C00),
    "BF16": FloatFormat("<u2", 0x7F80),
    "F8_E5M2": FloatFormat("u1", 0x7C),
    "F8_E4M3": FloatFormat("u1", 0x7F),
}


@dataclass(frozen=True)
class CheckpointReport:
    """What was found in a checkpoint; it is good if there are no problems.

    `parameters` counts the numbers in the weights that transformers would load, `dtypes`
    are theirs by their safetensors names, `files` are relative paths of all files, and
    `size` is the sum of their sizes in bytes.
    """

    problems: tuple[str, ...]
    parameters: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file; `begin` and `end` are bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def parameters(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


def parts(names: Iterable[str]) -> list[str]:
    """Those of the names in a folder that belong to a checkpoint, in order."""
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, part) for part in PARTS))


def import_checkpoint(source: Path, output: Path) -> None:
    """Copies a Hugging Face directory as it is; `inspect` judges the copy.

    Nothing is left out, so that a dangerous file is seen and refused by name rather than
    silently dropped. A symbolic link to a file inside the directory becomes a copy of it.

    Args:
        source: the directory.
        output: directory to write; must not exist.

    Raises:
        DataError: the source is no directory, or holds a link that leaves it, a link to
            a directory, a device, a socket or a pipe.
        ToolError: the output exists.
    """
    if not source.is_dir():
        raise DataError(
            f"There is no checkpoint folder {source}",
            expected="a Hugging Face directory",
            cure="check weights.path in the model's spec",
        )
    root = source.resolve()
    with whole_directory(output) as folder:
        for path in _entries(root):
            relative = path.relative_to(root)
            target = path.resolve() if path.is_symlink() else path
            if not target.is_relative_to(root):
                raise DataError(
                    f"{relative} in the checkpoint {source} links to {target}, which is outside",
                    expected="a directory that holds all its files itself",
                    cure="copy the checkpoint with its links followed (`cp -rL`), import the copy",
                )
            copy = folder / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy_regular(target, copy)


def inspect(directory: Path) -> CheckpointReport:
    """Looks at every file of a Hugging Face directory; safe on hostile ones.

    Raises:
        DataError: there is no such directory.
    """
    if not directory.is_dir():
        raise DataError(
            f"There is no checkpoint folder {directory}", cure="materialize the checkpoint again"
        )
    problems: list[str] = []
    tensors: dict[str, tuple[Tensor, ...]] = {}
    configs: dict[str, Any] = {}
    files: list[str] = []
    size = 0
    for path in sorted(_entries(directory)):
        name = path.relative_to(directory).as_posix()
        files.append(name)
        if not name.isprintable():
            problems.append(f"{name!a}: a name that cannot be shown; rename or remove the file")
            continue
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{name}: not a regular file; copy what it stands for")
            continue
        size += status.st_size
        if (problem := _disguise(path, name)) is not None:
            problems.append(f"{name}: {problem}")
        elif path.suffix == ".safetensors":
            tensors[name] = tuple(_inspect_weights(path, name, problems))
        elif path.suffix == ".json":
            _inspect_json(path, name, status.st_size, configs, problems)
        elif path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES:
            _inspect_text(path, name, status.st_size, problems)
        elif path.suffix != ".model":
            problems.append(f"{name}: not a kind of file that belongs into a checkpoint; remove it")
    problems += _missing(configs, files)
    loaded = _loaded_weights(tensors, configs, files, problems)
    return CheckpointReport(
        problems=tuple(problems),
        parameters=sum(tensor.parameters for tensor in loaded),
        dtypes=tuple(sorted({tensor.dtype for tensor in loaded})),
        files=tuple(files),
        size=size,
    )


def _entries(directory: Path) -> Iterator[Path]:
    """Everything below a directory but its folders; links are not followed."""
    for folder, folders, names in os.walk(directory):
        for name in folders:
            if Path(folder, name).is_symlink():
                yield Path(folder, name)
        for name in names:
            yield Path(folder, name)


def _copy_regular(source: Path, copy: Path) -> None:
    # Opened without following a link or waiting for a pipe, then checked: the answer is
    # about the file that is read, even if somebody swaps it meanwhile.
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(
            f"{source} cannot be copied", found=error, cure="mend or remove it"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(
            f"{source} is not a regular file",
            expected="files, folders, and links to files inside the checkpoint",
            cure="remove it from the checkpoint",
        )
    with os.fdopen(descriptor, "rb") as reader, copy.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)


def _disguise(path: Path, name: str) -> str | None:
    """Why a file is dangerous by its name or its first bytes, or None."""
    suffixes = {suffix.lower() for suffix in PurePosixPath(name).suffixes}
    if found := sorted(suffixes & CODE_SUFFIXES):
        return f"code ({found[0]}); a checkpoint holds none, remove it"
    if found := sorted(suffixes & PICKLE_SUFFIXES):
        return f"may hold a pickle ({found[0]}), which runs code when loaded; use safetensors"
    with path.open("rb") as file:
        start = file.read(TAR_MAGIC_AT + len(TAR_MAGIC))
    if path.suffix == ".safetensors":
        # Its first eight bytes are a length, of which any value could look like magic;
        # the parser, which accepts nothing else, decides.
        return None
    for magic, what in MAGIC:
        if start.startswith(magic):
            return f"its content is {what}; use safetensors, or remove it"
    if start[TAR_MAGIC_AT:] == TAR_MAGIC:
        return "its content is a tar archive; use safetensors, or remove it"
    return None


def _inspect_weights(path: Path, name: str, problems: list[str]) -> Iterator[Tensor]:
    # Part of the extra `cpu`; needed by whoever looks at weights.
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks the header: that it is JSON of a sane size, that tensors lie
        # side by side, fill the file exactly and have the length their shape says.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        problems.append(f"{name}: not a whole safetensors file ({error}); write it again")
        return
    for tensor in _header(path):
        if tensor.dtype not in FLOAT_FORMATS and tensor.dtype not in EXACT_FORMATS:
            problems.append(
                f"{name}: {tensor.name} has the type {tensor.dtype}, whose values "
                "cannot be checked; export it in a floating-point or integer type"
            )
        elif not _is_finite(path, tensor):
            problems.append(f"{name}: {tensor.name} holds NaN or infinity; train or export again")
        yield tensor


def _header(path: Path) -> Iterator[Tensor]:
    """The tensors of a file whose header is known to be valid (format: safetensors README)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield Tensor(
                name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end
            )


def _is_finite(path: Path, tensor: Tensor) -> bool:
    """Reads one tensor in chunks. NumPy has no bfloat16, so bits are compared, not numbers."""
    float_format = FLOAT_FORMATS.get(tensor.dtype)
    if float_format is None:
        return True  # an exact format
    with path.open("rb") as file:
        file.seek(tensor.begin)
        remaining = tensor.end - tensor.begin
        while remaining:
            chunk = file.read(min(CHUNK_BYTES, remaining))
            if not chunk:
                return False
            remaining -= len(chunk)
            bits = np.frombuffer(chunk, dtype=float_format.unsigned)
            # Of the bits' own type: NumPy 1 would compare 64 bits with an int as floats.
            mask = bits.dtype.type(float_format.mask)
            if ((bits & mask) == mask).any():
                return False
    return True


def _inspect_json(
    path: Path, name: str, size: int, configs: dict[str, Any], problems: list[str]
) -> None:
    if size > LARGEST_TEXT_BYTES:
        problems.append(f"{name}: larger than {LARGEST_TEXT_BYTES} bytes, too large for a config")
        return
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}: not JSON ({error}); write it again")
        return
    configs[name] = content
    problems += [
        f"{name}: {key} asks transformers to run code; remove it and what it names"
        for key in code_keys(content)
    ]


def code_keys(content: object) -> list[str]:
    """Keys at any depth that ask for code.

    In a vocabulary such a word is a token, and its value a number.
    """
    found: set[str] = set()
    queue: list[object] = [content]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            found |= {key for key in CODE_KEYS if isinstance(value.get(key), dict | list | str)}
            if value.get(TRUST_KEY) is True:
                found.add(TRUST_KEY)
            value = list(value.values())
        if isinstance(value, list):
            queue += [child for child in value if isinstance(child, dict | list)]
    return sorted(found)


def _inspect_text(path: Path, name: str, size: int, problems: list[str]) -> None:
    if size > LARGEST_TEXT_BYTES:
        problems.append(f"{name}: larger than {LARGEST_TEXT_BYTES} bytes, too large for text")
        return
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        problems.append(f"{name}: not UTF-8 text ({error}); remove it")
        return
    if "\0" in text:
        problems.append(f"{name}: holds null characters, so it is not text; remove it")


def _missing(configs: Mapping[str, Any], files: list[str]) -> Iterator[str]:
    if CONFIG_FILE not in files:
        yield f"{CONFIG_FILE}: missing; save the model with `save_pretrained`"
    elif CONFIG_FILE in configs:
        config = configs[CONFIG_FILE]
        if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
            yield f"{CONFIG_FILE}: names no model_type; save the model with `save_pretrained`"
    if TOKENIZER_FILE not in files:
        yield f"{TOKENIZER_FILE}: missing; save a fast tokenizer with `save_pretrained`"


def _loaded_weights(
    tensors: Mapping[str, tuple[Tensor, ...]],
    configs: Mapping[str, Any],
    files: list[str],
    problems: list[str],
) -> list[Tensor]:
    """The tensors that transformers would load: of one file, or of those an index names."""
    if WEIGHTS_FILE in files:
        return list(tensors.get(WEIGHTS_FILE, ()))
    if INDEX_FILE not in files:
        problems.append(f"{WEIGHTS_FILE}: missing, and no {INDEX_FILE} either; export the weights")
        return []
    index = configs.get(INDEX_FILE)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        problems.append(f"{INDEX_FILE}: no weight_map; export the weights again")
        return []
    for shard in sorted({str(shard) for shard in places.values()} - set(tensors)):
        problems.append(
            f"{INDEX_FILE}: names {shard!r}, which is no safetensors file here; export again"
        )
    loaded: list[Tensor] = []
    for shard in sorted({str(shard) for shard in places.values()} & set(tensors)):
        held = {tensor.name: tensor for tensor in tensors[shard]}
        named = [name for name, place in places.items() if place == shard]
        for name in named:
            if name in held:
                loaded.append(held[name])
            else:
                problems.append(f"{INDEX_FILE}: {shard} does not hold {name}; export again")
    return loaded
