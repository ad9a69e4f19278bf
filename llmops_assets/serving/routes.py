"""Routes: which slots get a model's traffic, as a chain of immutable records.

A route is one versioned object per model and environment. It changes only by
compare-and-set in the store, and is then applied to the gateway; whoever finds that
the gateway runs behind the store applies it again.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmops_assets.serving.slots import Colour, Environment


class RouteTarget(BaseModel):
    """A slot on a route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    colour: Colour
    weight: int = Field(ge=0, le=100, description="Share of the traffic, per cent.")
    package: str = Field(description="Digest of the packaged model in the slot.")
    release: str
    version: int = Field(ge=1)
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int


class Route(BaseModel):
    """One generation of a route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    environment: Environment
    model: str
    generation: int = Field(ge=1)
    targets: tuple[RouteTarget, ...]
    actor: str = Field(description="Who or what made the change.")
    reason: str
    time: datetime
    predecessor: str | None = Field(description="Digest of the route before this one.")

    @model_validator(mode="after")
    def _weights_add_up(self) -> Route:
        total = sum(target.weight for target in self.targets)
        if total not in (0, 100):
            raise ValueError(f"the weights must add up to 100, or all be 0; they are {total}")
        return self

    @property
    def serving(self) -> RouteTarget | None:
        """The target with the largest share; None when nothing gets traffic."""
        best = max(self.targets, key=lambda target: target.weight, default=None)
        return best if best is not None and best.weight > 0 else None
