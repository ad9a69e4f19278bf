"""Model cards: what a person must know before using a model, and whether it is written.

A card is a section of the model spec, or a Hugging Face `README.md`: Markdown with a YAML
block in front (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.compliance.report import Report
from llmops_assets.errors import DataError

CARD_FILE = "README.md"
LARGEST_CARD_BYTES = 2**20


class ModelCard(BaseModel):
    """A model card. Every part has a default, so that a spec may be written before its card;
    the compliance gate asks for the missing parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: str = Field(default="", description="SPDX expression of the weights' licence.")
    languages: tuple[str, ...] = Field(
        default=(), description="BCP 47 tags of the languages it understands, such as en or pt-BR."
    )
    intended_use: str = Field(default="", description="What it may be used for, and by whom.")
    limitations: str = Field(default="", description="What it cannot do; known risks and biases.")
    training_data: str = Field(default="", description="What it was trained on, and its source.")
    evaluation: str = Field(default="", description="How well it does, on what data.")
    contact: str = Field(
        default="", description="Who answers for it: e-mail address, `team:<name>` or URL."
    )
    base_model: str | None = Field(default=None, description="The model it was tuned from, if any.")


PROSE = ("intended_use", "limitations", "training_data", "evaluation")
REQUIRED = ("license", "languages", *PROSE, "contact")
FEWEST_WORDS = 3

# In capitals, as "todo" is a word of Spanish.
MARKER = re.compile(r"\b(TODO|TBD|TBA|FIXME|XXX)\b")
FILLER = re.compile(r"lorem ipsum|\[?more information needed\]?|\[?to be (written|done)\]?", re.I)
NOTHING = re.compile(r"\W*(n/?a|none|unknown|nothing|-+|\.+|…)?\W*", re.I)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
CONTACT = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+|https?://\S+|team:[A-Za-z0-9_-]+")

FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t#]*")
FENCE = re.compile(r" {0,3}(```|~~~)")

# Headings as Hugging Face's template has them, and as people shorten them.
HEADINGS = {
    "intended_use": re.compile(r"(intended|direct) uses?\b|^uses?$|how to use", re.I),
    "limitations": re.compile(r"limitation|\brisks?\b|\bbias", re.I),
    "training_data": re.compile(r"training (data|details)|^data(set)?s?$", re.I),
    "evaluation": re.compile(r"^evaluation|^results$|^performance$|^metrics$", re.I),
    "contact": re.compile(r"\bcontact\b", re.I),
}


class CardReport(Report):
    """Which parts of a card are not there, or say nothing."""

    missing: tuple[str, ...] = Field(description="Names of the parts that have a problem.")


def check_card(card: ModelCard) -> CardReport:
    """Finds required parts that are missing, empty, a placeholder or too short to say much."""
    problems = {part: problem for part in REQUIRED if (problem := _problem(part, card)) is not None}
    return CardReport(
        problems=tuple(f"model card: {part}: {problem}" for part, problem in problems.items()),
        missing=tuple(problems),
    )


def read_card(directory: Path) -> ModelCard:
    """Reads the model card of a Hugging Face directory, its `README.md`.

    `license`, `language` and `base_model` come from the YAML block, where a licence of its
    own is `license: other` with `license_name` (without one it is `LicenseRef-other`, as
    the card does not say that there is none); the rest from the text below the headings of
    Hugging Face's template. A part that is not found stays empty.

    Raises:
        DataError: there is no card, or it is no UTF-8 text or its YAML cannot be read.
    """
    path = directory / CARD_FILE
    try:
        if path.stat().st_size > LARGEST_CARD_BYTES:
            raise DataError(
                f"{path} is too large for a model card",
                expected=f"at most {LARGEST_CARD_BYTES} bytes",
                found=path.stat().st_size,
                cure="shorten it",
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"There is no readable model card {path}",
            expected="a README.md in UTF-8, or a `card` section in the model's spec",
            found=error,
            cure="write one of them",
        ) from error
    match = FRONT_MATTER.match(text)
    facts = _front_matter(match.group(1), path) if match else {}
    sections = _sections(text[match.end() :] if match else text)
    return ModelCard(
        license=_licence(facts),
        languages=_texts(facts.get("language")),
        base_model=", ".join(_texts(facts.get("base_model"))) or None,
        **sections,
    )


def prose_problem(text: str) -> str | None:
    """Why a text that a person should have written says nothing; None if it says something."""
    return _emptiness(text) or (
        f"{text.strip()!r} is too short; write a sentence"
        if len(text.split()) < FEWEST_WORDS
        else None
    )


def _problem(part: str, card: ModelCard) -> str | None:
    value = getattr(card, part)
    if part == "languages":
        bad = [tag for tag in card.languages if not LANGUAGE.fullmatch(tag)]
        if bad:
            return f"{', '.join(map(repr, bad))}: write BCP 47 tags such as en or pt-BR"
        return None if card.languages else "missing; name the languages, such as en"
    if part in PROSE:
        return prose_problem(value)
    if (problem := _emptiness(value)) is not None:
        return problem
    if part == "contact" and not CONTACT.search(value):
        return f"{value.strip()!r}: write an e-mail address, team:<name> or a URL"
    return None


def _emptiness(text: str) -> str | None:
    if not text.strip():
        return "missing; write it"
    if (found := MARKER.search(text) or FILLER.search(text)) is not None:
        return f"a placeholder ({found.group()}); write what is true"
    if NOTHING.fullmatch(text):
        return f"{text.strip()!r} says nothing; write what is true"
    return None


def _front_matter(block: str, path: Path) -> Mapping[str, Any]:
    try:
        facts = yaml.safe_load(block)
    except yaml.YAMLError as error:
        raise DataError(
            f"The YAML block of {path} cannot be read", found=error, cure="mend the line it names"
        ) from error
    return facts if isinstance(facts, dict) else {}


def _licence(facts: Mapping[str, Any]) -> str:
    declared = " AND ".join(_texts(facts.get("license")))
    if declared.casefold() == "other":
        name = " ".join(_texts(facts.get("license_name")))
        return f"LicenseRef-{name or 'other'}"
    return declared


def _texts(value: object) -> tuple[str, ...]:
    """A YAML value that is a text or a list of them, as the format allows for most keys."""
    values = value if isinstance(value, list) else [value]
    return tuple(str(entry).strip() for entry in values if entry is not None)


def _sections(markdown: str) -> dict[str, str]:
    """The text below each known heading, with that of its subheadings."""
    found: dict[str, list[str]] = {}
    inside: dict[str, int] = {}
    for line, heading in _lines(markdown):
        if heading is not None:
            level, title = len(heading[1]), heading[2]
            inside = {part: depth for part, depth in inside.items() if depth < level}
            for part, pattern in HEADINGS.items():
                if pattern.search(title):
                    inside.setdefault(part, level)
            continue
        for part in inside:
            found.setdefault(part, []).append(line)
    return {part: "\n".join(lines).strip() for part, lines in found.items()}


def _lines(markdown: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Lines with the match of those that are headings; `#` in a code block is none."""
    in_code = False
    for line in re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL).splitlines():
        if FENCE.match(line):
            in_code = not in_code
        yield line, None if in_code else HEADING.fullmatch(line)
