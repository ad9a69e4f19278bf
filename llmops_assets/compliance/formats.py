"""Scans every file of a directory for pickles, whatever they are called or packed in.

Unpickling runs code, so nothing here unpickles: opcodes are read with the standard
library's `pickletools`, and fickling says what they would do. Archives are looked into,
with bounds on everything that hostile bytes could make large.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickletools
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.report import Report
from llmops_assets.develop import checkpoints
from llmops_assets.errors import DataError

MEMBER = "!/"
"""Stands between an archive's name and that of its member."""

FRAME_MAGIC = tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))
NUMPY_MAGIC = b"\x93NUMPY"
COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
UNREADABLE = (
    OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
    tarfile.TarError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What the standard library raises on archives that are broken, encrypted or too new."""

IMPORTS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
CALLS = {"REDUCE", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}

_Step = tuple[pickletools.OpcodeInfo, object, int]
"""An opcode, its argument and its position in bytes."""


@dataclass(frozen=True)
class Limits:
    """How much of one directory is looked at; what is beyond is a problem, not skipped.

    `pickle_bytes` and `opcodes` count one pickle file, `members` and `unpacked_bytes` all
    archives of a directory, `depth` archives in archives.
    """

    pickle_bytes: int = 64 * 2**20
    opcodes: int = 1_000_000
    members: int = 10_000
    unpacked_bytes: int = 2**30
    depth: int = 4


class Pickle(BaseModel):
    """A pickle that was found.

    `path` is relative to the directory, with `!/` before the member of an archive;
    `severity` is fickling's, and `findings` says what loading it would do.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    severity: str
    findings: tuple[str, ...]


class FormatReport(Report):
    """What was found in a directory."""

    files: int = Field(description="Files looked at; members of archives are not counted.")
    pickles: tuple[Pickle, ...]


def scan_formats(directory: Path, limits: Limits | None = None) -> FormatReport:
    """Scans any directory, such as a package; every pickle in it is a problem.

    Raises:
        DataError: there is no such directory.
    """
    if not directory.is_dir():
        raise DataError(
            f"There is no folder {directory} to scan", cure="materialize the asset again"
        )
    scan = _Scan(limits or Limits())
    files = 0
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        folders.sort()
        for name in sorted(names + links):
            path = Path(folder, name)
            shown = ascii(path.relative_to(directory).as_posix())[1:-1]
            files += 1
            if not stat.S_ISREG(path.lstat().st_mode):
                scan.problems.append(f"{shown}: not a regular file; copy what it stands for")
                continue
            with path.open("rb") as file:
                scan.file(shown, file, depth=0)
    return FormatReport(problems=tuple(scan.problems), files=files, pickles=tuple(scan.pickles))


def scan_checkpoint(directory: Path, limits: Limits | None = None) -> FormatReport:
    """Scans a Hugging Face directory: as `scan_formats`, and by the rules of a checkpoint.

    Those allow safetensors and a few kinds of text only, see `checkpoints.inspect`.

    Raises:
        DataError: there is no such directory.
    """
    found = scan_formats(directory, limits)
    inspected = checkpoints.inspect(directory).problems
    return found.model_copy(
        update={"problems": tuple(dict.fromkeys((*inspected, *found.problems)))}
    )


@dataclass
class _Scan:
    limits: Limits
    problems: list[str] = field(default_factory=list)
    pickles: list[Pickle] = field(default_factory=list)
    members: int = 0
    unpacked: int = 0

    def file(self, name: str, file: IO[bytes], depth: int) -> None:
        """Looks at one file; a file can be several things at once (a polyglot)."""
        start = file.read(self.limits.pickle_bytes + 1)
        whole = len(start) <= self.limits.pickle_bytes
        if is_pickle(start, whole, self.limits.opcodes):
            self._pickle(name, start, whole)
        try:
            self._object_array(name, start, whole)
            self._archive(name, file, start, depth)
        except UNREADABLE as error:
            self.problems.append(
                f"{name}: an archive that cannot be read ({type(error).__name__}: {error}); "
                "remove it, or unpack it first"
            )

    def _pickle(self, name: str, data: bytes, whole: bool) -> None:
        severity, findings = _judge(data, whole, self.limits)
        self.pickles.append(Pickle(path=name, severity=severity, findings=findings))
        self.problems.append(
            f"{name}: a pickle, which runs code when loaded (fickling: {severity}"
            + (f"; {findings[0]}" if findings else "")
            + "); use safetensors or JSON"
        )

    def _object_array(self, name: str, data: bytes, whole: bool) -> None:
        """A NumPy array of objects is a pickle behind a header (`numpy.lib.format`)."""
        if not data.startswith(NUMPY_MAGIC):
            return
        from numpy.lib import format as numpy_format

        stream = io.BytesIO(data)
        version = numpy_format.read_magic(stream)
        header: Any = {
            (1, 0): numpy_format.read_array_header_1_0,
            (2, 0): numpy_format.read_array_header_2_0,
        }.get(version)
        if header is None or header(stream)[2].hasobject:
            self._pickle(name, data[stream.tell() :], whole)

    def _archive(self, name: str, file: IO[bytes], start: bytes, depth: int) -> None:
        members = self._members(file, start)
        for member, stream in members:
            if depth >= self.limits.depth:
                self._too_much(name, f"archives in archives, deeper than {self.limits.depth}")
                return
            self.members += 1
            if self.members > self.limits.members:
                self._too_much(name, f"more than {self.limits.members} members in archives")
                return
            inner = name + MEMBER + ascii(member)[1:-1]
            with tempfile.SpooledTemporaryFile(max_size=8 * 2**20) as copy, stream:
                while chunk := stream.read(2**20):
                    self.unpacked += len(chunk)
                    if self.unpacked > self.limits.unpacked_bytes:
                        self._too_much(inner, f"more than {self.limits.unpacked_bytes} bytes")
                        return
                    copy.write(chunk)
                copy.seek(0)
                self.file(inner, cast(IO[bytes], copy), depth + 1)

    def _members(self, file: IO[bytes], start: bytes) -> Iterator[tuple[str, IO[bytes]]]:
        """Names and contents of an archive's members; none for any other file."""
        for magic, opener in COMPRESSED:
            if start.startswith(magic):
                file.seek(0)
                yield "content", cast(IO[bytes], opener(file, "rb"))
        file.seek(0)
        # Looks for the directory at the end, so it also finds a zip behind something else.
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        yield info.filename, archive.open(info)
        # Never decompresses: a compressed tar comes by above, within bounds.
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r")
        except tarfile.ReadError:
            return
        with tar:
            for entry in tar:
                if (content := tar.extractfile(entry) if entry.isreg() else None) is not None:
                    yield entry.name, content

    def _too_much(self, name: str, what: str) -> None:
        self.problems.append(f"{name}: {what}, which is not looked at; unpack or remove it")


def is_pickle(data: bytes, whole: bool = True, opcodes: int = Limits.opcodes) -> bool:
    """Whether bytes are a pickle of any protocol, from their content alone.

    Protocols 0 and 1 have no magic number. Such a file is a pickle if it is one from its
    first to its last byte, or if an unpickler would come to import something and call it,
    for that has happened when it finds the rest broken.

    Args:
        data: a file's content, or its start.
        whole: whether it is all of the file.
        opcodes: how many to read at most; more mean that it is a pickle.
    """
    if data.startswith(FRAME_MAGIC):
        return True
    imported = False
    stopped_at = -1
    for count, (opcode, argument, position) in enumerate(_reached(data), start=1):
        if count > opcodes:
            return True
        name = opcode.name
        if name in IMPORTS:
            # An argument is "module name", from two lines that in a text hold more words.
            plausible = str(argument).count(" ") <= 1
            if name == "INST" and plausible:
                return True
            imported = imported or plausible
        elif imported and name in CALLS:
            return True
        elif name == "STOP":
            stopped_at = position
    return whole and 0 <= stopped_at == len(data) - 1


def _reached(data: bytes) -> Iterator[_Step]:
    """The opcodes that an unpickler would run before it finds its stack too short."""
    depth, marks = 0, list[int]()
    for opcode, argument, position in _opcodes(data):
        taken = opcode.stack_before
        if pickletools.markobject in taken:
            if not marks:
                return
            depth = marks.pop()
            taken = taken[: taken.index(pickletools.markobject)]
        elif opcode.name == "POP" and marks and marks[-1] == depth - 1:
            marks.pop()
        depth -= len(taken)
        if depth < (marks[-1] + 1 if marks else 0):
            return
        if opcode.name == "MARK":
            marks.append(depth)
        depth += len(opcode.stack_after)
        if opcode.name == "STOP":
            depth, marks = 0, []
        yield opcode, argument, position


def _opcodes(data: bytes) -> Iterator[_Step]:
    """The opcodes of pickles that follow each other, up to the first that is none."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        try:
            for opcode, argument, position in pickletools.genops(stream):
                yield opcode, argument, cast(int, position)
        except ValueError:
            return


def _judge(data: bytes, whole: bool, limits: Limits) -> tuple[str, tuple[str, ...]]:
    """fickling's severity, and what it says of each unsafe step."""
    from fickling.analysis import Severity, check_safety
    from fickling.fickle import Pickled

    unknown = Severity.LIKELY_UNSAFE.name
    if not whole:
        return unknown, (f"larger than {limits.pickle_bytes} bytes, too large to judge",)
    if sum(1 for _ in islice(_opcodes(data), limits.opcodes + 1)) > limits.opcodes:
        return unknown, (f"more than {limits.opcodes} opcodes, too many to judge",)
    stream = io.BytesIO(data)
    worst, findings = Severity.LIKELY_SAFE, list[str]()
    try:
        while stream.tell() < len(data):
            pickled = Pickled.load(stream, fail_on_decode_error=False)
            if len(pickled) == 0:
                break
            results = check_safety(pickled)
            worst = max(worst, results.severity)
            findings += [str(result).replace("\n", " ") for result in results.results]
    except (
        NotImplementedError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        # fickling does not know every opcode, and trips over what it calls malformed. Not
        # understood is not safe.
        worst = max(worst, Severity.LIKELY_UNSAFE)
        findings.append(f"fickling cannot read all of it ({type(error).__name__}: {error})")
    return worst.name, tuple(dict.fromkeys(findings))
