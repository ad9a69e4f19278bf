"""The example's data must be learnable, unambiguous and honest about what is held out."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date

import pytest

from llmops_assets.develop.dates import Row, generate
from llmops_assets.errors import SpecError
from llmops_assets.spec import GeneratedDates, Split

LOCALES = ("en", "de", "fr", "es", "it")


def dates(
    rows: int = 3000, seed: int = 1, locales: tuple[str, ...] = LOCALES, evaluation_seed: int = 2
) -> GeneratedDates:
    return GeneratedDates(
        source="dates",
        locales=locales,
        training=Split(rows=rows, seed=seed),
        evaluation=Split(rows=600, seed=evaluation_seed),
    )


@pytest.fixture(scope="module")
def training() -> list[Row]:
    return generate(dates(rows=20_000), "training")


def test_equal_specs_give_equal_rows_and_other_seeds_other_rows() -> None:
    """Reuse by action digest is only right if the same parameters give the same data."""
    assert generate(dates(seed=1), "training") == generate(dates(seed=1), "training")
    assert generate(dates(seed=1), "training") != generate(dates(seed=3), "training")


def test_slices_are_balanced() -> None:
    """The fairness gate compares locales, so each needs the same weight."""
    counts = Counter(row.slice for row in generate(dates(rows=3002), "training"))
    assert counts == {"en": 601, "de": 601, "fr": 600, "es": 600, "it": 600}


def test_no_evaluation_prompt_is_trained_on_even_with_one_seed_for_both(
    training: list[Row],
) -> None:
    """Holding out must not hang on somebody picking different seeds."""
    evaluation = generate(dates(evaluation_seed=1), "evaluation")
    assert not {row.prompt.casefold() for row in training} & {
        row.prompt.casefold() for row in evaluation
    }
    assert not {row.completion for row in training} & {row.completion for row in evaluation}


def test_a_prompt_means_one_date_in_every_locale(training: list[Row]) -> None:
    """The model is not told the locale: two meanings of one prompt cannot be learned."""
    meanings: dict[str, str] = {}
    for row in training:
        assert meanings.setdefault(row.prompt.casefold(), row.completion) == row.completion


def test_numeric_forms_stay_only_where_all_locales_agree(training: list[Row]) -> None:
    """03/04/2024 is in March or April; 03.04.2024 is written in German alone."""
    assert not [row for row in training if "/" in row.prompt]
    numeric = [row for row in training if not any(c.isalpha() for c in row.prompt)]
    assert {row.slice for row in numeric} == {"de"}
    # French and Spanish agree on day/month, so without English the slash is unambiguous.
    without_english = generate(dates(locales=("fr", "es")), "training")
    assert {row.slice for row in without_english if "/" in row.prompt} == {"fr", "es"}
    for row in without_english:
        if "/" in row.prompt:
            day, month, year = map(int, row.prompt.split("/"))
            assert date(year, month, day).isoformat() == row.completion


@pytest.mark.parametrize(
    ("form", "locale"),
    [
        (r"le \d+ mars \d{4}", "fr"),
        (r"le 1er mars \d{4}", "fr"),
        (r"\d+\. oktober \d{4}", "de"),
        (r"july \d+, \d{4}", "en"),
        (r"july \d+(st|nd|rd|th), \d{4}", "en"),
        (r"\d+ july \d{4}", "en"),
        (r"\d+ de mayo de \d{4}", "es"),
        (r"il \d+ settembre \d{4}", "it"),
    ],
)
def test_what_people_write_is_trained(training: list[Row], form: str, locale: str) -> None:
    """Known answers of deployments use these forms; CLDR alone lacks several of them."""
    prompts = [row.prompt.lower() for row in training if row.slice == locale]
    assert any(re.fullmatch(form, prompt) for prompt in prompts)


def test_prompts_are_unique(training: list[Row]) -> None:
    """A repeated prompt would count twice in exact match."""
    assert len({row.prompt for row in training}) == len(training)


def test_completions_are_iso_dates_of_the_range(training: list[Row]) -> None:
    """The answer anyone can check is ISO 8601, with years that the spec's author expects."""
    years = {date.fromisoformat(row.completion).year for row in training}
    assert min(years) == 1950
    assert max(years) == 2050
    assert all(len(row.completion) == 10 for row in training)


def test_unknown_locale_is_named() -> None:
    """A typing error in a spec must say which word is wrong, not fail deep in Babel."""
    with pytest.raises(SpecError, match=r"'xx_nowhere'.*data\.locales"):
        generate(dates(locales=("en", "xx_nowhere")), "training")


def test_more_rows_than_dates_are_refused() -> None:
    """Without a limit, generating would search for new prompts for ever."""
    with pytest.raises(SpecError, match="not enough different dates"):
        generate(
            GeneratedDates(
                source="dates",
                locales=("it",),
                training=Split(rows=1, seed=0),
                evaluation=Split(rows=100_000, seed=0),
            ),
            "evaluation",
        )
