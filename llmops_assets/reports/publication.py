"""The audit record as an artifact: for machines, for a browser, and for a regulator."""

from __future__ import annotations

import logging
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from llmops_assets.develop.registry import KeepsPages
from llmops_assets.errors import RegistryError, StackError
from llmops_assets.platform import Platform
from llmops_assets.reports.annex_iv import annex_iv
from llmops_assets.reports.audit_page import html
from llmops_assets.reports.audit_record import AuditRecord
from llmops_assets.reports.markdown import plain

MEDIA_TYPE = "application/vnd.llmops.audit.v2"
AUDIT_FILE = "audit.json"
PAGE_FILE = "audit.html"
ANNEX_FILE = "annex-iv.md"

logger = logging.getLogger(__name__)


class AuditReport(BaseModel):
    """Document of `audit_record`: what the record beside it comes to."""

    model_config = ConfigDict(frozen=True)

    release: str
    made: datetime | None
    summary: str
    evidence_holds: bool
    gaps: tuple[str, ...] = Field(description="In a sentence each.")
    log_size: int | None = Field(description="Entries of the evidence log that it rests on.")
    log_root: str | None = Field(description="Base64.")

    @property
    def markdown(self) -> str:
        """Summary and gaps, for the metadata of an asset."""
        gaps = "".join(f"\n- {plain(gap)}" for gap in self.gaps)
        return plain(self.summary) + (f"\n\n**Gaps**\n{gaps}" if gaps else "")


def published(record: AuditRecord) -> tuple[AuditReport, dict[str, str]]:
    """The document, and the texts of the files beside it, by name."""
    report = AuditReport(
        release=record.identity.release,
        made=record.made,
        summary=record.summary,
        evidence_holds=record.integrity.holds,
        gaps=tuple(f"{gap.severity.value}: {gap.what}" for gap in record.gaps),
        log_size=record.integrity.log_size,
        log_root=record.integrity.root,
    )
    return report, {
        AUDIT_FILE: record.model_dump_json(indent=2) + "\n",
        PAGE_FILE: html(record),
        ANNEX_FILE: annex_iv(record).markdown(),
    }


def link(platform: Platform, record: AuditRecord, page: str) -> str | None:
    """Where a browser finds the page: kept with the release's run in the model registry.

    Returns:
        None if the release has no run there, or the registry keeps no pages or is down, as an
        audit must not wait for it; that is logged.
    """
    try:
        registry = platform.registry
        if not isinstance(registry, KeepsPages):
            return None
        identity = record.identity
        return registry.log_page(identity.model, identity.release, f"audit/{PAGE_FILE}", page)
    except (RegistryError, StackError) as error:
        logger.warning("the audit page is in the store only: %s", error)
        return None
