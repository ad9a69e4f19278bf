"""Routes: which slots get a model's traffic, as a chain of signed statements.

A route is one versioned object per model and environment: the last entry of its chain in
the evidence log. It changes only by an append that names the entry before, and is then
applied to the gateway; whoever finds that the gateway runs behind the log applies it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmops_assets.errors import EvidenceError, RefConflictError
from llmops_assets.evidence import attest
from llmops_assets.evidence.leaves import Entry, release_chain, route_chain
from llmops_assets.evidence.log import Attestation, EvidenceLog
from llmops_assets.serving.slots import Colour, Environment

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
    predecessor: str | None = Field(
        description="Digest of the entry of the evidence log with the route before this one."
    )

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


class ServedTarget(BaseModel):
    """A slot that the gateway sends calls to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    colour: Colour
    weight: int
    package: str
    release: str
    version: int
    host: str
    http_port: int

    def __str__(self) -> str:
        return f"{self.weight} % {self.release} in {self.colour} at {self.host}:{self.http_port}"


class ServedRoute(BaseModel):
    """What the gateway does with a model's calls, as it says itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generation: int
    targets: frozenset[ServedTarget]

    @classmethod
    def of(cls, route: Route) -> ServedRoute:
        """What the gateway does once it uses a route."""
        fields = set(ServedTarget.model_fields)
        return cls(
            generation=route.generation,
            targets=frozenset(
                ServedTarget.model_validate(target.model_dump(include=fields))
                for target in route.targets
            ),
        )

    def __str__(self) -> str:
        targets = sorted(self.targets, key=lambda target: (-target.weight, target.colour))
        return f"generation {self.generation}, {'; '.join(map(str, targets)) or 'no traffic'}"


class Routes:
    """Reads and changes routes: attested first, then applied to the gateway.

    Safe with several processes at once. The evidence decides; the gateway follows.
    """

    def __init__(self, evidence: EvidenceLog, gateway: Gateway) -> None:
        self._evidence = evidence
        self._gateway = gateway

    def current(self, environment: Environment, model: str) -> tuple[Route | None, str | None]:
        """The recorded route and its entry's digest; (None, None) for a model never routed.

        Raises:
            EvidenceError: the record is missing, changed, or not signed by a trusted key.
        """
        return self.at(environment, model, None)

    def at(
        self, environment: Environment, model: str, time: datetime | None
    ) -> tuple[Route | None, str | None]:
        """As `current`, as it was recorded at a time.

        Raises:
            EvidenceError: as `current`.
        """
        entry = self._evidence.newest(route_chain(environment, model), time)
        return (None, None) if entry is None else (_read(entry), entry.digest)

    def all(self, environment: Environment) -> Mapping[str, Route]:
        """The recorded route of every model in an environment, by model.

        Raises:
            EvidenceError: as `current`.
        """
        routes = (_read(entry) for entry in self._evidence.heads(f"routes/{environment}"))
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
            EvidenceError: the change cannot be signed, or the evidence is not what it was;
                nothing happened.
            GatewayError: the gateway does not answer (nothing happened, unless it
                stopped just now), or it refused the route (the log has the new
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
        chain = route_chain(environment, model)
        # Also of a release that the change takes off: it is about that one as well.
        named = (*route.targets, *(() if predecessor is None else predecessor.targets))
        chains = dict.fromkeys([chain, *(release_chain(target.release) for target in named)])
        try:
            self._evidence.append(
                Attestation(attest.route_change(route), tuple(chains)), heads={chain: digest}
            )
        except RefConflictError as error:
            winner, _ = self.current(environment, model)
            raise self._conflict(environment, model, expected, winner) from error
        self._apply(environment)
        return route

    def reconcile(self) -> None:
        """Applies everything that is recorded, to every environment.

        Raises:
            GatewayError: the gateway does not answer, or refused a route.
        """
        for environment in Environment:
            self._apply(environment)

    def differences(self, environment: Environment) -> Mapping[str, tuple[int | None, int | None]]:
        """Models whose recorded and observed generation differ: (recorded, observed).

        None stands for "no route". Empty means that the gateway does what is recorded.

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
        """Every route the model had, newest first, with its entry's digest.

        Raises:
            EvidenceError: one is missing, changed, not signed by a trusted key, or does not
                follow the one before.
        """
        chain = route_chain(environment, model)
        successor: Route | None = None
        for entry in self._evidence.entries(chain, newest_first=True):
            route = _read(entry)
            if successor is not None and (successor.predecessor, successor.generation - 1) != (
                entry.digest,
                route.generation,
            ):
                raise EvidenceError(
                    f"The {environment} routes of {model} do not follow each other",
                    expected=f"generation {successor.generation - 1}, {successor.predecessor}",
                    found=f"generation {route.generation}, {entry.digest}",
                    cure="treat the history as tampered with: this platform writes no such route",
                )
            yield entry.digest, route
            successor = route

    def _apply(self, environment: Environment) -> None:
        # What is recorded is read under the lock: of two changes at once, the one
        # that applies last has seen both.
        with self._gateway.exclusive():
            self._gateway.apply(environment, self.all(environment))

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


def _read(entry: Entry) -> Route:
    try:
        route = Route.model_validate(entry.statement.predicate)
    except ValidationError as error:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log is not a route",
            expected="a route as this platform writes it",
            found=error,
            cure="read it with the version of the platform that wrote it",
        ) from error
    if route_chain(route.environment, route.model) not in entry.leaf.links:
        raise EvidenceError(
            f"Entry {entry.sequence} of the evidence log is on the chain of another route",
            expected=route_chain(route.environment, route.model),
            found=", ".join(entry.leaf.links),
            cure="treat the history as tampered with: this platform writes no such entry",
        )
    return route
