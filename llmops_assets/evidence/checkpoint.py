"""Checkpoints: what a signer says about the whole log, in one hash.

The text is that of C2SP's tlog-checkpoint (https://c2sp.org/tlog-checkpoint): origin, number
of entries, root of the Merkle tree in base64, and here one extension line with the time. It
is signed in a DSSE envelope, as every statement of the log is, so that any kind of key works.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.dsse import Envelope, Key, Signer, sign, verified_payload
from llmops_assets.storage.store import Record

ORIGIN = "llmops-assets/evidence"
PAYLOAD_TYPE = "application/vnd.llmops.tlog-checkpoint.v1"
TIME = "time "


@dataclass(frozen=True)
class Checkpoint:
    """The log as it was: its first `size` entries have the Merkle root `root`."""

    size: int
    root: bytes
    """32 bytes, RFC 6962."""
    time: datetime

    @property
    def text(self) -> str:
        """What is signed."""
        root = base64.b64encode(self.root).decode("ascii")
        return f"{ORIGIN}\n{self.size}\n{root}\n{TIME}{self.time.isoformat()}\n"

    @classmethod
    def parse(cls, text: str, what: str = "The checkpoint") -> Checkpoint:
        """Reads what `text` gives, and nothing else.

        Raises:
            EvidenceError: it is no checkpoint of this log.
        """
        try:
            origin, size, root, time = text.removesuffix("\n").split("\n")
            read = cls(
                size=int(size),
                root=base64.b64decode(root, validate=True),
                time=datetime.fromisoformat(time.removeprefix(TIME)),
            )
        except (ValueError, binascii.Error) as error:
            raise _unreadable(what, repr(text)) from error
        # Also refuses numbers, base64 and times in another form than ours.
        usual = read.text == text and read.time.tzinfo is not None
        if origin != ORIGIN or len(read.root) != 32 or read.size < 0 or not usual:
            raise _unreadable(what, repr(text))
        return read


def sign_checkpoint(checkpoint: Checkpoint, signer: Signer) -> Envelope:
    """Signs a checkpoint.

    Raises:
        EvidenceError: the signer does not answer.
    """
    return sign(checkpoint.text.encode(), PAYLOAD_TYPE, signer)


def read_checkpoint(envelope: Envelope | Record, keys: Sequence[Key], what: str) -> Checkpoint:
    """A signed checkpoint.

    Args:
        envelope: as it was stored or received.
        keys: those that may sign one.
        what: names it in messages.

    Raises:
        EvidenceError: no trusted key signed it, or it is none.
    """
    payload = verified_payload(envelope, PAYLOAD_TYPE, keys, what)
    return Checkpoint.parse(payload.decode("utf-8", errors="replace"), what)


def _unreadable(what: str, found: str) -> EvidenceError:
    return EvidenceError(
        f"{what} cannot be read",
        expected=f"four lines: {ORIGIN}, a size, a root in base64, a time",
        found=found,
        cure="restore it from a backup; until then treat it as tampered with",
    )
