"""Which serving releases would be built with other tools today.

What counts are pins: versions of the toolkit and its packages, the serving image or Triton
that serves, and the architecture. Our own sources (`llmops_assets` among a toolchain's
versions) do not: they decide what the next release is built with, but a mended comment
must not put every model before its approvers. A release is asked for by hand where a mended
line matters: `llmops release MODEL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llmops_assets.errors import LifecycleOrderError, SpecError, ToolchainError
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.serving.slots import Environment
from llmops_assets.serving.triton import DISTRIBUTION
from llmops_assets.spec import Engine
from llmops_assets.storage.store import canonical_json, digest_of
from llmops_assets.toolchains import toolchain_for
from llmops_assets.toolchains.base import Step
from llmops_assets.versions import versions_of

OWN_SOURCES = "llmops_assets"
"""What a toolchain calls the version of our own sources."""
BUILT: tuple[Step, ...] = ("converted_weights", "engine", "packaged_model")
"""Steps whose results serve."""
Pins = Mapping[str, str]
"""Versions by name, without those of our own sources."""
CHARACTERS_SHOWN = 19


@dataclass(frozen=True)
class Bump:
    """A serving release that would be built with other tools today."""

    serving: str
    """Its key."""
    built_with: Pins
    """Of the first of its steps that differs."""
    here: Pins
    """Of the same step, now."""

    @property
    def release(self) -> Release:
        """The release that shall take its place.

        Named after what serves as well as the tools: these may come to the model again,
        once it serves with another spec.
        """
        event = {"serving": self.serving, "toolchain": dict(self.here)}
        return Release.bumped(Release.parse(self.serving).model, digest_of(canonical_json(event)))

    @property
    def event(self) -> str:
        """What happened, for people."""
        changes = (
            f"{name} {_shown(self.built_with, name)} -> {_shown(self.here, name)}"
            for name in sorted(self.built_with.keys() | self.here.keys())
            if self.built_with.get(name) != self.here.get(name)
        )
        return "toolchain " + ", ".join(changes)


@dataclass(frozen=True)
class Survey:
    """What production serves, held against the tools that are here."""

    bumps: tuple[Bump, ...]
    """Sorted by model."""
    problems: tuple[str, ...]
    """Why a model could not be looked at; each once."""


def survey(platform: Platform) -> Survey:
    """Compares what every model serves in production with what would be built now.

    A model whose toolchain is not installed here does not keep the others from being
    looked at.

    Raises:
        StoreError: the store lacks something of a serving release.
    """
    bumps: list[Bump] = []
    problems: dict[str, None] = {}
    here: dict[Engine, dict[Step, Pins] | str] = {}
    for _, route in sorted(platform.routes.all(Environment.PRODUCTION).items()):
        if route.serving is None:
            continue
        serving = route.serving.release
        try:
            engine, built = _built(platform, serving)
        except (LifecycleOrderError, SpecError) as error:
            problems[str(error)] = None
            continue
        if engine not in here:
            here[engine] = _here(platform, engine)
        steps = here[engine]
        if isinstance(steps, str):
            problems[steps] = None
            continue
        others: list[Step] = [
            step for step in BUILT if step in steps and built[step] != steps[step]
        ]
        if others:
            bumps.append(Bump(serving, built[others[0]], steps[others[0]]))
    return Survey(tuple(bumps), tuple(problems))


def _here(platform: Platform, engine: Engine) -> dict[Step, Pins] | str:
    """What each step would be made and served with now; why not, if none can be made.

    Of a toolchain that needs a GPU, only packaging tells its image where there is none;
    and the image decides all of it.
    """
    found: dict[Step, Pins] = {}
    problem = ""
    toolchain = toolchain_for(engine, platform.settings)
    # A serving image is among the versions of the toolchain that needs one.
    triton = versions_of(DISTRIBUTION) if toolchain.serving_image is None else {}
    for step in BUILT:
        try:
            found[step] = _pins(toolchain.versions(step)) | triton
        except ToolchainError as error:
            problem = str(error)
    return found or problem


# What a release has published never changes.
@lru_cache(maxsize=10_000)
def _built(platform: Platform, release: str) -> tuple[Engine, Mapping[Step, Pins]]:
    """A release's engine section, and what each step was made and judged with.

    Raises:
        LifecycleOrderError: it has no such step.
        SpecError: another version of the platform froze its spec.
    """
    engine = platform.spec(release).engine
    report = platform.columns.find(release, "compliance_report")
    judged = {} if report is None else report.versions
    triton = {name: version for name, version in judged.items() if name == DISTRIBUTION}
    return engine, {
        step: _pins(platform.columns.get(release, step).versions) | triton for step in BUILT
    }


def _pins(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name != OWN_SOURCES}


def _shown(pins: Pins, name: str) -> str:
    return pins.get(name, "none")[:CHARACTERS_SHOWN]
