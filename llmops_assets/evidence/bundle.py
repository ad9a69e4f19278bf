"""The bundle: all evidence about some releases, in one file that needs nothing else.

It is a zip archive with

    README.txt                 how to check it, with and without this platform
    trust_root.json            the public keys; its SHA-256 is the trust root's fingerprint
    checkpoint.json            the signed checkpoint that everything is proven against
    attestations.intoto.jsonl  the signed statements, oldest first: in-toto's bundle format
    leaves.jsonl               of each statement its leaf, the checkpoint signed with it, and
                               the proofs that both belong to the log of checkpoint.json
    anchored.jsonl             heads of the log that somebody else holds, with their proofs
    releases/...               documents that the statements speak of

There is one way only to write the same content: canonical JSON in a canonical archive. So a
bundle in which anything at all was changed is one that a statement does not fit, or one that
cannot have been written so.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.dsse import Envelope
from llmops_assets.evidence.keys import TRUST_ROOT, TrustRoot, parse_trust_root
from llmops_assets.evidence.leaves import Leaf
from llmops_assets.storage.store import canonical_json

README = "README.txt"
CHECKPOINT = "checkpoint.json"
ATTESTATIONS = "attestations.intoto.jsonl"
LEAVES = "leaves.jsonl"
ANCHORED = "anchored.jsonl"
LOG_FILES = (CHECKPOINT, ATTESTATIONS, LEAVES, ANCHORED)
"""What the log's own signatures protect; every other file is named by the export's statement."""

# As old as zip knows: the time of writing says nothing that the log does not say better.
_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16
_TAMPERED = "do not rely on it; ask for the bundle again, and treat this one as tampered with"

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in hex."""
Proof = tuple[Hash, ...]
Model = TypeVar("Model", bound=BaseModel)


class ProvenLeaf(BaseModel):
    """A line of `leaves.jsonl`; the statement is in the same line of the attestations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    leaf: Leaf
    checkpoint: Envelope = Field(description="Of the log up to this leaf, signed with it.")
    inclusion: Proof = Field(description="That the leaf is in the log of the final checkpoint.")
    consistency: Proof = Field(description="That the log only grew from its checkpoint on.")


class AnchoredHead(BaseModel):
    """A line of `anchored.jsonl`: a head of the log that a statement in the bundle names.

    The lines are in the order of these statements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Envelope | None = Field(
        description="What was put elsewhere; None where the statement itself has size and root."
    )
    consistency: Proof = Field(description="That the log only grew from there on.")


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle."""

    trust_root: TrustRoot
    checkpoint: Envelope
    attestations: tuple[Envelope, ...]
    leaves: tuple[ProvenLeaf, ...]
    anchored: tuple[AnchoredHead, ...]
    documents: Mapping[str, bytes]
    """All other files, by name."""

    def files(self) -> dict[str, bytes]:
        """Its files, by name."""
        return {
            **self.documents,
            TRUST_ROOT: trust_root_file(self.trust_root),
            CHECKPOINT: canonical_json(_json(self.checkpoint)),
            ATTESTATIONS: _lines(self.attestations),
            LEAVES: _lines(self.leaves),
            ANCHORED: _lines(self.anchored),
        }


def trust_root_file(root: TrustRoot) -> bytes:
    """A trust root in the form whose SHA-256 is its fingerprint."""
    return canonical_json(_json(root))


def pack(files: Mapping[str, bytes]) -> bytes:
    """An archive of files; the same files always give the same bytes.

    Nothing is compressed, as other versions of zlib would give other bytes.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system = 3  # Unix, wherever this runs
            entry.external_attr = _MODE
            archive.writestr(entry, files[name])
    return content.getvalue()


def unpack(content: bytes) -> dict[str, bytes]:
    """The files of an archive that `pack` wrote.

    Raises:
        EvidenceError: it is none, or one that something was done to.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise zipfile.BadZipFile("a file is in it twice")
            # What was never compressed, and does not overlap, cannot fill the memory either.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(
                entry.file_size for entry in entries
            ) > len(content):
                raise zipfile.BadZipFile("its files are compressed, or overlap")
            files = {entry.filename: archive.read(entry) for entry in entries}
    # Damage in the one or other field of an archive is each of these.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
    ) as error:
        raise EvidenceError(
            "This is no bundle",
            expected="a zip archive that `llmops audit export` wrote",
            found=error,
            cure=_TAMPERED,
        ) from error
    if pack(files) != content:
        raise EvidenceError(
            "The bundle's archive was changed after it was written",
            expected="each file once, in order, and nothing around them",
            found="an archive with the same files and other bytes",
            cure=_TAMPERED,
        )
    return files


def read_bundle(files: Mapping[str, bytes]) -> Bundle:
    """A bundle from its files.

    Raises:
        EvidenceError: one is missing, cannot be read, or is written in another way than ours.
    """
    if missing := {TRUST_ROOT, *LOG_FILES} - files.keys():
        raise EvidenceError(
            "Files are missing in the bundle", found=", ".join(sorted(missing)), cure=_TAMPERED
        )
    root = parse_trust_root(files[TRUST_ROOT], TRUST_ROOT)
    if trust_root_file(root) != files[TRUST_ROOT]:
        raise _not_canonical(TRUST_ROOT)
    return Bundle(
        trust_root=root,
        checkpoint=_record(files[CHECKPOINT], Envelope, CHECKPOINT),
        attestations=_read(files[ATTESTATIONS], Envelope, ATTESTATIONS),
        leaves=_read(files[LEAVES], ProvenLeaf, LEAVES),
        anchored=_read(files[ANCHORED], AnchoredHead, ANCHORED),
        documents={
            name: content for name, content in files.items() if name not in (TRUST_ROOT, *LOG_FILES)
        },
    )


def proof(hashes: Iterable[bytes]) -> Proof:
    """A Merkle proof as the bundle has it."""
    return tuple(value.hex() for value in hashes)


def hashes(given: Sequence[str]) -> list[bytes]:
    """A Merkle proof as `merkle` takes it."""
    return [bytes.fromhex(value) for value in given]


def _lines(records: Iterable[BaseModel]) -> bytes:
    return b"".join(canonical_json(_json(record)) + b"\n" for record in records)


def _read(content: bytes, model: type[Model], name: str) -> tuple[Model, ...]:
    *lines, rest = content.split(b"\n")
    if rest:
        raise _not_canonical(name)
    return tuple(_record(line, model, name) for line in lines)


def _record(content: bytes, model: type[Model], name: str) -> Model:
    try:
        record = model.model_validate_json(content)
    except ValidationError as error:
        raise EvidenceError(
            f"{name} of the bundle cannot be read",
            expected=f"a {model.__name__} in JSON",
            found=error,
            cure=_TAMPERED,
        ) from error
    # A key twice, or a number as text, could mean something else to another reader.
    if canonical_json(_json(record)) != content:
        raise _not_canonical(name)
    return record


def _json(record: BaseModel) -> Any:
    return record.model_dump(mode="json")


def _not_canonical(name: str) -> EvidenceError:
    return EvidenceError(
        f"{name} of the bundle is not in its canonical form",
        expected="JSON with sorted keys, each once, and no spaces; each record on a line",
        found="other bytes with the same meaning",
        cure=_TAMPERED,
    )
