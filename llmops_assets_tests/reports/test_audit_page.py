"""The page for a browser: hostile words stay words, nothing is fetched, everything can be read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from llmops_assets.deploy.approval import record_approval
from llmops_assets.evidence.gates import FITS_TARGET
from llmops_assets.reports.audit import audit
from llmops_assets.reports.audit_page import html
from llmops_assets.reports.audit_record import AuditRecord
from llmops_assets.reports.lineage_drawing import ARROWS, PLACES, Mark, draw
from llmops_assets.reports.timeline import timeline

from ..release_rig import FAILED, Rig
from .audited import AUDITED_SPEC, record_steps
from .conftest import FIRST, SECOND

HOSTILE = "</script></title><img src=x onerror=alert(1)> \"'><svg/onload=alert(2)>{{7*7}}&lt;"
VOID = {"meta", "br", "img", "link", "input", "hr"}
FETCHING = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "background"}
NEVER = {"script", "iframe", "object", "embed", "img", "link", "base", "form", "foreignobject"}


class Page(HTMLParser):
    """What a browser would make of the page, strictly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def record(audited: Rig) -> AuditRecord:
    return audit(audited.platform, FIRST)


@pytest.fixture(scope="module")
def page(record: AuditRecord) -> Page:
    return Page(html(record))


def test_hostile_words_stay_words(rig: Rig) -> None:
    """Specs, reasons and approvers are written by those whom the page is about."""
    text = AUDITED_SPEC.replace(
        "Typed by a person for the tests of this platform.", '"' + HOSTILE.replace('"', '\\"') + '"'
    ).replace("use_case: Repeats", "use_case: <b>bold</b> Repeats")
    record_steps(rig, FIRST, text)
    package = rig.platform.columns.get(FIRST, "packaged_model").artifact
    record_approval(rig.platform, FIRST, HOSTILE, "reject", HOSTILE, package)
    rig.judge(FIRST, [FITS_TARGET], FAILED.model_copy(update={"reason": HOSTILE}))
    found = Page(html(audit(rig.platform, FIRST)))
    assert found.open == []
    assert not {tag for tag, _ in found.tags} & NEVER
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    # Summary, time line, approval twice, verdict twice, inputs twice, model spec.
    assert found.text.count(HOSTILE) >= 8
    assert "<b>bold</b> Repeats" in found.text


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    """It is opened years later, offline, by somebody who must not be tracked."""
    assert not {tag for tag, _ in page.tags} & NEVER
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            if name in FETCHING:
                assert (value or "").startswith("#"), (tag, name, value)
            assert "url(" not in (value or "") or value == "url(#tip)"
    source = html_source(page)
    assert not re.search(r"@import|url\((?!#)", source)


def html_source(page: Page) -> str:
    return page.rawdata + page.text


def test_policy_forbids_all_that_it_does_not_need(page: Page) -> None:
    """Should something hostile get in all the same, the browser refuses it."""
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_it_is_built_for_all_readers(page: Page) -> None:
    """Screen readers need language, headings in order, and tables with headers."""
    tags = [tag for tag, _ in page.tags]
    assert page.open == []
    assert page.tags[0] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert tags.count("main") == 1
    drawn = next(attrs for tag, attrs in page.tags if tag == "svg")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert drawn["role"] == "img"
    assert set((drawn["aria-labelledby"] or "").split()) <= ids
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert {(link or "").removeprefix("#") for link in links} <= ids


def test_contrast_is_enough_in_both_schemes(record: AuditRecord) -> None:
    """WCAG 2.1 asks for 4.5 to 1 of text this small."""
    css = html(record)
    light, dark, *_ = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        pairs = [("ink", "page"), ("soft", "page"), ("link", "page"), ("soft", "panel")]
        pairs += [(name, f"{name}-fill") for name in ("good", "warn", "bad")]
        pairs += [("ink", f"{name}-fill") for name in ("good", "warn", "bad")]
        for text, ground in pairs:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_plain_words_come_first(page: Page, record: AuditRecord) -> None:
    """An auditor who knows nothing of the tools reads one paragraph and the open points."""
    text = " ".join(page.text.split())
    assert record.summary in text
    for words in (
        "Release parrot.v1, version 1 of the model, was asked for by ada",
        "trained from nothing on 40,000 rows of training data",
        "approved by bob",
        "It served in production from",
        "found to restore byte for byte",
    ):
        assert words in record.summary
    assert text.index(record.summary) < text.index("What the evidence does not show")
    assert text.index("What the evidence does not show") < text.index("Lineage From left")


def test_drawing_shows_the_way_from_data_to_archive(audited: Rig, record: AuditRecord) -> None:
    """One picture of the whole chain, with the digests that were signed."""
    drawing = draw(record)
    boxes = {box.asset: box for box in drawing.boxes}
    assert {box.mark for box in drawing.boxes} == {Mark.OK}
    package = record.identity.package
    assert package is not None
    for asset in ("packaged_model", "staging_deployment", "production_deployment"):
        assert boxes[asset].digest == package.removeprefix("sha256:")[:12]
    recorded = {pair for pair, arrow in zip(ARROWS, drawing.arrows, strict=True) if arrow.recorded}
    assert {("training_data", "checkpoint"), ("engine", "packaged_model")} <= recorded
    # The rig's validation names no inputs, so this order is not proven.
    assert ("engine", "engine_validation") not in recorded
    second = {box.asset: box.mark for box in draw(audit(audited.platform, SECOND)).boxes}
    assert second["archive"] is Mark.ABSENT


def test_boxes_are_inside_and_do_not_overlap(record: AuditRecord) -> None:
    """It is read at 1280 pixels and on paper."""
    drawing = draw(record)
    assert drawing.width <= 1280
    places = {(box.x, box.y) for box in drawing.boxes}
    assert len(places) == len(PLACES)
    assert max(box.x for box in drawing.boxes) + drawing.box_width <= drawing.width
    assert max(box.y for box in drawing.boxes) + drawing.box_height <= drawing.height


def test_time_line_is_in_order(record: AuditRecord) -> None:
    """What came first decides many a question."""
    moments = timeline(record)
    assert [m.time for m in moments] == sorted(m.time for m in moments)
    words = [moment.what for moment in moments]
    assert words[0] == "ada asked for it."
    assert words[-1] == "Removed from the servers."
    decided = [what for what in words if what.startswith("bob approved it")]
    assert decided
    assert all(what.startswith("bob approved it (claimed): ") for what in decided)
