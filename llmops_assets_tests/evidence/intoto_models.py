"""The protobuf messages of `in-toto-attestation`: how others read what we write."""

from __future__ import annotations

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
from in_toto_attestation.predicates.vsa.v1 import vsa_pb2
from in_toto_attestation.v1 import resource_descriptor_pb2, statement_pb2


def _message(file: FileDescriptor, name: str) -> type[Message]:
    # Generated modules make their classes at import time, unseen by type checkers.
    return GetMessageClass(file.message_types_by_name[name])


STATEMENT = _message(statement_pb2.DESCRIPTOR, "Statement")
RESOURCE_DESCRIPTOR = _message(resource_descriptor_pb2.DESCRIPTOR, "ResourceDescriptor")
PROVENANCE = _message(provenance_pb2.DESCRIPTOR, "Provenance")
TEST_RESULT = _message(test_result_pb2.DESCRIPTOR, "TestResult")
VERIFICATION_SUMMARY = _message(vsa_pb2.DESCRIPTOR, "VerificationSummary")
