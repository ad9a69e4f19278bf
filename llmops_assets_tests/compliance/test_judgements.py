"""The compliance gates on real files: what is wrong fails, by name, and nothing else does."""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from llmops_assets.compliance.judgements import (
    PROBLEMS_SHOWN,
    judge_compliance,
    judge_data,
    judge_package_safety,
)
from llmops_assets.compliance.licences import PERMISSIVE_LICENCES
from llmops_assets.compliance.package_report import BILL_FILE, REPORT_FILE
from llmops_assets.errors import SpecError
from llmops_assets.evidence.statistics import Decision
from llmops_assets.evidence.verdicts import Finding, Judgement
from llmops_assets.storage.artifacts import ArtifactHandle

from ..release_rig import Rig
from .reports import (
    CARDED,
    DECLARED,
    PROVENANCE,
    TOKENIZER_CONFIG,
    data_column,
    publish,
    report,
)

# Put together here, so that no scanner of this repository takes it for a real one.
TOKEN = "ghp_" + "wJ4kT9xQ2mV7nB5cR8yL3pF6sD1gH0zAeUiO"
LEAK = json.dumps({"eos_token": "</s>", "auth": TOKEN})
GENERATED = DECLARED.replace(
    DECLARED[DECLARED.index("data: ") : DECLARED.index("\nengine")],
    "data: {source: dates, locales: [en], training: {rows: 5, seed: 1}, "
    "evaluation: {rows: 5, seed: 2}}",
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    """A release with nothing wrong, for tests that put other bytes beside it."""
    rig = Rig(tmp_path_factory.mktemp("clean") / "rig")
    yield Reported(rig, report(rig, publish(rig)))
    rig.close()


@dataclass(frozen=True)
class Reported:
    """A release with a compliance report, and the rig that holds it."""

    rig: Rig
    column: Mapping[str, ArtifactHandle]

    def with_other(
        self, asset: str, files: Mapping[str, str | bytes]
    ) -> Mapping[str, ArtifactHandle]:
        """The column with other bytes of an asset, as another release would have them."""
        release = f"parrot.v{uuid.uuid4().int}"
        self.rig.publish(release, asset, files)
        return {**self.column, asset: self.rig.platform.column(release)[asset]}


def culprit(judgement: Judgement) -> Finding:
    """The one finding that did not pass; it must be the reason, too."""
    assert judgement.decision is Decision.FAILED
    (found,) = [one for one in judgement.findings if one.decision is not Decision.PASSED]
    assert judgement.reason == f"{found.note}."
    assert {*judgement.measured} == {*judgement.threshold}
    assert judgement.threshold[found.metric] == found.threshold
    return found


def test_declared_data_without_persons_pass(rig: Rig) -> None:
    """A gate that always complains is waived for good."""
    judgement = judge_data(data_column(rig, ["3 March 2024", "02.10.1978"]), PERMISSIVE_LICENCES)
    assert judgement.passed, judgement.reason
    assert judgement.measured["licence of training data"] == "MIT"
    assert judgement.measured["provenance of training data"] == PROVENANCE
    assert [finding.n for finding in judgement.findings][-1] == 2


def test_generated_data_declare_themselves(rig: Rig) -> None:
    """Their licence and provenance are facts of the generator, in no spec."""
    assert "license" not in GENERATED
    judgement = judge_data(data_column(rig, ["unused"], GENERATED), PERMISSIVE_LICENCES)
    assert judgement.passed, judgement.reason
    assert judgement.measured["licence of training data"] == "Unicode-3.0"


def test_address_in_the_training_text_fails(rig: Rig) -> None:
    """The one row that must go is named; the address itself is not repeated anywhere."""
    column = data_column(rig, ["3 March 2024", "mail jane.doe@example.com", "4 March 2024"])
    found = culprit(judge_data(column, PERMISSIVE_LICENCES))
    assert found.metric == "personal data in training data"
    assert (found.value, found.n) == (1, 3)
    assert "EMAIL_ADDRESS: 1 in the data, the first in row 2" in found.note
    assert "jane" not in found.model_dump_json()


@pytest.mark.parametrize(
    ("declared", "metric", "note"),
    [
        (("MIT", "CC-BY-NC-4.0"), "licence of training data", "CC-BY-NC-4.0 is not allowed"),
        (("MIT", '""'), "licence of training data", "no licence is declared"),
        ((PROVENANCE, '""'), "provenance of training data", "missing; write it"),
        ((PROVENANCE, "TODO ask the data team"), "provenance of training data", "a placeholder"),
        ((PROVENANCE, "internet"), "provenance of training data", "too short"),
    ],
)
def test_data_that_nobody_vouches_for_fail(
    rig: Rig, declared: tuple[str, str], metric: str, note: str
) -> None:
    """Without a licence and a source nobody knows whether a model may learn from them."""
    column = data_column(rig, ["3 March 2024"], DECLARED.replace(*declared))
    found = culprit(judge_data(column, PERMISSIVE_LICENCES))
    assert found.metric == metric
    assert note in found.note


def test_report_about_other_data_fails(rig: Rig) -> None:
    """A clean report of other rows says nothing about these."""
    column = Reported(rig, data_column(rig, ["3 March 2024"])).with_other(
        "training_data", {"data.parquet": "other"}
    )
    found = culprit(judge_data(column, PERMISSIVE_LICENCES))
    assert found.metric == "subjects of the report"
    assert "another training_data" in found.note


def test_clean_package_passes(clean: Reported) -> None:
    """A real checkpoint, a whole card, allowed licences: both gates open."""
    safe = judge_package_safety(clean.column)
    assert safe.passed, safe.reason
    assert [finding.metric for finding in safe.findings] == [
        "subjects of the report",
        "unsafe formats in packaged_model", "unsafe formats in checkpoint",
        "secrets in packaged_model", "secrets in checkpoint",
    ]  # fmt: skip
    assert all(finding.n for finding in safe.findings[1:])
    compliance = judge_compliance(clean.column, PERMISSIVE_LICENCES)
    assert compliance.passed, compliance.reason
    assert [finding.metric for finding in compliance.findings] == [
        "subjects of the report", "licence of weights", "licence of data", "provenance of data",
        "model card", "ML-BOM",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("package", "checkpoint", "metric", "note"),
    [
        (
            {"repository/parrot/notes.md": pickle.dumps({"a": 1})},
            {},
            "unsafe formats in packaged_model",
            "repository/parrot/notes.md: a pickle",
        ),
        (
            {},
            {"notes.txt": pickle.dumps({"a": 1}, protocol=0)},
            "unsafe formats in checkpoint",
            "notes.txt: a pickle",
        ),
        ({TOKENIZER_CONFIG: LEAK}, {}, "secrets in packaged_model", f"{TOKENIZER_CONFIG}:1: "),
        ({}, {"generation.json": LEAK}, "secrets in checkpoint", "generation.json:1: GitHub"),
    ],
)
def test_file_that_is_not_safe_fails(
    rig: Rig,
    package: dict[str, str | bytes],
    checkpoint: dict[str, str | bytes],
    metric: str,
    note: str,
) -> None:
    """File and place are named; what leaked is not spread further."""
    found = culprit(judge_package_safety(report(rig, publish(rig, CARDED, package, checkpoint))))
    assert found.metric == metric
    assert note in found.note
    assert found.value
    assert TOKEN not in found.model_dump_json()


@pytest.mark.parametrize(
    ("spec", "metric", "note"),
    [
        (("license: Apache-2.0", "license: GPL-3.0-only"), "licence of weights", "GPL-3.0-only"),
        (("license: MIT", "license: CC-BY-NC-4.0"), "licence of data", "CC-BY-NC-4.0"),
        ((PROVENANCE, '""'), "provenance of data", "provenance of data: missing"),
        (("Knows two answers and no more.", "TBD"), "model card", "limitations: a placeholder"),
        (("  contact: team:tests\n", ""), "model card", "model card: contact: missing"),
    ],
)
def test_what_is_not_declared_as_it_must_be_fails(
    rig: Rig, spec: tuple[str, str], metric: str, note: str
) -> None:
    """Each part by its name, so that its owner knows what to write."""
    column = report(rig, publish(rig, CARDED.replace(*spec)))
    found = culprit(judge_compliance(column, PERMISSIVE_LICENCES))
    assert found.metric == metric
    assert note in found.note


def test_card_of_an_imported_model_counts_where_the_spec_has_none(rig: Rig) -> None:
    """Nobody copies it by hand, so it is judged as it came: here its contact is missing."""
    card = (
        "---\nlicense: mit\nlanguage: en\n---\n# Uses\nRepeats what it was told.\n"
        "# Limitations\nKnows two answers only.\n# Training Data\nTwo sentences of ours.\n"
        "# Evaluation\nExact match on four sentences.\n"
    )
    column = report(rig, publish(rig, DECLARED, checkpoint={"README.md": card}))
    judgement = judge_compliance(column, PERMISSIVE_LICENCES)
    found = culprit(judgement)
    assert (found.metric, found.value) == ("model card", 1)
    assert "contact: missing" in found.note
    assert judgement.measured["licence of weights"] == "MIT"


@pytest.mark.parametrize("declared", ["llama3.1", "other"])
def test_licence_that_an_imported_model_declares_counts_beside_the_specs(
    rig: Rig, declared: str
) -> None:
    """A spec that calls somebody's weights Apache-2.0 does not make them so."""
    card = f"---\nlicense: {declared}\n---\n"
    column = report(rig, publish(rig, checkpoint={"README.md": card}))
    found = culprit(judge_compliance(column, PERMISSIVE_LICENCES))
    assert found.metric == "licence of weights in README.md"
    assert declared in found.note


def test_same_licence_in_other_letters_is_no_other_licence(rig: Rig) -> None:
    """Hugging Face writes them in lower case."""
    card = "---\nlicense: apache-2.0\n---\n"
    column = report(rig, publish(rig, checkpoint={"README.md": card}))
    judgement = judge_compliance(column, PERMISSIVE_LICENCES)
    assert judgement.passed, judgement.reason
    assert "licence of weights in README.md" not in judgement.measured


def other_package(bill: dict[str, Any]) -> None:
    bill["metadata"]["component"]["hashes"][0]["content"] = "0" * 64


def other_file(bill: dict[str, Any]) -> None:
    bill["metadata"]["component"]["components"][0]["hashes"][0]["content"] = "0" * 64


def lost_file(bill: dict[str, Any]) -> None:
    del bill["metadata"]["component"]["components"][1]


def bad_type(bill: dict[str, Any]) -> None:
    bill["metadata"]["component"]["type"] = "model"


@pytest.mark.parametrize(
    ("tamper", "note"),
    [
        (other_package, f"about the package sha256:{'0' * 64}"),
        (other_file, f"package.json is sha256:{'0' * 64} in it and sha256:"),
        (lost_file, "config.pbtxt is not there in it"),
        (bad_type, "ML-BOM: $.metadata.component"),
    ],
)
def test_tampered_bill_of_materials_fails(
    clean: Reported, tamper: Callable[[dict[str, Any]], None], note: str
) -> None:
    """A bill that the schema refuses, or that is valid and about something else."""
    folder = clean.column["compliance_report"].path
    bill = json.loads((folder / BILL_FILE).read_bytes())
    tamper(bill)
    files = {BILL_FILE: json.dumps(bill), REPORT_FILE: (folder / REPORT_FILE).read_bytes()}
    column = clean.with_other("compliance_report", files)
    found = culprit(judge_compliance(column, PERMISSIVE_LICENCES))
    assert found.metric == "ML-BOM"
    assert note in found.note


def test_report_about_other_bytes_fails(clean: Reported) -> None:
    """A clean report is no use to the checkpoint beside it."""
    column = clean.with_other("checkpoint", {"model.safetensors": "other"})
    for judgement in (judge_package_safety(column), judge_compliance(column, PERMISSIVE_LICENCES)):
        found = culprit(judgement)
        assert found.metric == "subjects of the report"
        assert "another checkpoint" in found.note


def test_the_list_of_the_policy_decides(clean: Reported) -> None:
    """The same report under another policy: judged again, measured never again."""
    assert judge_compliance(clean.column, ("MIT", "Apache-2.0")).passed
    found = culprit(judge_compliance(clean.column, ("MIT",)))
    assert (found.metric, found.threshold) == ("licence of weights", "one of MIT")
    with pytest.raises(SpecError, match="allow-list"):
        judge_compliance(clean.column, ("MIT or so",))


def test_many_problems_are_cut_short(rig: Rig) -> None:
    """A verdict is read by people; the report has all of them."""
    leaks = {f"leak{number:02}.json": LEAK for number in range(PROBLEMS_SHOWN + 5)}
    found = culprit(judge_package_safety(report(rig, publish(rig, CARDED, leaks))))
    assert found.note.count("leak") == PROBLEMS_SHOWN
    assert "more in the report" in found.note


@pytest.mark.parametrize(
    "emptied",
    [{"digests": {}}, {"formats": {}}, {"secrets": {}}],
    ids=lambda part: next(iter(part)),
)
def test_report_that_looked_at_nothing_fails(clean: Reported, emptied: dict[str, Any]) -> None:
    """Nothing found because nothing was scanned is no good news."""
    folder = clean.column["compliance_report"].path
    content = json.loads((folder / REPORT_FILE).read_bytes()) | emptied
    files = {REPORT_FILE: json.dumps(content), BILL_FILE: (folder / BILL_FILE).read_bytes()}
    judgement = judge_package_safety(clean.with_other("compliance_report", files))
    assert judgement.decision is Decision.FAILED
