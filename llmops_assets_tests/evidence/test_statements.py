"""Statements: their bytes are canonical, strict, and in-toto's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement as IntotoStatement
from pydantic import ValidationError

from llmops_assets.errors import EvidenceError, StoreError
from llmops_assets.evidence.statements import (
    INCIDENT,
    STATEMENT_TYPE,
    Statement,
    Subject,
    subject,
)
from llmops_assets_tests.evidence import intoto_models

DIGEST = "sha256:" + "ab" * 32
SAMPLE = Statement(
    subject=(subject("engine", DIGEST),), predicate_type=INCIDENT, predicate={"a": [1, 0.1, None]}
)

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
statements = st.builds(
    lambda subjects, predicate: Statement(
        subject=subjects, predicate_type=INCIDENT, predicate=predicate
    ),
    st.lists(
        st.builds(
            subject,
            st.text(min_size=1),
            st.binary(min_size=32, max_size=32).map(lambda digest: f"sha256:{digest.hex()}"),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda named: named.name,
    ).map(tuple),
    st.dictionaries(st.text(), json_values, min_size=1, max_size=3),
)


@given(statements)
@settings(max_examples=100, deadline=None)
def test_what_is_signed_is_what_is_read(statement: Statement) -> None:
    """A signature covers bytes: any name and value must come out of them as it went in, and
    in one form only."""
    payload = statement.payload()
    read = Statement.parse(payload)
    assert read == statement
    assert read.payload() == payload


@given(statements)
@settings(max_examples=60, deadline=None)
def test_intoto_reads_every_statement(statement: Statement) -> None:
    """An auditor's tools are not ours: in-toto's own model takes them without an unknown
    field, and finds names and digests as they are."""
    message = json_format.Parse(statement.payload(), intoto_models.STATEMENT())
    read = IntotoStatement.copy_from_pb(message)
    read.validate()
    assert read.pb.type == STATEMENT_TYPE
    assert [(s.name, dict(s.digest)) for s in read.pb.subject] == [
        (s.name, s.digest) for s in statement.subject
    ]


def test_bytes_do_not_depend_on_the_order_of_keys() -> None:
    """A statement that is written again, such as by another process, has the same digest."""
    one, other = (
        SAMPLE.model_copy(update={"predicate": predicate})
        for predicate in ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    )
    assert one.payload() == other.payload()
    # Written down, so that another serialisation than that of last year's records is noticed.
    assert SAMPLE.payload() == (
        b'{"_type":"https://in-toto.io/Statement/v1","predicate":{"a":[1,0.1,null]},'
        b'"predicateType":"https://llmops-assets.dev/predicate/incident/v1",'
        b'"subject":[{"digest":{"sha256":"' + b"ab" * 32 + b'"},"name":"engine"}]}'
    )


def _changed(**fields: Any) -> Callable[[], bytes]:
    return lambda: _canonical({**json.loads(SAMPLE.payload()), **fields})


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "payload",
    [
        lambda: b"",
        lambda: b"\xff\xfe",
        lambda: b"[]",
        lambda: SAMPLE.payload() + b"\n",
        lambda: json.dumps(json.loads(SAMPLE.payload())).encode(),
        lambda: SAMPLE.payload().replace(b'"a":', b'"a":"twice","a":'),
        lambda: SAMPLE.payload().replace(b'"_type"', b'"type"'),
        lambda: SAMPLE.payload().replace(b"0.1", b"1e999"),
        lambda: SAMPLE.payload().replace(b"0.1", b"NaN"),
        lambda: SAMPLE.payload().replace(b"0.1", b'"\\ud800"'),
        _changed(_type="https://in-toto.io/Statement/v0.1"),
        _changed(subject=[]),
        _changed(subject=[{"name": "engine"}]),
        _changed(subject=[{"name": "engine", "digest": {}}]),
        _changed(subject=[{"name": "engine", "digest": {"sha1": "ab" * 20}}]),
        _changed(subject=[{"name": "engine", "digest": {"sha256": "AB" * 32}}]),
        _changed(subject=[{"name": "", "digest": {"sha256": "ab" * 32}}]),
        _changed(subject=[{"name": "engine", "digest": {"sha256": "ab" * 32}}] * 2),
        _changed(subject=[{"name": "engine", "digest": {"sha256": "ab" * 32}, "uri": "a:b"}]),
        _changed(predicateType="incident"),
        _changed(predicate=[]),
        _changed(more=1),
    ],
)
def test_other_bytes_are_refused(payload: Callable[[], bytes]) -> None:
    """What two readers could read differently, or what says nothing about any bytes, must not
    get past the one place that reads statements; and it fails as evidence, not as a crash."""
    with pytest.raises(EvidenceError, match=r"not a Statement|canonical"):
        Statement.parse(payload())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), "\ud800"])
def test_what_json_cannot_say_is_refused_before_it_is_signed(value: object) -> None:
    """NaN would become null on its way, and the record would say what nobody measured."""
    with pytest.raises(ValidationError):
        Statement(subject=SAMPLE.subject, predicate_type=INCIDENT, predicate={"a": value})


def test_a_subject_gives_its_digest_as_the_store_writes_it() -> None:
    """The index finds statements by the digests that the store and the platform use."""
    assert subject("engine", DIGEST) == Subject(name="engine", digest={"sha256": "ab" * 32})
    assert subject("engine", DIGEST).sha256 == DIGEST
    with pytest.raises(StoreError, match="not a digest"):
        subject("engine", "ab" * 32)
