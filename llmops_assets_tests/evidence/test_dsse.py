"""A signature says nothing unless exactly these bytes, of this type, by this key, are taken.

What is signed is compared with the specification's own vector, and verified by an
implementation that is not ours: `cryptography` over the encoding as the specification has it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner  # pyright: ignore[reportPrivateImportUsage]

from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.dsse import Envelope, sign, verified_payload

TYPE = "application/vnd.in-toto+json"
PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1"}'
# Of the specification, protocol.md.
SPEC_TYPE = "http://example.com/HelloWorld"
SPEC_PAYLOAD = b"hello world"
SPEC_PAE = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"

SIGNER = CryptoSigner.generate_ed25519()
OTHER = CryptoSigner.generate_ed25519()
ECDSA = CryptoSigner.generate_ecdsa()
SIGNED = sign(PAYLOAD, TYPE, SIGNER).model_dump(mode="json")


def encoded(payload: bytes, payload_type: str) -> bytes:
    """PAE(type, body), written from the specification: lengths are those of the bytes."""
    name = payload_type.encode()
    return b" ".join(
        [b"DSSEv1", str(len(name)).encode(), name, str(len(payload)).encode(), payload]
    )


def public_key(signer: CryptoSigner) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer.public_key.keyval["public"]))


def read(envelope: Envelope | Mapping[str, Any], *signers: CryptoSigner, of: str = TYPE) -> bytes:
    keys = [signer.public_key for signer in signers or (SIGNER,)]
    return verified_payload(envelope, of, keys, "The envelope")


def changed(**fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps({**SIGNED, **fields}))


def signature_of(signer: CryptoSigner, payload: bytes = PAYLOAD) -> dict[str, str]:
    return sign(payload, TYPE, signer).signatures[0].model_dump()


class Recorder(CryptoSigner):
    """A signer that remembers what it was asked to sign."""

    def sign(self, payload: bytes):
        self.asked = payload
        return super().sign(payload)


def test_what_is_signed_is_the_vector_of_the_specification() -> None:
    """Another encoding would make every signature unreadable to tools that we did not write."""
    recorder = Recorder(SIGNER._private_key)
    sign(SPEC_PAYLOAD, SPEC_TYPE, recorder)
    assert recorder.asked == SPEC_PAE == encoded(SPEC_PAYLOAD, SPEC_TYPE)


@given(payload=st.binary(max_size=300), payload_type=st.text(st.characters(codec="utf-8")))
def test_another_implementation_verifies_what_we_sign(payload: bytes, payload_type: str) -> None:
    """An auditor has `cryptography` and the specification, and not this library."""
    envelope = sign(payload, payload_type, SIGNER).model_dump(mode="json")
    (signature,) = envelope["signatures"]
    body = base64.b64decode(envelope["payload"], validate=True)
    public_key(SIGNER).verify(
        base64.b64decode(signature["sig"]), encoded(body, envelope["payloadType"])
    )
    assert body == payload
    assert read(json.loads(json.dumps(envelope)), of=payload_type) == payload


def test_what_another_implementation_signs_is_read() -> None:
    """A key service or a tool of the auditor's may hold the key."""
    private = SIGNER._private_key
    signature = private.sign(encoded(PAYLOAD, TYPE))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    envelope = {
        "payload": base64.b64encode(PAYLOAD).decode(),
        "payloadType": TYPE,
        "signatures": [
            {"keyid": SIGNER.public_key.keyid, "sig": base64.b64encode(signature).decode()}
        ],
    }
    assert read(envelope) == PAYLOAD


def test_statement_cannot_be_passed_off_as_another_type() -> None:
    """One key signs statements and checkpoints: neither may stand for the other."""
    with pytest.raises(EvidenceError, match=r"signed as something else.*Found: application/vnd"):
        read(SIGNED, of="application/vnd.llmops.tlog-checkpoint.v1")
    with pytest.raises(EvidenceError, match="No trusted key signed"):
        read(changed(payloadType="text/plain"), of="text/plain")


def test_signature_of_a_stranger_is_refused() -> None:
    """Anybody can make a key."""
    with pytest.raises(EvidenceError, match="No trusted key signed The envelope"):
        read(SIGNED, OTHER)
    stolen_name = {**signature_of(OTHER), "keyid": SIGNER.public_key.keyid}
    with pytest.raises(EvidenceError, match="No trusted key signed"):
        read(changed(signatures=[stolen_name]))


def test_signature_of_other_bytes_is_refused() -> None:
    """A signature must not be moved from one statement to another."""
    with pytest.raises(EvidenceError, match="No trusted key signed"):
        read(changed(signatures=[signature_of(SIGNER, b"other")]))
    with pytest.raises(EvidenceError, match="No trusted key signed"):
        read(changed(payload=base64.b64encode(b"other").decode()))


def test_without_keys_nothing_is_trusted() -> None:
    """An empty trust root must not mean that everybody is trusted."""
    with pytest.raises(EvidenceError, match="No key is trusted"):
        verified_payload(SIGNED, TYPE, [], "The envelope")


def test_every_signature_must_be_of_a_trusted_key() -> None:
    """A reader that stops at the first good one would show the names of others unproven."""
    both = changed(signatures=[*SIGNED["signatures"], signature_of(OTHER)])
    assert read(both, SIGNER, OTHER) == PAYLOAD
    for trusted in ((SIGNER,), (OTHER,), (SIGNER, ECDSA)):
        with pytest.raises(EvidenceError, match="No trusted key signed"):
            read(both, *trusted)
    for extra in (
        signature_of(SIGNER),  # twice the same
        {**signature_of(OTHER, b"other")},
        {"keyid": "", "sig": ""},
    ):
        envelope = changed(signatures=[*SIGNED["signatures"], extra])
        with pytest.raises(EvidenceError):
            read(envelope, SIGNER, OTHER)


def test_keys_of_both_kinds_sign() -> None:
    """Key services have no Ed25519."""
    assert read(sign(PAYLOAD, TYPE, ECDSA), SIGNER, ECDSA) == PAYLOAD


def unpadded(text: str) -> str:
    return text.rstrip("=")


def with_a_newline(text: str) -> str:
    return text[:10] + "\n" + text[10:]


def with_other_spare_bits(text: str) -> str:
    """The same bytes: the last digit has bits that mean nothing."""
    assert text.endswith("==")
    return text[:-3] + chr(ord(text[-3]) + 1) + "=="


@pytest.mark.parametrize("rewrite", [unpadded, with_a_newline, with_other_spare_bits])
@pytest.mark.parametrize("field", ["payload", "sig"])
def test_only_one_base64_stands_for_the_bytes(rewrite: Any, field: str) -> None:
    """Two records that differ would else have the same signature, and one could be put in place
    of the other unseen."""
    (signature,) = SIGNED["signatures"]
    payload = PAYLOAD + b" " * ((1 - len(PAYLOAD)) % 3)  # so that its base64 ends with ==
    envelope = sign(payload, TYPE, SIGNER).model_dump(mode="json")
    assert read(envelope) == payload
    if field == "payload":
        envelope["payload"] = rewrite(envelope["payload"])
    else:
        (signature,) = envelope["signatures"]
        envelope["signatures"] = [{**signature, "sig": rewrite(signature["sig"])}]
    with pytest.raises(EvidenceError, match="not a signed envelope"):
        read(envelope)


def test_base64_for_urls_is_refused() -> None:
    """As above; the library reads this form too."""
    envelope = sign(b"\xff\xfe\xfd" * 5, TYPE, SIGNER).model_dump(mode="json")
    payload = envelope["payload"].replace("+", "-").replace("/", "_")
    assert payload != envelope["payload"]
    with pytest.raises(EvidenceError, match="another form"):
        read({**envelope, "payload": payload})


NOTHING: list[Any] = [None, 1, True, "", [], {}, "é", "\ud800", "=" * 4, "QQ"]


@given(
    field=st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig", "more"]),
    value=st.sampled_from(NOTHING)
    | st.text(max_size=20)
    | st.binary(max_size=70).map(lambda content: base64.b64encode(content).decode()),
)
def test_whatever_stands_there_instead_is_refused_with_a_reason(field: str, value: Any) -> None:
    """Whoever writes the store chooses these bytes: no other error, and never acceptance."""
    (signature,) = SIGNED["signatures"]
    if field in ("keyid", "sig"):
        envelope = {**SIGNED, "signatures": [{**signature, field: value}]}
    else:
        envelope = {**SIGNED, field: value}
    with pytest.raises(EvidenceError):
        read(envelope)


@pytest.mark.parametrize("field", list(SIGNED))
def test_no_part_may_be_missing(field: str) -> None:
    """An envelope without signatures, above all."""
    with pytest.raises(EvidenceError, match="not a signed envelope"):
        read({name: value for name, value in SIGNED.items() if name != field})


def test_every_changed_bit_is_caught() -> None:
    """Of payload and signature, each bit once."""
    (signature,) = SIGNED["signatures"]
    for field, text in (("payload", SIGNED["payload"]), ("sig", signature["sig"])):
        content = base64.b64decode(text)
        for bit in range(len(content) * 8):
            other = bytearray(content)
            other[bit // 8] ^= 1 << bit % 8
            written = base64.b64encode(other).decode()
            with pytest.raises(EvidenceError):
                read(
                    {**SIGNED, "payload": written}
                    if field == "payload"
                    else {**SIGNED, "signatures": [{**signature, "sig": written}]}
                )
