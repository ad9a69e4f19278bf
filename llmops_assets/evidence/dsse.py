"""Signed envelopes: DSSE, the Dead Simple Signing Envelope, version 1.

https://github.com/secure-systems-lab/dsse; the encoding and the signatures are those of
`securesystemslib`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from securesystemslib import signer as signing
from securesystemslib.dsse import Envelope as SignedBytes
from securesystemslib.exceptions import Error as SignatureError

from llmops_assets.errors import EvidenceError
from llmops_assets.storage.store import Record

# Public there, but in no `__all__`.
Key: TypeAlias = signing.Key  # pyright: ignore[reportPrivateImportUsage]
Signer: TypeAlias = signing.Signer  # pyright: ignore[reportPrivateImportUsage]


class EnvelopeSignature(BaseModel):
    """One signature of an envelope."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keyid: str
    sig: str = Field(description="Base64.")


class Envelope(BaseModel):
    """An envelope as it is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    payload: str = Field(description="Base64.")
    payload_type: str = Field(alias="payloadType")
    signatures: tuple[EnvelopeSignature, ...] = Field(min_length=1)


def sign(payload: bytes, payload_type: str, signer: Signer) -> Envelope:
    """Signs a payload.

    Args:
        payload: any bytes.
        payload_type: media type that says how to read them.
        signer: holds the key, or asks who holds it.

    Raises:
        EvidenceError: the signer does not answer.
    """
    envelope = SignedBytes(payload, payload_type, {})
    envelope.sign(signer)
    return Envelope.model_validate(envelope.to_dict())


def verified_payload(
    envelope: Envelope | Record, payload_type: str, keys: Sequence[Key], what: str
) -> bytes:
    """The payload of an envelope, if trusted keys made all of its signatures, as this type.

    Args:
        envelope: as it was stored or received.
        payload_type: the type that the reader expects.
        keys: the keys that the reader trusts.
        what: names the envelope in messages.

    Raises:
        EvidenceError: it is no such envelope, or no trusted key signed it.
    """
    try:
        read = Envelope.model_validate(envelope)
        signed = SignedBytes.from_dict(read.model_dump(mode="json"))
        if signed.to_dict() != read.model_dump(mode="json"):
            raise ValueError("its base64 has another form than the usual one")
    except (ValidationError, ValueError, SignatureError) as error:
        raise EvidenceError(
            f"{what} is not a signed envelope",
            expected="a DSSE envelope with payload, payloadType and signatures",
            found=error,
            cure="restore it from a backup; until then treat it as tampered with",
        ) from error
    if signed.payload_type != payload_type:
        raise EvidenceError(
            f"{what} was signed as something else",
            expected=payload_type,
            found=signed.payload_type,
            cure="restore it from a backup; until then treat it as tampered with",
        )
    if not keys:
        raise EvidenceError(
            f"No key is trusted to sign {what}",
            expected="a trust root with a key of that role",
            cure="pass the trust root of the platform that wrote it",
        )
    try:
        # More signatures than keys are a ValueError.
        signed.verify(list(keys), threshold=len(read.signatures))
    except (SignatureError, ValueError) as error:
        raise EvidenceError(
            f"No trusted key signed {what}",
            expected="a signature by " + " or ".join(key.keyid for key in keys),
            found="signatures by " + ", ".join(signature.keyid for signature in read.signatures),
            cure="check that the trust root is the right one; if it is, treat this as forged",
        ) from error
    return signed.payload
