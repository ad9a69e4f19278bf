"""What differs between two releases: exactly what was changed, and nothing else."""

from __future__ import annotations

import pytest

from llmops_assets.develop.specs import SpecSource
from llmops_assets.errors import EvidenceError
from llmops_assets.evidence.gates import FITS_TARGET
from llmops_assets.evidence.leaves import Entry, release_chain
from llmops_assets.reports.audit import audit
from llmops_assets.reports.release_difference import (
    ReleaseDifference,
    compare,
    difference,
    lines,
)

from ..evidence_rig import blob_of
from ..release_rig import FAILED, Rig
from .audited import AUDITED_SPEC, TOOLS, record_steps
from .conftest import FIRST, SECOND

ONE, TWO = "parrot.v1", "parrot.v2"


def compared(rig: Rig) -> ReleaseDifference:
    return difference(rig.platform, ONE, TWO)


def names(found: ReleaseDifference) -> dict[str, set[str]]:
    return {topic: {change.what for change in changes} for topic, changes in found.topics.items()}


def test_equal_releases_differ_in_nothing(rig: Rig) -> None:
    """Key, times and who asked are other in any two; saying so each time would hide the rest."""
    record_steps(rig, ONE)
    record_steps(rig, TWO)
    found = compared(rig)
    assert found.equal
    assert lines(found) == [f"{ONE} and {TWO} are equal but for key, times and people"]


@pytest.mark.parametrize(
    ("old", "new", "field", "others"),
    [
        ("use_case: Repeats", "use_case: Always repeats", "use_case", {}),
        ("steps: 300", "steps: 400", "weights.steps", {}),
        ("exact_match: {at_least: 0.9, every", "exact_match: {at_least: 0.91, every",
         "gates.accuracy.exact_match.at_least", {}),
        ("answer: pong", "answer: peng", "serving.known_answers[1].answer", {}),
        ("license: CC0-1.0", "license: CC-BY-4.0", "data.license",
         {"data": {"training data: licence"}}),
        ("toolchain: onnxruntime_genai", "toolchain: onnxruntime_genai, precision: int4",
         "engine.precision",
         {"engine": {"flags.precision", "Engine digest"},
          "package": {"repository/parrot/engine"}}),
    ],
)  # fmt: skip
def test_one_changed_field_is_named_with_what_follows(
    rig: Rig, old: str, new: str, field: str, others: dict[str, set[str]]
) -> None:
    """Whoever reviews a release must see the one line that was edited, and its effect."""
    assert AUDITED_SPEC.count(old) == 1
    record_steps(rig, ONE)
    record_steps(rig, TWO, AUDITED_SPEC.replace(old, new))
    found = compared(rig)
    assert names(found) == {"spec": {field}, **others}
    (change,) = found.topics["spec"]
    assert str(change.second) in new or new.removeprefix("use_case: ") in str(change.second)
    assert change.first != change.second


def test_other_data_are_named_by_digest_and_counts(rig: Rig) -> None:
    """And so are the weights that learned from them."""
    record_steps(rig, ONE)
    record_steps(rig, TWO, rows=30_000)
    found = names(compared(rig))
    assert found["data"] == {
        "Training data digest", "training data: rows", "training data: slices.de",
        "training data: slices.fr",
    }  # fmt: skip
    assert found["weights"] == {"Trained weights digest", "Converted weights digest"}
    assert "spec" not in found


def test_other_tools_are_named_by_version(rig: Rig) -> None:
    """A bump of a toolchain is often the only change, and then the one to know."""
    record_steps(rig, ONE)
    record_steps(rig, TWO, versions={**TOOLS, "onnxruntime": "1.33.0"})
    found = compared(rig)
    assert names(found)["toolchain"] == {
        "converted_weights: onnxruntime", "engine: onnxruntime"
    }  # fmt: skip
    change = found.topics["toolchain"][0]
    assert (change.first, change.second) == ("1.32.0", "1.33.0")
    assert {"spec", "data", "code"}.isdisjoint(found.topics)


def test_other_commit_is_code(rig: Rig) -> None:
    """The spec may be the same file at two commits with another program beside it."""
    record_steps(rig, ONE)
    source = SpecSource(file="models/parrot.yaml", commit="d" * 40, changed=False)
    record_steps(rig, TWO, source=source)
    assert names(compared(rig)) == {"code": {"commit"}}


def test_gates_differ_by_result_and_measured_value(rig: Rig) -> None:
    """The newest verdict of each gate counts, as everywhere."""
    for release in (ONE, TWO):
        record_steps(rig, release)
    rig.judge(ONE, [FITS_TARGET], FAILED)
    found = names(compared(rig))
    assert found["gates"] == {"fits_target: result", "fits_target: policy"}


def test_whole_lives_differ_in_approval_and_serving(audited: Rig) -> None:
    """The second release of the demonstration: precision, its bytes, and its fate."""
    found = difference(audited.platform, FIRST, SECOND)
    topics = names(found)
    assert topics["spec"] == {"engine.precision"}
    assert topics["package"] == {"repository/parrot/engine"}
    assert {"data", "weights", "code", "toolchain", "approvals"}.isdisjoint(topics)
    assert topics["serving"] == {"position", "production, time 1"}
    shown = lines(found)
    place = shown.index("  engine.precision")
    assert shown[place + 1 : place + 3] == ["    - int8", "    + fp32"]
    assert ReleaseDifference.model_validate_json(found.model_dump_json()) == found


def test_the_other_way_round_is_the_same(audited: Rig) -> None:
    """A difference that depends on who comes first would miss what was taken away."""
    there = difference(audited.platform, FIRST, SECOND)
    back = difference(audited.platform, SECOND, FIRST)
    assert names(there) == names(back)


def test_two_models_are_compared_with_a_note(audited: Rig) -> None:
    """Teams copy specs; the reader must not take one for the next version of the other."""
    one = audit(audited.platform, FIRST)
    identity = one.identity.model_copy(update={"model": "budgie"})
    found = compare(one, one.model_copy(update={"identity": identity}), audited.platform)
    assert found.notes == ("they are releases of two models, parrot and budgie",)
    assert found.equal


def test_evidence_that_does_not_hold_is_never_equal(rig: Rig) -> None:
    """A script takes the exit code of "equal" for a proof."""
    record_steps(rig, ONE)
    one = audit(rig.platform, ONE)
    broken = one.integrity.model_copy(update={"problems": ("entry 7 is gone",)})
    found = compare(one, one.model_copy(update={"integrity": broken}), rig.platform)
    assert (found.topics, found.equal) == ({}, False)
    assert f"note: the evidence of {ONE} does not hold; see `llmops audit {ONE}`" in lines(found)


def test_evidence_that_cannot_be_read_is_no_release_without_anything(rig: Rig) -> None:
    """Else all that the other one has would be shown as what differs."""
    record_steps(rig, TWO)
    record_steps(rig, ONE)  # the log's end is whole
    _damage(rig, list(rig.platform.evidence.entries(release_chain(TWO))))
    with pytest.raises(EvidenceError, match=rf"evidence of {TWO} cannot be read"):
        compared(rig)


def _damage(rig: Rig, entries: list[Entry]) -> None:
    for entry in entries:
        blob_of(rig.platform.evidence, entry.sequence).write_bytes(b"{}")


def test_package_that_is_gone_is_noted(rig: Rig) -> None:
    """No files is not the same as no difference."""
    record_steps(rig, ONE)
    record_steps(rig, TWO)
    package = rig.platform.columns.get(ONE, "packaged_model").artifact
    (rig.platform.settings.store / "blobs" / package.replace(":", "/")).unlink()
    found = compared(rig)
    assert [ONE in note for note in found.notes] == [True, False]
    assert all("does not have the package" in note for note in found.notes)
