"""Personal data in training text: found, counted and never repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from llmops_assets.compliance.pii import PiiReport, find_pii, scan_pii
from llmops_assets.develop.data import build_data
from llmops_assets.errors import ToolError
from llmops_assets.spec import GeneratedDates, Split

from ..tiny_llama import tools

DATES = GeneratedDates(
    source="dates",
    locales=("en", "de", "fr", "es", "it"),
    training=Split(rows=3000, seed=1),
    evaluation=Split(rows=10, seed=2),
)


def write(folder: Path, prompts: list[str], completion: str = "fine") -> Path:
    folder.mkdir()
    pd.DataFrame({"prompt": prompts, "completion": completion, "slice": "all"}).to_parquet(
        folder / "data.parquet", index=False
    )
    return folder


def find(folder: Path, *prompts: str) -> PiiReport:
    return find_pii(write(folder / "data", list(prompts)))


# Numbers that are published for tests, with right checksums.
@pytest.mark.parametrize(
    ("text", "entity", "value"),
    [
        ("Write to jane.doe@example.com, please", "EMAIL_ADDRESS", "jane.doe@example.com"),
        ("call (415) 555-2671 today", "PHONE_NUMBER", "(415) 555-2671"),
        ("ruf +49 30 901820 an", "PHONE_NUMBER", "+49 30 901820"),
        ("pay with 4111 1111 1111 1111", "CREDIT_CARD", "4111 1111 1111 1111"),
        (
            "DE89 3704 0044 0532 0130 00, 02.10.1978",
            "IBAN_CODE",
            "DE89 3704 0044 0532 0130 00",
        ),
        ("from 203.0.113.77", "IP_ADDRESS", "203.0.113.77"),
        ("from 2001:db8::8a2e:370:7334", "IP_ADDRESS", "2001:db8::8a2e:370:7334"),
        ("device 00:1b:44:11:3a:b7", "MAC_ADDRESS", "00:1b:44:11:3a:b7"),
        ("SSN 536-22-8741", "US_SSN", "536-22-8741"),
        ("to 1BoatSLRHtKNngkdXEeobR76b53LETtpyT", "CRYPTO", "1BoatSLRHtKNngkdXEeobR76b53LETtpyT"),
        ("DNI 12345678Z", "ES_NIF", "12345678Z"),
        ("CF RSSMRA85T10A562S", "IT_FISCAL_CODE", "RSSMRA85T10A562S"),
        ("IdNr 86095742719", "DE_TAX_ID", "86095742719"),
        ("NINO AB123456C", "UK_NINO", "AB123456C"),
    ],
)
def test_each_kind_is_found_and_redacted(
    tmp_path: Path, text: str, entity: str, value: str
) -> None:
    """A pattern that is meant to save time must not cost the finding."""
    report = find(tmp_path, "3 March 2024", text, "4 March 2024")
    assert report.counts == {entity: 1}
    (example,) = report.examples
    assert (example.entity, example.row, example.column) == (entity, 2, "prompt")
    assert example.redacted == f"{value[:2]}… ({len(value)} characters)"
    assert value not in report.model_dump_json()
    assert report.problems[0].startswith(f"{entity}: 1 in the data, the first in row 2")


def test_every_row_counts_and_few_are_shown(tmp_path: Path) -> None:
    """Equal texts are scanned once, but each of their rows has to be mended."""
    folder = write(tmp_path / "data", ["a@example.com"] * 50 + ["203.0.113.77"], "b@example.org")
    report = find_pii(folder)
    assert report.counts == {"EMAIL_ADDRESS": 50 + 51, "IP_ADDRESS": 1}
    assert len(report.examples) == 11
    assert {example.entity for example in report.examples} == {"EMAIL_ADDRESS", "IP_ADDRESS"}
    assert "the first in row 51" in report.problems[1]


def test_threshold_decides(tmp_path: Path) -> None:
    """A phone number has no checksum: Presidio is never surer than 0.4."""
    folder = write(tmp_path / "data", ["call (415) 555-2671", "a@example.com"])
    assert set(find_pii(folder).counts) == {"PHONE_NUMBER", "EMAIL_ADDRESS"}
    assert set(find_pii(folder, threshold=0.5).counts) == {"EMAIL_ADDRESS"}


def test_texts_that_look_alike_pass(tmp_path: Path) -> None:
    """Dates, versions and sums are what text is full of."""
    report = find(
        tmp_path, "02.10.1978", "10/02/1978", "1978-10-02", "20240303", "version 1.2.3",
        "1,234,567.89", "user @ home", "4111 1111 1111 1112", "DE00 3704 0044 0532 0130 00",
        "a::b", "12:30:45", "02.10.1978 - 03.10.1978",
    )  # fmt: skip
    assert report.counts == {}
    assert report.passed


def test_generated_dates_are_clean(tmp_path: Path) -> None:
    """The example's own data, through the tool: Presidio alone takes 1 in 100 for a phone."""
    build_data(DATES, "training", tmp_path / "data", tmp_path)
    report = scan_pii(tmp_path / "data", tmp_path / "report.json", tools(tmp_path))
    assert report.problems == ()
    assert report.rows == 3000
    assert json.loads((tmp_path / "report.json").read_text())["counts"] == {}


def test_scan_of_no_data_fails(tmp_path: Path) -> None:
    """A scan that did not take place is no clean scan."""
    with pytest.raises(ToolError, match="There is no data file"):
        scan_pii(tmp_path / "gone", tmp_path / "report.json", tools(tmp_path))
