"""Pickles under any name and in any archive: each is found, and none runs its code."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmops_assets.compliance.formats import (
    FormatReport,
    Limits,
    is_pickle,
    scan_checkpoint,
    scan_formats,
)
from llmops_assets.errors import DataError

from ..tiny_llama import write_checkpoint


class Hostile:
    """Would make this process exit when unpickled."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return sys.exit, (3,)


def hostile(protocol: int = 4) -> bytes:
    return pickle.dumps(Hostile(), protocol=protocol)


def zipped(content: bytes, name: str = "data.txt") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def tarred(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("notes/read me.md")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def object_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Hostile()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def torch_save(new_zip: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, stream, _use_new_zipfile_serialization=new_zip)
    return stream.getvalue()


def scan(folder: Path, content: bytes, limits: Limits | None = None) -> FormatReport:
    (folder / "notes.md").write_bytes(content)
    return scan_formats(folder, limits)


@pytest.mark.parametrize(
    ("content", "path"),
    [
        *((hostile(protocol), "notes.md") for protocol in range(6)),
        # Runs on load although the rest is broken.
        (hostile(0)[:-1] + b"\xff\xff", "notes.md"),
        (b"(S'true'\nios\nsystem\n", "notes.md"),
        (b"text" + zipped(hostile()), "notes.md!/data.txt"),
        (zipped(hostile(0)), "notes.md!/data.txt"),
        (zipped(zipped(hostile())), "notes.md!/data.txt!/data.txt"),
        (tarred(hostile()), "notes.md!/notes/read me.md"),
        (gzip.compress(tarred(hostile())), "notes.md!/content!/notes/read me.md"),
        (gzip.compress(hostile()), "notes.md!/content"),
        (bz2.compress(hostile()), "notes.md!/content"),
        (lzma.compress(hostile()), "notes.md!/content"),
        (object_array(), "notes.md"),
    ],
)
def test_hostile_pickle_is_found(tmp_path: Path, content: bytes, path: str) -> None:
    """Loaders look at bytes, not names; so must whoever protects them."""
    report = scan(tmp_path, content)
    (found,) = report.pickles
    assert found.path == path
    assert found.severity not in ("LIKELY_SAFE", "POSSIBLY_UNSAFE")
    (problem,) = report.problems
    assert problem.startswith(f"{path}: a pickle, which runs code")


@pytest.mark.parametrize("new_zip", [True, False])
def test_checkpoint_of_torch_is_found(tmp_path: Path, new_zip: bool) -> None:
    """The commonest pickle of all, in its two formats; fickling must get through both."""
    report = scan(tmp_path, torch_save(new_zip))
    assert report.pickles
    assert not report.passed


def test_harmless_pickle_is_found_too(tmp_path: Path) -> None:
    """Only safetensors and text belong here; fickling may be wrong about what is harmless."""
    report = scan(tmp_path, pickle.dumps({"a": [1, "b"]}))
    assert [found.severity for found in report.pickles] == ["LIKELY_SAFE"]
    assert not report.passed


@pytest.mark.parametrize(
    "content",
    [
        b"", b".", b"1.0\n", b"12.", b"0.5", b"N.B. This is text.", b"import os\nimport sys\n",
        b"class Model:\n    pass\n", b"cat\ndog\nRabbit\n", b"in\nto\nof\n", b"(if you\nlike it\n)",
        b"# Title\n", b'{"a": 1}', b"[]", zipped(b"text"), tarred(b"text"), gzip.compress(b"text"),
        "Größe".encode(), b"PK\x03\x04 is how a zip starts", bytes(1024), b"\x80",
    ],
)  # fmt: skip
def test_what_is_no_pickle_passes(tmp_path: Path, content: bytes) -> None:
    """Protocol 0 is text, and much text starts like it."""
    report = scan(tmp_path, content)
    assert report.problems == ()
    assert report.files == 1


def test_array_of_numbers_is_no_pickle(tmp_path: Path) -> None:
    """The header says whether a pickle follows."""
    stream = io.BytesIO()
    np.save(stream, np.arange(5))
    assert scan(tmp_path, stream.getvalue()).passed


def bomb(depth: int) -> bytes:
    content = b"text"
    for _ in range(depth):
        content = zipped(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(bytes(300_000)), "more than 200000 bytes"),
        (gzip.compress(bytes(300_000)), "more than 200000 bytes"),
        (bomb(4), "deeper than 2"),
        (b"\x80\x04" + b"N" * 2000 + b".", "more than 1000 opcodes"),
        (b"\x80\x04" + bytes(70_000), "larger than 65536 bytes"),
        (b"N" * 2000, "more than 1000 opcodes"),
        (zipped(b"text")[:-30], None),
        (gzip.compress(b"text" * 1000)[:-20], "an archive that cannot be read"),
        (tarred(b"text" * 1000)[:2000], "an archive that cannot be read"),
    ],
)
def test_bytes_that_would_be_large_are_refused(
    tmp_path: Path, content: bytes, message: str | None
) -> None:
    """A bomb must neither fill the memory nor hide what is behind the limit."""
    limits = Limits(pickle_bytes=65536, opcodes=1000, members=100, unpacked_bytes=200_000, depth=2)
    report = scan(tmp_path, content, limits)
    if message is None:  # a zip without its directory is not one, for anybody
        assert report.passed
    else:
        assert message in report.problems[0]


def test_many_members_are_refused(tmp_path: Path) -> None:
    """A member costs time however small it is."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(20):
            archive.writestr(str(number), b"")
    report = scan(tmp_path, stream.getvalue(), Limits(members=10))
    assert report.problems == (
        "notes.md: more than 10 members in archives, which is not looked at; unpack or remove it",
    )


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """It could lead out of the folder, or into itself."""
    (tmp_path / "loop").symlink_to(".")
    assert "loop: not a regular file" in scan_formats(tmp_path).problems[0]


def test_clean_checkpoint_passes_and_a_hidden_pickle_fails_it(tmp_path: Path) -> None:
    """The rules of a checkpoint and the scan for pickles together, on real files."""
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    clean = scan_checkpoint(checkpoint)
    assert clean.problems == ()
    assert clean.files == len(list(checkpoint.iterdir()))
    # Text for the rules of a checkpoint, a pickle for whoever loads it.
    (checkpoint / "notes.txt").write_bytes(hostile(0))
    (checkpoint / "extra.json").write_text(json.dumps({"trust_remote_code": True}))
    problems = scan_checkpoint(checkpoint).problems
    assert [problem.split(":")[0] for problem in problems] == ["extra.json", "notes.txt"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Nothing found because nothing was looked at is no pass."""
    with pytest.raises(DataError, match="There is no folder"):
        scan_formats(tmp_path / "gone")


def test_start_of_a_large_file_is_judged_by_what_is_there() -> None:
    """Weights are read in part only; the end of the part is not the end of a pickle."""
    assert is_pickle(b"N.")
    assert not is_pickle(b"N.", whole=False)
    assert is_pickle(hostile(0) + b"more", whole=False)
