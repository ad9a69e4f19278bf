"""Which registered versions become releases: those that somebody registered from now on.

What was handled is a number per model, as numbers only grow and clocks may jump.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llmops_assets.develop.registry import ListedVersion, ModelRegistry, Readiness
from llmops_assets.settings import Settings


class Mark(BaseModel):
    """How far a model's versions were handled."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    highest: int = 0
    waiting: tuple[int, ...] = ()
    """Versions up to `highest` whose files were not all in the registry yet."""


class Watch(BaseModel):
    """The marks of all watched models; a record in the store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Mark] = {}


@dataclass(frozen=True)
class News:
    """What one look at the registry found.

    `versions` are to become releases; `watch` holds them as handled. Unless `complete`,
    there are more of them, and the next look finds those.
    """

    versions: tuple[ListedVersion, ...]
    watch: Watch
    complete: bool


def begin(registry: ModelRegistry, watch: Watch, models: Collection[str]) -> Watch:
    """The watch, with models that it did not have: their versions so far count as handled.

    Raises:
        RegistryError: the registry does not answer.
    """
    added = set(models) - watch.models.keys()
    if not added:
        return watch
    newest = registry.newest(added)
    begun = {model: Mark(highest=newest.get(model, 0)) for model in sorted(added)}
    return Watch(models={**watch.models, **begun})


def look(
    registry: ModelRegistry,
    watch: Watch,
    models: Collection[str],
    released: Callable[[ListedVersion], bool],
    at_most: int,
) -> News:
    """Versions that were registered since, by model and number.

    Args:
        registry: is asked once for all models, and once for each version that is waited for.
        watch: what was handled.
        models: those with a valid spec; versions of the others wait until they have one.
        released: whether somebody already asked for the version's release.
        at_most: the number of versions to return.

    Raises:
        RegistryError: the registry does not answer.
    """
    marks = dict(watch.models)
    watched = sorted(set(models) & marks.keys())
    # Read before any mark changes, so that the order of the answers means nothing.
    found = [
        *_arrived(registry, {model: marks[model] for model in watched}),
        *registry.registered_since({model: marks[model].highest for model in watched}),
    ]
    versions: list[ListedVersion] = []
    present = {(version.model, version.version) for version in found}
    for model in watched:
        # One that was deleted while it was waited for never comes.
        waiting = tuple(n for n in marks[model].waiting if (model, n) in present)
        marks[model] = Mark(highest=marks[model].highest, waiting=waiting)
    for version in sorted(found, key=lambda version: (version.model, version.version)):
        wanted = version.release is None and version.readiness == Readiness.READY
        if wanted and not released(version):
            if len(versions) == at_most:
                return News(tuple(versions), Watch(models=marks), complete=False)
            versions.append(version)
        marks[version.model] = _handled(marks[version.model], version)
    return News(tuple(versions), Watch(models=marks), complete=True)


def wake_file(settings: Settings) -> Path:
    """The file that a webhook changes so that the registry is asked at once."""
    return settings.state / "triggers" / "registry.wake"


def read_wake(settings: Settings) -> str | None:
    """What the last webhook left; None when there was none."""
    try:
        return wake_file(settings).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def _arrived(registry: ModelRegistry, marks: Mapping[str, Mark]) -> list[ListedVersion]:
    """The versions that are waited for, as they are now."""
    found = (
        registry.listed(model, number) for model, mark in marks.items() for number in mark.waiting
    )
    return [version for version in found if version is not None]


def _handled(mark: Mark, version: ListedVersion) -> Mark:
    waiting = set(mark.waiting) - {version.version}
    if version.readiness == Readiness.PENDING and version.release is None:
        waiting.add(version.version)
    return Mark(highest=max(mark.highest, version.version), waiting=tuple(sorted(waiting)))
