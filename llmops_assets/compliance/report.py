"""What every compliance check returns."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Report(BaseModel):
    """The result of one check; it passes if there are no problems.

    A problem is one sentence for a person: where, what is wrong, what to do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems
