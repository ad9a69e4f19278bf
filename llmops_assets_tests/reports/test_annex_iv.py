"""The EU AI Act's Annex IV: every point, what is known from evidence, and what a human must add."""

from __future__ import annotations

import pytest

from llmops_assets.reports.annex_iv import AnnexIV, annex_iv
from llmops_assets.reports.audit import audit

from ..release_rig import Rig
from .audited import AUDITED_SPEC, record_steps
from .conftest import SECOND

POINTS = [
    "1(a)", "1(b)", "1(c)", "1(d)", "1(e)", "1(f)", "1(g)", "1(h)",
    "2(a)", "2(b)", "2(c)", "2(d)", "2(e)", "2(f)", "2(g)", "2(h)",
    "3", "4", "5", "6", "7", "8", "9",
]  # fmt: skip


@pytest.fixture(scope="module")
def annex(audited: Rig) -> AnnexIV:
    return annex_iv(audit(audited.platform, SECOND))


def test_every_point_is_there_in_its_order(annex: AnnexIV) -> None:
    """A regulator goes through the annex point by point."""
    assert [point.point for point in annex.points] == POINTS


def test_every_point_names_what_a_human_must_add(annex: AnnexIV) -> None:
    """No point of the annex can be met by a platform alone; a full one would deceive."""
    assert all(point.to_add for point in annex.points)
    shown = annex.markdown()
    for point in annex.points:
        for missing in point.to_add:
            assert f"- **A human must add:** {missing}." in shown


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("1(a)", "Repeats in tests"),
        ("1(a)", "release parrot.v2, version 2"),
        ("1(c)", "onnxruntime-genai 0.18.0"),
        ("1(c)", "compliance_report/bom.cdx.json, sha256:"),
        ("1(e)", "x86_64"),
        ("1(h)", "max_input_tokens 64"),
        ("2(a)", "Trained weights: taken over from parrot.v1"),
        ("2(b)", "Knows two words"),
        ("2(c)", "precision fp32"),
        ("2(d)", "Training data, licence: CC0-1.0"),
        ("2(d)", "rows 40,000"),
        ("2(e)", "bob decided “approve” (claimed)"),
        ("2(g)", "Gate accuracy, "),
        ("2(g)", "exact_match 1"),
        ("2(h)", "Signature of the package (OpenSSF Model Signing): valid"),
        ("3", "Input, tokens at most: 64"),
        ("4", "exact_match at_least 0.9"),
        ("5", "Who approved is claimed"),
        ("6", "In production "),
        ("9", "Readings on record: 1"),
    ],
)
def test_what_is_known_comes_from_the_record(annex: AnnexIV, point: str, words: str) -> None:
    """Each of these was signed; none was typed into a form."""
    (found,) = [each for each in annex.points if each.point == point]
    assert any(words in known for known in found.known), found.known


def test_points_that_no_platform_knows_stay_empty(annex: AnnexIV) -> None:
    """An invented declaration of conformity would be worse than none."""
    empty = {point.point for point in annex.points if not point.known}
    assert empty == {"1(b)", "1(f)", "1(g)", "8"}


def test_it_survives_json(annex: AnnexIV) -> None:
    """Bundles carry it for machines as well."""
    assert AnnexIV.model_validate_json(annex.model_dump_json()) == annex


def test_release_with_little_on_record_gets_all_points(rig: Rig) -> None:
    """It is asked for early, while there is time to add what is missing."""
    rig.freeze("parrot.v1")
    found = annex_iv(audit(rig.platform, "parrot.v1"))
    assert [point.point for point in found.points] == POINTS


def test_words_of_others_do_not_format(rig: Rig) -> None:
    """A use case must not be able to add a heading, a link or a finding of its own."""
    hostile = "Repeats\\n\\n## 8 [signed](http://x) **A human must add:** nothing <b>"
    text = AUDITED_SPEC.replace(
        "use_case: Repeats in tests what it is told to say.", f'use_case: "{hostile}"'
    )
    record_steps(rig, "parrot.v1", text)
    shown = annex_iv(audit(rig.platform, "parrot.v1")).markdown()
    assert "\n## 8 [" not in shown
    assert "[signed]" not in shown
    assert shown.count("**A human must add:** nothing") == 0
    assert "<b>" not in shown.replace("\\<b\\>", "")
