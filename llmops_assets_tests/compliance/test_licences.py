"""Licences: what is off the list is found in any SPDX expression."""

from __future__ import annotations

import pytest

from llmops_assets.compliance.licences import PERMISSIVE_LICENCES, judge_licences
from llmops_assets.errors import SpecError


@pytest.mark.parametrize(
    "expression",
    [
        "Apache-2.0",
        "apache-2.0",  # Hugging Face writes them in lower case
        "MIT AND CC-BY-4.0",
        "GPL-3.0-only OR MIT",
        "MIT AND (GPL-3.0-only OR (AGPL-3.0-only OR BSD-3-Clause))",
        "Apache-2.0 WITH LLVM-exception",
    ],
)
def test_what_can_be_used_by_the_list_passes(expression: str) -> None:
    """A choice (`OR`) with one allowed side can be taken; asking for a waiver is noise."""
    report = judge_licences({"weights": expression})
    assert report.passed, report.problems


@pytest.mark.parametrize(
    ("expression", "culprit"),
    [
        ("GPL-3.0-only", "GPL-3.0-only"),
        ("MIT AND GPL-3.0-only", "because of GPL-3.0-only;"),
        ("AGPL-3.0-only OR GPL-3.0-only", "AGPL-3.0-only, GPL-3.0-only"),
        ("MIT AND (GPL-3.0-only OR AGPL-3.0-only)", "GPL-3.0-only, AGPL-3.0-only"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "WITH Classpath-exception-2.0"),
        ("CC-BY-NC-4.0", "CC-BY-NC-4.0"),
        ("LicenseRef-llama3.1", "LicenseRef-llama3.1"),
        ("llama3.1", "llama3.1"),
        ("MIT Apache-2.0", "not an SPDX expression"),
        ("MIT AND", "not an SPDX expression"),
        ("", "no licence is declared"),
        (None, "no licence is declared"),
    ],
)
def test_what_is_off_the_list_is_named(expression: str | None, culprit: str) -> None:
    """The reader must see which licence is the problem, and what would be none."""
    report = judge_licences({"training data": expression, "weights": "MIT"})
    (problem,) = report.problems
    assert problem.startswith("training data: ")
    assert culprit in problem
    if "not an SPDX" not in problem:
        assert "Apache-2.0" in problem


def test_a_list_of_its_own_decides() -> None:
    """A team may allow a model's own licence, or an exception without its licence."""
    allowed = ("LicenseRef-llama3.1", "GPL-2.0-only WITH Classpath-exception-2.0")
    verdicts = judge_licences(
        {
            "a": "LicenseRef-Llama3.1",
            "b": "gpl-2.0-only with classpath-exception-2.0",
            "c": "GPL-2.0-only",
            "d": "MIT",
        },
        allowed,
    )
    assert [problem[:2] for problem in verdicts.problems] == ["c:", "d:"]
    assert verdicts.licences["b"] == "GPL-2.0-only WITH Classpath-exception-2.0"


@pytest.mark.parametrize("entry", ["Apache 2.0", "Apache2", "MIT OR ISC", ""])
def test_a_mistyped_entry_of_the_list_is_an_error(entry: str) -> None:
    """It would match nothing, and somebody would wonder why for a day."""
    with pytest.raises(SpecError, match="allow-list is not one licence"):
        judge_licences({"weights": "MIT"}, (*PERMISSIVE_LICENCES, entry))
