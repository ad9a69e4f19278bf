"""Routes: which slots get a model's traffic, as a chain of immutable records.

A route is one versioned object per model and environment. It changes only by
compare-and-set in the store, and is then applied to the gateway; whoever finds that
the gateway runs behind the store applies it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmops_assets.errors import ArtifactCorruptError, RefConflictError, StoreError
from llmops_assets.serving.slots import Colour, Environment
from llmops_assets.storage.store import Store, canonical_json, digest_of

if TYPE_CHECKING:
    from llmops_assets.serving.gateway import Gateway


Port = Annotated[int, Field(ge=1, le=65535)]


class RouteTarget(BaseModel):
    """A slot on a route."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    colour: Colour
    weight: int = Field(ge=0, le=100, description="Share of the traffic, per cent.")
    package: str = Field(description="Digest of the packaged model in the slot.")
    release: str
    version: int = Field(ge=1)
    host: str
    http_port: Port
    grpc_port: Port
    metrics_port: Port


class Route(BaseModel):
    """One generation of a route."""

    model_config = ConfigDict(extra="forbid", frozen=True, revalidate_instances="always")

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


class Routes:
    """Reads and changes routes: recorded in the store first, then applied to the gateway.

    Safe with several processes at once. The store decides; the gateway follows.
    """

    def __init__(self, store: Store, gateway: Gateway) -> None:
        self._store = store
        self._gateway = gateway

    def current(self, environment: Environment, model: str) -> tuple[Route | None, str | None]:
        """The recorded route and its digest; (None, None) for a model never routed.

        Raises:
            ArtifactCorruptError: the record is damaged.
        """
        digest = self._store.resolve(_name(environment, model))
        return (self._read(digest), digest) if digest is not None else (None, None)

    def all(self, environment: Environment) -> Mapping[str, Route]:
        """The recorded route of every model in an environment, by model.

        Raises:
            ArtifactCorruptError: a record is damaged.
        """
        routes = (self._read(digest) for _, digest in self._store.refs(f"routes/{environment}"))
        return {route.model: route for route in routes}

    def change(
        self,
        environment: Environment,
        model: str,
        targets: Sequence[RouteTarget],
        *,
        actor: str,
        reason: str,
        expected: str | None,
    ) -> Route:
        """Makes `targets` the model's route; returns when the gateway uses it.

        Args:
            environment: whose route.
            model: whose route.
            targets: slots with their weights; none takes the model off the environment.
            actor: who or what asks for the change.
            reason: why, for the audit.
            expected: digest that `current` gave when the caller decided.

        Raises:
            RefConflictError: somebody else changed the route since; nothing happened.
            GatewayError: the gateway does not answer (nothing happened, unless it
                stopped just now), or it refused the route (the store names the new
                route, the gateway keeps the old one: `applied` shows the gap).
        """
        # A gateway that is down is found before anything is recorded.
        self._gateway.applied(environment)
        predecessor, digest = self.current(environment, model)
        if digest != expected:
            raise self._conflict(environment, model, expected, predecessor)
        route = Route(
            environment=environment,
            model=model,
            generation=1 if predecessor is None else predecessor.generation + 1,
            targets=tuple(targets),
            actor=actor,
            reason=reason,
            time=datetime.now(UTC),
            predecessor=digest,
        )
        name = _name(environment, model)
        # A record whose compare-and-set loses stays in the log, on no chain.
        entry = self._store.append(name, route.model_dump(mode="json"))
        try:
            self._store.compare_and_set(name, digest, entry.digest)
        except RefConflictError as error:
            winner, _ = self.current(environment, model)
            raise self._conflict(environment, model, expected, winner) from error
        self._apply(environment)
        return route

    def reconcile(self) -> None:
        """Applies everything that the store says, to every environment.

        Raises:
            GatewayError: the gateway does not answer, or refused a route.
        """
        for environment in Environment:
            self._apply(environment)

    def differences(self, environment: Environment) -> Mapping[str, tuple[int | None, int | None]]:
        """Models whose recorded and observed generation differ: (recorded, observed).

        None stands for "no route". Empty means that the gateway does what the store says.

        Raises:
            GatewayError: the gateway does not answer.
        """
        recorded = {model: route.generation for model, route in self.all(environment).items()}
        observed = self._gateway.applied(environment)
        return {
            model: (recorded.get(model), observed.get(model))
            for model in sorted(recorded.keys() | observed.keys())
            if recorded.get(model) != observed.get(model)
        }

    def history(self, environment: Environment, model: str) -> Iterator[tuple[str, Route]]:
        """Every route the model had, newest first, with its digest.

        Each record is checked against the digest that its successor (the ref, for the
        newest) names, so that nobody can rewrite the past without being seen.

        Raises:
            ArtifactCorruptError: the chain is broken; the message names the record.
        """
        digest = self._store.resolve(_name(environment, model))
        successor: Route | None = None
        while digest is not None:
            route = self._read(digest)
            if (route.environment, route.model) != (environment, model):
                raise _broken(
                    digest, f"a route of {model} in {environment}", f"one of {route.model}"
                )
            if successor is not None and route.generation != successor.generation - 1:
                raise _broken(digest, f"generation {successor.generation - 1}", route.generation)
            if (route.predecessor is None) != (route.generation == 1):
                raise _broken(digest, "a predecessor in all but generation 1", route.generation)
            yield digest, route
            successor, digest = route, route.predecessor

    def _apply(self, environment: Environment) -> None:
        # What the store says is read under the lock: of two changes at once, the one
        # that applies last has seen both.
        with self._gateway.exclusive():
            self._gateway.apply(environment, self.all(environment))

    def _read(self, digest: str) -> Route:
        record = self._store.record(digest)
        if (actual := digest_of(canonical_json(record))) != digest:
            raise _broken(digest, digest, actual)
        try:
            return Route.model_validate(record)
        except ValidationError as error:
            raise StoreError(
                f"The record {digest} is not a route",
                expected="a record that this platform wrote",
                found=error,
                cure="restore the ref to the digest of a route, see the log of routes",
            ) from error

    def _conflict(
        self, environment: Environment, model: str, expected: str | None, found: Route | None
    ) -> RefConflictError:
        return RefConflictError(
            f"Somebody else changed the {environment} route of {model}",
            expected=expected or "no route yet",
            found="no route"
            if found is None
            else f"generation {found.generation} by {found.actor} at {found.time:%F %T} UTC"
            f" ({found.reason})",
            cure="look at the route as it is now and decide anew",
        )


def _name(environment: Environment, model: str) -> str:
    """Of the ref that names the current route, and of the log of all of them."""
    return f"routes/{environment}/{model}"


def _broken(digest: str, expected: object, found: object) -> ArtifactCorruptError:
    return ArtifactCorruptError(
        f"The history of routes is broken at record {digest}",
        expected=expected,
        found=found,
        cure="restore the record from a backup; until then treat the history as tampered with",
    )
