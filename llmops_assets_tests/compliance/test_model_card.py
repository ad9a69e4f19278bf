"""Model cards: a part that is missing, or says nothing, is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmops_assets.compliance.model_card import ModelCard, check_card, read_card
from llmops_assets.errors import DataError

CARD = ModelCard(
    license="Apache-2.0",
    languages=("en", "pt-BR"),
    intended_use="Turns a written date into ISO 8601.",
    limitations="Knows five languages. Todo lo demás es incierto.",
    training_data="40,000 dates rendered from CLDR.",
    evaluation="Exact match of 99.8 % on 600 held-out dates.",
    contact="team:data-science",
)
# The headings of Hugging Face's own template.
README = """\
---
license: apache-2.0
language: [en, de]
base_model: acme/tiny
---
# Model Card for dates

Some words before.

## Uses

### Direct Use

Turns a written date into ISO 8601.

```python
# Evaluation
print("not a heading")
```

## Bias, Risks, and Limitations

Knows five languages and nothing else.

### Recommendations

Check what it answers.

## Training Details

### Training Data

40,000 dates rendered from CLDR.

## Evaluation

Exact match of 99.8 % on 600 held-out dates.

## Model Card Contact

dates@example.com
"""


def readme(folder: Path, text: str) -> ModelCard:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return read_card(folder)


def test_whole_card_passes() -> None:
    """A checker that always complains is switched off."""
    assert check_card(CARD).problems == ()


def test_nothing_is_written_yet() -> None:
    """Every required part is asked for by name; a base model is not required."""
    report = check_card(ModelCard())
    assert report.missing == (
        "license", "languages", "intended_use", "limitations", "training_data", "evaluation",
        "contact",
    )  # fmt: skip
    assert len(report.problems) == len(report.missing)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("limitations", "", "missing"),
        ("limitations", " \n ", "missing"),
        ("limitations", "TODO: ask the data team about these", "a placeholder (TODO)"),
        ("evaluation", "Lorem ipsum dolor sit amet", "a placeholder (Lorem ipsum)"),
        ("training_data", "[More Information Needed]", "a placeholder"),
        ("intended_use", "N/A", "says nothing"),
        ("limitations", "none.", "says nothing"),
        ("evaluation", "very good", "too short"),
        ("contact", "the usual people here", "write an e-mail address"),
        ("contact", "team:TBD", "a placeholder (TBD)"),
        ("languages", ("en", "English"), "'English'"),
        ("license", "unknown", "says nothing"),
    ],
)
def test_part_that_says_nothing_is_found(part: str, value: object, message: str) -> None:
    """People fill required fields with whatever passes."""
    report = check_card(CARD.model_copy(update={part: value}))
    assert report.missing == (part,)
    assert message in report.problems[0]


def test_hugging_face_card_is_read(tmp_path: Path) -> None:
    """An imported model brings its card; nobody copies it into a spec by hand."""
    card = readme(tmp_path, README)
    assert check_card(card).problems == ()
    assert (card.license, card.languages, card.base_model) == (
        "apache-2.0", ("en", "de"), "acme/tiny",
    )  # fmt: skip
    assert card.intended_use.startswith("Turns a written date")
    assert "not a heading" in card.intended_use
    assert "Check what it answers" in card.limitations
    assert "600 held-out" not in card.limitations
    assert card.contact == "dates@example.com"


def test_section_of_the_template_left_as_it_was(tmp_path: Path) -> None:
    """Hugging Face's library writes its placeholder into every section nobody filled."""
    card = readme(tmp_path, README.replace("40,000 dates rendered from CLDR.", "<!-- source -->"))
    assert check_card(card).missing == ("training_data",)
    card = readme(
        tmp_path,
        README.replace("Knows five languages and nothing else.", "[More Information Needed]"),
    )
    assert check_card(card).missing == ("limitations",)


@pytest.mark.parametrize(
    ("block", "licence"),
    [
        ("license: other\nlicense_name: llama3.1", "LicenseRef-llama3.1"),
        ("license: other", "LicenseRef-other"),
        ("license: [mit, cc-by-4.0]", "mit AND cc-by-4.0"),
        ("tags: [x]", ""),
    ],
)
def test_licence_of_the_front_matter(tmp_path: Path, block: str, licence: str) -> None:
    """`other` is a licence that no list may pass over; two of them both hold."""
    assert readme(tmp_path, f"---\n{block}\n---\n# Card\n").license == licence


def test_card_without_front_matter(tmp_path: Path) -> None:
    """A plain README is a card without its facts, not an error."""
    card = readme(tmp_path, "# Uses\nTurns dates into ISO dates.\n")
    assert (card.license, card.intended_use) == ("", "Turns dates into ISO dates.")


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"\xff\xfe", b"x" * (2**20 + 1), None])
def test_card_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """An unreadable card is not a card without problems."""
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(DataError, match=r"README\.md"):
        read_card(tmp_path)


def test_yaml_of_a_card_builds_no_objects(tmp_path: Path) -> None:
    """The card comes with somebody's model."""
    marker = tmp_path / "ran"
    with pytest.raises(DataError):
        readme(tmp_path, f"---\na: !!python/object/apply:os.mkdir ['{marker}']\n---\n")
    assert not marker.exists()
