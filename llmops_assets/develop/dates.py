"""The example model's data: dates as people write them, with their ISO 8601 form.

Month and weekday names and the order of a date's parts come from CLDR through Babel.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from babel import Locale, UnknownLocaleError
from babel.dates import format_date

from llmops_assets.develop.data import SplitName
from llmops_assets.errors import SpecError
from llmops_assets.spec import GeneratedDates

FIRST_DAY = date(1950, 1, 1)
LAST_DAY = date(2050, 12, 31)
EVALUATION_SHARE = 10
"""One date in this many is held out for evaluation."""

# What people write beside CLDR's own formats, in CLDR's pattern language (Unicode
# Technical Standard 35, part 4); `{ordinal}` is the day as an ordinal number.
FURTHER_PATTERNS: dict[str, tuple[str, ...]] = {
    "en": (
        "d MMMM y",
        "d MMM y",
        "MMMM d y",
        "MMMM {ordinal}, y",
        "{ordinal} MMMM y",
        "'the' {ordinal} 'of' MMMM y",
        "EEEE, d MMMM y",
    ),
    "de": ("'am' d. MMMM y", "'den' d. MMMM y", "EEEE, 'den' d. MMMM y", "d. MMM y"),
    "fr": ("'le' d MMMM y", "'le' EEEE d MMMM y", "'le' {ordinal} MMMM y", "{ordinal} MMMM y"),
    "es": ("'el' d 'de' MMMM 'de' y", "d MMMM y", "d 'de' MMMM 'del' y"),
    "it": ("'il' d MMMM y", "'il' {ordinal} MMMM y", "{ordinal} MMMM y", "d MMM y"),
}


@dataclass(frozen=True)
class Row:
    """One example: what is asked, the right answer, and the slice it counts for."""

    prompt: str
    completion: str
    slice: str


def generate(data: GeneratedDates, split: SplitName) -> list[Row]:
    """The rows of one split; equal arguments give equal rows.

    Slices are the locales, as equal in size as the number of rows allows. No prompt
    occurs twice, and none of training occurs in evaluation: a date belongs to one of
    them, whatever the seeds and sizes are, and a prompt means only one date.

    Raises:
        SpecError: CLDR does not know a locale, or there are not enough different prompts.
    """
    wanted = data.training if split == "training" else data.evaluation
    patterns = {name: _patterns(name, data.locales) for name in data.locales}
    days = [day for day in _all_days() if _is_held_out(day) == (split == "evaluation")]
    randomness = random.Random(f"{split} {wanted.seed}")
    seen: set[str] = set()
    rows: list[Row] = []
    for number in range(wanted.rows):
        name = data.locales[number % len(data.locales)]
        for _ in range(1000):
            day = randomness.choice(days)
            prompt = _render(day, name, randomness.choice(patterns[name]))
            if randomness.random() < 0.25:
                prompt = prompt.lower()
            if prompt not in seen:
                break
        else:
            raise SpecError(
                f"There are not enough different dates for the {split} data",
                expected=f"{wanted.rows} rows",
                found=f"hardly a new one in {name} after {number} rows",
                cure=f"lower data.{split}.rows in the model's spec",
            )
        seen.add(prompt)
        rows.append(Row(prompt=prompt, completion=day.isoformat(), slice=name))
    return rows


def _all_days() -> Iterator[date]:
    for offset in range((LAST_DAY - FIRST_DAY).days + 1):
        yield FIRST_DAY + timedelta(days=offset)


def _is_held_out(day: date) -> bool:
    digest = hashlib.sha256(day.isoformat().encode()).digest()
    return int.from_bytes(digest[:8], "big") % EVALUATION_SHARE == 0


def _render(day: date, locale: str, pattern: str) -> str:
    language = _locale(locale).language
    ordinal = f"'{_ordinal(day.day, language)}'"
    text = format_date(day, pattern.replace("{ordinal}", ordinal), locale=locale)
    # CLDR separates some parts by no-break spaces, which nobody types.
    return text.replace("\u00a0", " ").replace("\u202f", " ")


def _ordinal(number: int, language: str) -> str:
    """A day as an ordinal number; French and Italian use one for the first only."""
    if language == "en":
        teens = 11 <= number <= 13
        return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
    if number == 1:
        return {"fr": "1er", "it": "1º"}.get(language, "1")
    return str(number)


@cache
def _locale(name: str) -> Locale:
    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError) as error:
        raise SpecError(
            "The model's spec names a locale that CLDR does not know",
            expected="a locale such as en, de or pt_BR",
            found=repr(name),
            cure="mend data.locales in the model's spec",
        ) from error


def _patterns(name: str, locales: Sequence[str]) -> list[str]:
    """The patterns in which dates of a locale are written, in a fixed order.

    Patterns are drawn from it evenly, so one that it holds twice is drawn twice as often.
    """
    locale = _locale(name)
    written = [locale.date_formats[length].pattern for length in ("full", "long", "medium")]
    written += [locale.datetime_skeletons[skeleton].pattern for skeleton in ("yMMMd", "yMMMEd")]
    written += FURTHER_PATTERNS.get(locale.language, ())
    patterns = list(dict.fromkeys(pattern for pattern in written if "MMM" in pattern))
    numeric = _numeric_pattern(locale)
    # 3/4/2024 is in March or in April, depending on who wrote it.
    others = [_numeric_pattern(_locale(other)) for other in locales]
    alike = [other for other in others if _separators(other) == _separators(numeric)]
    if all(_order(other) == _order(numeric) for other in alike):
        # Twice, as months in digits have nothing in common with the other patterns.
        patterns += [numeric, numeric]
    return patterns


def _numeric_pattern(locale: Locale) -> str:
    """CLDR's short format, with a year of four digits, as its two cannot name a century."""
    return locale.date_formats["short"].pattern.replace("yy", "y")


def _separators(pattern: str) -> set[str]:
    return {character for character in pattern if not character.isalpha()}


def _order(pattern: str) -> str:
    """The order of day, month and year."""
    return "".join(dict.fromkeys(character for character in pattern if character in "dMy"))
