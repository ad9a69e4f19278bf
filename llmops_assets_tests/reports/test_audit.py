"""The audit record: what serves, where it came from, who let it through, or an error."""

from __future__ import annotations

import pytest

from llmops_assets.errors import ArtifactCorruptError
from llmops_assets.evidence.gates import BUILT, CANARY
from llmops_assets.reports.audit import audit
from llmops_assets.serving.slots import Environment

from ..release_rig import FAILED, MODEL, Rig, deploy


def test_everything_of_a_release_is_in_one_document(rig: Rig) -> None:
    """An auditor has one key, and no other place to look."""
    rig.build("parrot.v1", 1)
    rig.build("parrot.v2", 2)
    deploy(rig, 1)
    deploy(rig, 2)
    deploy(rig, 1)
    record = audit(rig.platform.columns, rig.platform.routes, "parrot.v1")
    assert {verdict.gate for verdict in record.verdicts} == {gate.name for gate in (*BUILT, CANARY)}
    assert (
        record.results["packaged_model"][-1].artifact
        == record.routes[0].record["targets"][0]["package"]
    )
    assert record.results["engine"][-1].release == "parrot.v1"
    assert [change.record["generation"] for change in record.routes] == [3, 2, 1]
    assert {change.record["actor"] for change in record.routes} == {"ada"}


@pytest.mark.usefixtures("packages")
def test_changes_that_do_not_concern_it_are_left_out(rig: Rig) -> None:
    """A model's history is long, and most of it is other releases'."""
    for version in (1, 2, 3):
        deploy(rig, version)
    changes = audit(rig.platform.columns, rig.platform.routes, "parrot.v1").routes
    assert [change.record["generation"] for change in changes] == [2, 1]


def test_every_verdict_is_shown_in_order(rig: Rig) -> None:
    """That a pass was taken back, or came after a failure, is what an auditor asks about."""
    rig.build("parrot.v1", 1)
    rig.judge("parrot.v1", BUILT[:1], FAILED)
    record = audit(rig.platform.columns, rig.platform.routes, "parrot.v1")
    history = [verdict.passed for verdict in record.verdicts if verdict.gate == BUILT[0].name]
    assert history == [True, False]


def test_it_does_not_contain_itself(rig: Rig) -> None:
    """Otherwise every audit would have another digest than the one before."""
    rig.publish("parrot.v1", "engine", {"a": "1"})
    before = audit(rig.platform.columns, rig.platform.routes, "parrot.v1")
    rig.publish("parrot.v1", "audit_record", {"a": "2"})
    assert audit(rig.platform.columns, rig.platform.routes, "parrot.v1") == before


@pytest.mark.usefixtures("packages")
def test_rewritten_history_is_an_error(rig: Rig) -> None:
    """A past that somebody edited must not be presented as evidence."""
    deploy(rig, 1)
    deploy(rig, 2)
    history = list(rig.platform.routes.history(Environment.PRODUCTION, MODEL))
    blob = rig.platform.settings.store / "blobs" / history[-1][0].replace(":", "/")
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes().replace(b'"ada"', b'"eve"'))
    with pytest.raises(ArtifactCorruptError):
        audit(rig.platform.columns, rig.platform.routes, "parrot.v1")
