"""The asset `audit_record`: what the UI shows of it, and a link that a browser can open."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import dagster as dg
import pytest
from dagster import DagsterInstance

from llmops_assets.develop.registry import KeepsPages, MLflowRegistry
from llmops_assets.errors import RegistryError
from llmops_assets.reports.publication import PAGE_FILE, AuditReport

from ..fakes import FakeRegistry
from ..release_rig import Rig
from ..test_reporting import Runs, failures
from .audited import record_steps

RELEASE = "parrot.v1"
PAGE = "http://registry.invalid/parrot/audit.html"


class PagesRegistry(FakeRegistry):
    """A registry that keeps pages as well, if it does not fail."""

    def __init__(self, keep: Callable[[], str | None]) -> None:
        super().__init__()
        self.pages: list[tuple[str, str, str, str]] = []
        self._keep = keep

    def log_page(self, model: str, release: str, name: str, html: str) -> str | None:
        self.pages.append((model, release, name, html))
        return self._keep()


@pytest.fixture
def runs(rig: Rig) -> Iterator[Runs]:
    record_steps(rig, RELEASE)
    with DagsterInstance.ephemeral() as instance:
        yield Runs(rig, instance)


def shown(runs: Runs) -> dict[str, dg.MetadataValue]:
    """Metadata of the audit's materialization."""
    result = runs.job("audit", RELEASE)
    assert result.success, failures(result)
    (event,) = result.get_asset_materialization_events()
    return dict(event.materialization.metadata)


def test_page_is_linked_where_the_registry_keeps_it(runs: Runs) -> None:
    """People in the UI click; a path on another machine helps nobody."""
    registry = PagesRegistry(lambda: PAGE)
    vars(runs.rig.platform)["registry"] = registry
    metadata = shown(runs)
    assert metadata["page"] == dg.MetadataValue.url(PAGE)
    ((model, release, name, html),) = registry.pages
    assert (model, release, name) == ("parrot", RELEASE, "audit/audit.html")
    assert html.startswith("<!DOCTYPE html>")
    assert metadata["evidence_holds"].value is True
    assert "was asked for by ada" in str(metadata["summary"].value)


def down() -> str | None:
    raise RegistryError("MLflow is down", cure="start it")


@pytest.mark.parametrize("keep", [down, lambda: None])
def test_page_is_a_path_where_no_registry_keeps_it(
    runs: Runs, keep: Callable[[], str | None]
) -> None:
    """An audit must not wait for MLflow to come back."""
    vars(runs.rig.platform)["registry"] = PagesRegistry(keep)
    page = shown(runs)["page"]
    assert isinstance(page, dg.PathMetadataValue)
    assert str(page.path).endswith(PAGE_FILE)


def test_gaps_are_counted_and_named(runs: Runs) -> None:
    """The number is what people sort by, the list what they act on."""
    metadata = shown(runs)
    result = runs.rig.platform.columns.get(RELEASE, "audit_record")
    report = AuditReport.model_validate(result.facts)
    assert metadata["gaps"].value == len(report.gaps) > 0
    assert "**Gaps**" in report.markdown


def test_mlflow_keeps_the_page_with_the_releases_run(mlflow_url: str) -> None:
    """A release that was never trained or registered has no run, and gets none for this."""
    from mlflow.tracking import MlflowClient

    registry = MLflowRegistry(mlflow_url, timeout_seconds=30)
    assert isinstance(registry, KeepsPages)
    assert registry.log_page("budgie", "budgie.v1", "audit/audit.html", "<p>") is None
    registry.log_evaluation("budgie", "budgie.v1", {"exact_match": 1.0})
    assert registry.log_page("budgie", "budgie.v2", "audit/audit.html", "<p>") is None
    url = registry.log_page("budgie", "budgie.v1", "audit/audit.html", "<p>page")
    assert url is not None
    address, _, run = url.partition("/runs/")
    assert address.startswith(f"{mlflow_url}/#/experiments/")
    run, _, path = run.partition("/artifactPath/")
    client = MlflowClient(tracking_uri=mlflow_url)
    assert [file.path for file in client.list_artifacts(run, "audit")] == [path]
