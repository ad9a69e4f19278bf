"""The gateway: the one address that clients know, in front of all slots.

The platform tells it which slot gets which share of a model's traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from llmops_assets.serving.routes import Route
from llmops_assets.serving.slots import Environment


class Gateway(Protocol):
    """Applies routes. A call returns only when the gateway reports that it uses them."""

    def apply(self, environment: Environment, routes: Mapping[str, Route]) -> None:
        """Makes `routes` (by model) all that the environment's listener serves.

        Applying the same routes again is harmless.

        Raises:
            GatewayError: the gateway does not answer, or refused them; the last good
                ones stay.
        """
        ...

    def applied(self, environment: Environment) -> Mapping[str, int]:
        """The generation of each model's route that the gateway reports as in use.

        Raises:
            GatewayError: it does not answer.
        """
        ...
