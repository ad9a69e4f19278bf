"""Which spec a release freezes: a file, a commit, or what another release froze."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from llmops_assets.develop import branch, specs
from llmops_assets.develop.specs import SOURCE_FILE, SpecSource
from llmops_assets.errors import ReleaseError
from llmops_assets.platform import Platform
from llmops_assets.release import Release
from llmops_assets.settings import Settings
from llmops_assets.spec import MLflowWeights, ModelSpec
from llmops_assets.storage.artifacts import ArtifactHandle
from llmops_assets.storage.columns import Result


def spec_to_freeze(
    platform: Platform, release: Release, commit: str | None, spec_of: str | None
) -> tuple[ModelSpec, SpecSource]:
    """The spec for a new release, and where it comes from.

    A release of a version in the registry has that version's weights, whatever the spec
    says of weights.

    Args:
        platform: with the settings and the releases.
        release: that will freeze it.
        commit: a git revision; None for the commit that the release is named after, or the
            file as it is now.
        spec_of: a release whose frozen spec is taken in place of both; None for none.

    Raises:
        SpecError: it is missing or not valid.
        ReleaseError: `spec_of` is of another model, or a commit is given as well.
        LifecycleOrderError: `spec_of` has frozen none.
    """
    if spec_of is not None:
        if commit is not None or Release.parse(spec_of).model != release.model:
            raise ReleaseError(
                f"Release {release} cannot take the spec of {spec_of}",
                expected=f"a release of {release.model}, and no commit beside it",
                found=f"spec_of {spec_of}, commit {commit}",
                cure="give model_spec's config one of the two, of this model",
            )
        source = frozen_source(platform, spec_of)
        return platform.spec(spec_of), source.model_copy(update={"spec_of": spec_of})
    spec, source = specs.load(platform.settings, release.model, commit or release.commit)
    if (version := release.registered_version) is not None:
        # Of the registered model with the spec's name, whatever model the spec names itself.
        registered = MLflowWeights(source="mlflow", version=version)
        spec = spec.model_copy(update={"weights": registered})
    return spec, source


def frozen_source(platform: Platform, release: str) -> SpecSource:
    """Where the spec came from that a release froze.

    Raises:
        LifecycleOrderError: it has frozen none yet.
    """
    frozen = ArtifactHandle(platform.columns.get(release, "model_spec"), platform.store)
    return SpecSource.model_validate_json((frozen.path / SOURCE_FILE).read_bytes())


def taken_over(platform: Platform, release: str, asset: str) -> Result | None:
    """What a release takes over with the spec of another: it learns nothing of its own.

    With other tools the same data and weights would have other actions, and what serves
    would be built again from something else.

    Returns:
        What the other release published, published as this one's; None for a release with
        a spec of its own, or where the other published none.

    Raises:
        LifecycleOrderError: this release has frozen no spec, or published other bytes.
    """
    source = frozen_source(platform, release)
    if source.spec_of is None:
        return None
    earlier = platform.columns.published(source.spec_of, asset)
    if earlier is None:
        return None
    now = datetime.now(UTC)
    result = earlier.model_copy(
        update={
            "release": release,
            "started": now,
            "finished": now,
            "reused_from": earlier.reused_from or earlier.release,
        }
    )
    platform.columns.publish(result)
    return result


def repository_of(settings: Settings, source: SpecSource) -> Path:
    """Folder that tasks, code and data of a spec are relative to, see `Platform.repository`.

    Raises:
        SpecError: its commit is in no repository any more.
        TriggerError: it is not here, and LLMOPS_GIT_REPOSITORY does not answer.
    """
    if not source.pinned or source.commit is None:
        return settings.models.parent
    # As models/<name>.yaml counts from the folder that holds models/, wherever that is.
    return branch.tree(settings, source.commit) / Path(source.file).parent.parent
