"""A checkpoint speaks for the whole log, so there must be one way to write each, and to read it."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.checkpoint import (
    ORIGIN,
    PAYLOAD_TYPE,
    Checkpoint,
    read_checkpoint,
    sign_checkpoint,
)
from llmops_assets.evidence.dsse import sign
from llmops_assets.evidence.statements import PAYLOAD_TYPE as STATEMENT

SIGNER = CryptoSigner.generate_ed25519()
KEYS = [SIGNER.public_key]
CHECKPOINT = Checkpoint(7, b"\x07" * 32, datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC))
ROOT = base64.b64encode(CHECKPOINT.root).decode()
TEXT = f"llmops-assets/evidence\n7\n{ROOT}\ntime 2026-01-02T03:04:05.000678+00:00\n"

zones = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
checkpoints = st.builds(
    Checkpoint,
    size=st.integers(0, 2**70),
    root=st.binary(min_size=32, max_size=32),
    time=st.datetimes(timezones=zones | st.just(UTC)),
)


def test_text_is_that_of_the_specification() -> None:
    """Three lines of tlog-checkpoint, then extension lines: other tools can read the first."""
    assert CHECKPOINT.text == TEXT
    origin, size, root, *extensions = TEXT.splitlines()
    assert (origin, int(size)) == (ORIGIN, 7)
    assert base64.b64decode(root, validate=True) == CHECKPOINT.root
    assert all(extension for extension in extensions)  # none may be empty
    assert TEXT.endswith("\n")


@given(checkpoints)
def test_what_is_written_is_read(checkpoint: Checkpoint) -> None:
    """Whatever size, root and time."""
    assert Checkpoint.parse(checkpoint.text) == checkpoint


@given(checkpoints)
def test_what_is_signed_is_read(checkpoint: Checkpoint) -> None:
    """The same through the signed envelope."""
    assert read_checkpoint(sign_checkpoint(checkpoint, SIGNER), KEYS, "It") == checkpoint


@example(TEXT.removesuffix("\n"))
@example(TEXT + "\n")
@example(TEXT + "time 2026-01-02T03:04:05.000678+00:00\n")
@example(TEXT.replace("\n", "\r\n"))
@example(TEXT.replace("\n7\n", "\n07\n"))
@example(TEXT.replace("\n7\n", "\n+7\n"))
@example(TEXT.replace("\n7\n", "\n-7\n"))
@example(TEXT.replace("\n7\n", "\n7_0\n"))
@example(TEXT.replace("\n7\n", "\n\N{ARABIC-INDIC DIGIT SEVEN}\n"))
@example(TEXT.replace("\n7\n", "\n" + "7" * 5000 + "\n"))
@example(TEXT.replace(ROOT, ROOT.rstrip("=")))
@example(TEXT.replace(ROOT, ROOT[:-2] + chr(ord(ROOT[-2]) + 1) + "="))
@example(TEXT.replace(ROOT, base64.b64encode(b"\x07" * 31).decode()))
@example(TEXT.replace(ROOT, base64.b64encode(b"\x07" * 33).decode()))
@example(TEXT.replace(ROOT, ""))
@example(TEXT.replace("+00:00", ""))  # a time of no zone compares with no other
@example(TEXT.replace("+00:00", "Z"))
@example(TEXT.replace("time ", ""))
@example(TEXT.replace(ORIGIN, "llmops-assets/other"))
@example(TEXT.replace("2026-01-02", "2026-13-02"))
@example("")
@given(st.text() | st.lists(st.text()).map("\n".join))
def test_nothing_else_is_read(text: str) -> None:
    """Each is refused with a reason: no other error, and never a guess."""
    with pytest.raises(EvidenceError, match="The checkpoint cannot be read"):
        Checkpoint.parse(text)


@given(position=st.integers(0, len(TEXT) - 1), character=st.characters())
def test_another_character_is_refused_or_means_something_else(
    position: int, character: str
) -> None:
    """No two texts may mean the same checkpoint."""
    assume(TEXT[position] != character)
    text = TEXT[:position] + character + TEXT[position + 1 :]
    try:
        read = Checkpoint.parse(text)
    except EvidenceError:
        return
    assert read != CHECKPOINT or read.time.utcoffset() != CHECKPOINT.time.utcoffset()
    assert read.text == text


@given(st.binary(max_size=200))
def test_signed_bytes_that_are_no_checkpoint_are_refused(content: bytes) -> None:
    """A key that signs them by mistake must not crash the reader."""
    with pytest.raises(EvidenceError, match="It cannot be read"):
        read_checkpoint(sign(content, PAYLOAD_TYPE, SIGNER), KEYS, "It")


def test_statement_with_the_text_of_a_checkpoint_is_none() -> None:
    """The signer process signs statements for anybody who may append."""
    signed = sign(TEXT.encode(), STATEMENT, SIGNER)
    with pytest.raises(EvidenceError, match="signed as something else"):
        read_checkpoint(signed, KEYS, "It")
