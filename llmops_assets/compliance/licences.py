"""Licences of weights and data against an allow-list, as SPDX expressions.

Syntax and meaning: SPDX Specification, annex "SPDX license expressions". With `OR` one
side must be allowed, with `AND` both. An exception behind `WITH` only adds permissions,
so it is allowed where its licence is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmops_assets.compliance.report import Report
from llmops_assets.errors import SpecError

if TYPE_CHECKING:
    from license_expression import Licensing

PERMISSIVE_LICENCES = (
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-4.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "ODC-By-1.0",
    "PDDL-1.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
)
"""Licences that allow commercial use and ask for no more than attribution."""

OWN_LICENCE_PREFIX = "LicenseRef-"


class LicenceReport(Report):
    """Which licences are off the list."""

    licences: dict[str, str] = Field(
        description="Normalised SPDX expression by subject, of those that could be parsed."
    )
    allowed: tuple[str, ...] = Field(description="The allow-list that was applied.")


def judge_licences(
    licences: Mapping[str, str | None], allowed: Collection[str] = PERMISSIVE_LICENCES
) -> LicenceReport:
    """Judges the licence of each subject.

    Args:
        licences: SPDX expression by subject, such as `weights` or `training data`. None or
            an empty text means that none is declared, which is a problem.
        allowed: SPDX identifiers, also `<licence> WITH <exception>`. A licence without one,
            as many models have, is written `LicenseRef-<name>` here and there.

    Raises:
        SpecError: an entry of the allow-list is no licence, so it would never match.
    """
    from license_expression import ExpressionError, get_spdx_licensing

    licensing = get_spdx_licensing()
    names = {_allowed_name(entry, licensing) for entry in allowed}
    listed = ", ".join(sorted(allowed))
    problems: list[str] = []
    normalised: dict[str, str] = {}
    for subject, text in licences.items():
        if text is None or not text.strip():
            problems.append(f"{subject}: no licence is declared; declare one of {listed}")
            continue
        try:
            expression: Any = licensing.parse(text)
        except (ExpressionError, IndexError) as error:  # "()" is an IndexError
            problems.append(
                f"{subject}: {text!r} is not an SPDX expression ({error}); "
                f"write one, or {OWN_LICENCE_PREFIX}<name> for a licence of its own"
            )
            continue
        normalised[subject] = str(expression)
        if refused := _refused(expression, names, licensing):
            problems.append(
                f"{subject}: {expression} is not allowed because of {', '.join(refused)}; "
                f"allowed are {listed}. Use other {subject}, or have the list reviewed"
            )
    return LicenceReport(
        problems=tuple(problems), licences=normalised, allowed=tuple(sorted(allowed))
    )


def _allowed_name(entry: str, licensing: Licensing) -> str:
    """The entry in the form in which a parsed licence is compared with it."""
    from license_expression import BaseSymbol, ExpressionError

    try:
        symbol: Any = licensing.parse(entry)
    except ExpressionError:
        symbol = None
    if not isinstance(symbol, BaseSymbol) or (
        licensing.unknown_license_keys(symbol) and not entry.startswith(OWN_LICENCE_PREFIX)
    ):
        raise SpecError(
            f"{entry!r} on the allow-list is not one licence",
            expected=f"an SPDX identifier, or {OWN_LICENCE_PREFIX}<name>",
            cure="correct it; see https://spdx.org/licenses",
        )
    return str(symbol).casefold()


def _refused(expression: Any, allowed: Collection[str], licensing: Licensing) -> list[str]:
    """The licences that keep an expression from being allowed; none if it is."""
    from license_expression import LicenseWithExceptionSymbol

    if isinstance(expression, licensing.AND | licensing.OR):
        sides = [_refused(side, allowed, licensing) for side in expression.args]
        if isinstance(expression, licensing.OR) and not all(sides):
            return []
        return list(dict.fromkeys(name for side in sides for name in side))
    if str(expression).casefold() in allowed:
        return []
    if isinstance(expression, LicenseWithExceptionSymbol):
        without_exception = expression.license_symbol
        return [] if str(without_exception).casefold() in allowed else [str(expression)]
    return [str(expression)]
