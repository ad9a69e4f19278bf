"""What a candidate is compared with: the serving release, evaluated on the candidate's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmops_assets.develop.harness_tasks import task_digests
from llmops_assets.serving.routes import Routes
from llmops_assets.serving.slots import Environment
from llmops_assets.spec import ModelSpec
from llmops_assets.storage.columns import Action, Columns
from llmops_assets.versions import versions_of


@dataclass(frozen=True)
class Baseline:
    """The release that serves in production."""

    release: str
    package: str
    """Digest of the package that serves; a verdict that compares with it names it."""
    checkpoint: str
    """Digest of its checkpoint."""


def serving_baseline(routes: Routes, columns: Columns, model: str) -> Baseline | None:
    """The release that production's route gives the traffic to; None if nothing serves.

    Raises:
        LifecycleOrderError: it has published no checkpoint.
    """
    route, _ = routes.current(Environment.PRODUCTION, model)
    serving = None if route is None else route.serving
    if serving is None:
        return None
    checkpoint = columns.get(serving.release, "checkpoint").artifact
    return Baseline(serving.release, serving.package, checkpoint)


def evaluation_action(
    spec: ModelSpec, repository: Path, checkpoint: str, evaluation_data: str
) -> Action:
    """The evaluation of a checkpoint on data, both named by their digests.

    Args:
        repository: where the files of the spec's tasks are.

    Raises:
        SpecError: a task of the spec cannot be read.
    """
    return Action(
        asset="evaluation",
        media_type="application/vnd.llmops.evaluation.v2",
        inputs={"checkpoint": checkpoint, "evaluation_data": evaluation_data},
        parameters={
            "max_tokens": spec.constraints.max_output_tokens,
            "harness": task_digests(spec.harness, repository),
        },
        versions={"evaluate": "2", **versions_of("torch", "transformers", "tokenizers")},
    )
