"""What a sensor remembers between ticks.

A cursor is written by Dagster together with the runs that a tick asks for, so it never
claims more than was asked for. It stays small: what grows lies in the store, as a record
that the cursor names by its digest.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import TriggerError


class Cursor(BaseModel):
    """Base of all cursors; a change of one's form raises its version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1

    @classmethod
    def from_json(cls, text: str | None) -> Self | None:
        """The cursor that the last tick left; None before the first.

        Raises:
            TriggerError: another version of the platform wrote it, or a person.
        """
        if text is None:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise TriggerError(
                "The sensor's cursor cannot be read",
                expected=f"a {cls.__name__} of version {cls.model_fields['version'].default}",
                found=text,
                cure="mend it on the sensor's page in Dagster, or clear it there: the sensor "
                "then begins with what is there now",
            ) from error

    def to_json(self) -> str:
        return self.model_dump_json()
