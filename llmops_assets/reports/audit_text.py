"""The audit record as one page of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from textwrap import wrap

from llmops_assets.evidence.statistics import Decision
from llmops_assets.reports.audit_record import AuditRecord, GateVerdict, Severity
from llmops_assets.reports.printable import printable
from llmops_assets.reports.wording import duration, moment, number, short, title

WIDTH = 100
LABEL = 16
MOST_LINES = 80
"""Of a page; what is cut is said, and is in the other forms."""
FEWEST_OF_A_LIST = 3

Paint = Callable[[str], str]
BOLD, RED, YELLOW, GREEN = "1", "31", "33", "32"


def page(record: AuditRecord, colour: bool = False) -> list[str]:
    """The lines of the page, at most `MOST_LINES`.

    Args:
        colour: whether to use ANSI colours.
    """
    # Long lists give way until it fits; the sections themselves never do.
    for most in (12, 8, 6, 4, FEWEST_OF_A_LIST):
        lines = list(_page(record, _Painter(colour), most))
        if len(lines) <= MOST_LINES:
            break
    return lines


class _Painter:
    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _page(record: AuditRecord, paint: _Painter, most: int) -> Iterator[str]:
    identity, integrity = record.identity, record.integrity
    yield paint(BOLD, printable(f"Audit of release {identity.release}: {identity.position}"))
    if record.as_of is not None:
        yield f"as of {moment(record.as_of)}; nothing later was looked at"
    yield from wrap(printable(record.summary), WIDTH)
    if not integrity.holds:
        yield ""
        yield paint(RED, "THE EVIDENCE DOES NOT HOLD")
        for problem in _cut(integrity.problems, most):
            yield from wrap(
                printable(problem), WIDTH, initial_indent="  ! ", subsequent_indent="    "
            )
    if record.gaps:
        yield ""
        yield paint(YELLOW, f"Gaps ({len(record.gaps)})")
        shown = [f"{gap.severity.value}: {gap.what}" for gap in record.gaps]
        for text, gap in zip(_cut(shown, most), [*record.gaps, None], strict=False):
            colour = RED if gap is not None and gap.severity is Severity.MISSING else YELLOW
            for line in wrap(
                printable(text), WIDTH, initial_indent="  - ", subsequent_indent="    "
            ):
                yield paint(colour, line)
    for name, rows in _sections(record, paint, most):
        yield from _section(paint(BOLD, name), rows)


def _sections(
    record: AuditRecord, paint: _Painter, most: int
) -> Iterator[tuple[str, Iterable[tuple[str, str]]]]:
    yield "Identity", _identity(record)
    yield "Inputs", [
        (given.name, "; ".join(filter(None, [short(given.digest), given.license, given.provenance,
                                             given.uri])))
        for given in record.inputs
    ]  # fmt: skip
    yield "Build", _build(record)
    yield f"Gates ({len(record.counting)})", _gates(record, paint, most)
    yield (
        "Approvals",
        [
            (a.approver, f"{a.decision} ({a.known_by}) {moment(a.time)}: {a.reason}")
            for a in record.approvals
        ],
    )
    yield "Deployments", _deployments(record, most)
    yield "Operation", _operation(record, most)
    yield "Retirement", _retirement(record)
    yield "Integrity", _integrity(record, paint)


def _section(name: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    found = list(rows)
    yield name if found else f"{name}: nothing on record"
    for label, text in found:
        line = printable(text) if "\x1b[" not in text else text
        yield f"  {printable(label)[: LABEL - 1]:<{LABEL}}{_clip(line)}"


def _identity(record: AuditRecord) -> Iterator[tuple[str, str]]:
    identity = record.identity
    state = "" if identity.commit_holds else ", NOT as in the commit"
    yield "asked for by", f"{identity.requested_by or '-'}, {moment(identity.requested)}"
    yield "spec", f"{identity.spec_file or '-'} at {short(identity.commit)}{state}"
    yield "package", identity.package or "-"


def _build(record: AuditRecord) -> Iterator[tuple[str, str]]:
    build = record.build
    yield (
        "toolchain",
        f"{build.toolchain or '-'}; "
        + ", ".join(
            f"{name} {value}" for name, value in (*build.hardware.items(), *build.images.items())
        ),
    )
    if build.flags:
        yield "engine flags", ", ".join(f"{name}={value}" for name, value in build.flags.items())
    yield "made here", _names(step.asset for step in build.steps if step.reused_from is None)
    origins = dict.fromkeys(step.reused_from for step in build.steps if step.reused_from)
    for origin in origins:
        yield (
            "reused",
            _names(s.asset for s in build.steps if s.reused_from == origin) + (f" from {origin}"),
        )


def _gates(record: AuditRecord, paint: _Painter, most: int) -> Iterator[tuple[str, str]]:
    plain: list[str] = []
    for name, found in record.counting.items():
        measured = found.verdict.findings and most > FEWEST_OF_A_LIST
        if found.verdict.decision is Decision.PASSED and not measured:
            plain.append(name)
        else:
            yield name, _verdict(found, paint)
    if plain:
        text = ", ".join(plain)
        first, *others = wrap(text, WIDTH - LABEL - 2)
        yield "passed", first
        yield from (("", line) for line in others)
    tries = len(record.gates) - len(record.counting)
    if tries:
        yield "earlier", f"{tries} verdicts that do not count any more, see --json"


def _verdict(found: GateVerdict, paint: _Painter) -> str:
    verdict = found.verdict
    word = "waived" if found.waived is not None else verdict.decision.value
    colour = {"passed": GREEN, "waived": YELLOW}.get(word, RED)
    measured = "; ".join(
        f"{f.metric}{f' of {f.slice}' if f.slice else ''} {number(f.value)}, expected {f.threshold}"
        for f in verdict.findings[:2]
    )
    return f"{paint(colour, word)}  {printable(_clip(measured or verdict.reason))}"


def _deployments(record: AuditRecord, most: int) -> Iterator[tuple[str, str]]:
    end = record.seen_until
    rows: list[tuple[str, str]] = []
    for admission in record.deployments.admissions:
        word = "admitted" if admission.passed else "refused"
        rows.append((word, f"to {admission.environment}, {moment(admission.time)}, on "
                     f"{admission.rests_on} statements"))  # fmt: skip
    for change in record.deployments.routes:
        after = ", ".join(f"{s.release} {s.weight} %" for s in change.after) or "nothing"
        text = f"{change.environment} {moment(change.time)} -> {after}; {change.actor}: "
        rows.append((f"route {change.generation}", text + change.reason))
    yield from _last(rows, most)
    for period in record.deployments.served:
        length = duration((period.until or end or period.since) - period.since)
        yield (
            "served",
            f"{period.environment} {period.weight} %, {moment(period.since)} to "
            + (f"{moment(period.until) if period.until else 'now'}: {length}"),
        )


def _operation(record: AuditRecord, most: int) -> Iterator[tuple[str, str]]:
    for reading in record.operation.metrics[-1:]:
        latency = reading.document.get("latency_seconds") or {}
        yield (
            "newest metrics",
            f"{moment(reading.time)}: "
            + ", ".join(
                f"{name} {number(value)}"
                for name, value in {
                    "requests": reading.document.get("requests"),
                    "failures": reading.document.get("failures"),
                    "p99 s": latency.get("p99"),
                }.items()
            )
            + f" ({len(record.operation.metrics)} readings)",
        )
    rows = [
        ("incident", f"{moment(i.detected)} {i.what} -> {i.action or 'NOT ANSWERED'}")
        for i in record.operation.incidents
    ]
    yield from _last(rows, most)


def _retirement(record: AuditRecord) -> Iterator[tuple[str, str]]:
    retired = record.retirement
    restored = "" if retired.restored is None else f", restore {retired.restored.value}"
    for name, time, text in (
        ("deprecated", retired.deprecated, ""),
        ("archived", retired.archived, f", {retired.archive_file} {short(retired.archive_digest)}, "
         f"kept until {moment(retired.keep_until)}{restored}"),
        ("removed", retired.removed, ""),
    ):  # fmt: skip
        if time is not None:
            yield name, f"{moment(time)}{text}"


def _integrity(record: AuditRecord, paint: _Painter) -> Iterator[tuple[str, str]]:
    integrity = record.integrity
    holds = paint(GREEN, "holds") if integrity.holds else paint(RED, "DOES NOT HOLD")
    yield "evidence", f"{holds}; {integrity.statements} statements verified, {integrity.chain}"
    yield (
        "log",
        f"{integrity.log_size} entries at {moment(integrity.checkpoint_time)}, root "
        + (integrity.root or "-"),
    )
    yield "trust root", integrity.trust_root or "-"


def _names(assets: Iterable[str]) -> str:
    return ", ".join(title(asset).lower() for asset in assets) or "nothing"


def _cut(texts: Sequence[str], most: int) -> list[str]:
    more = len(texts) - most
    return [*texts[:most], f"... and {more} more, see --json or --html"] if more > 0 else [*texts]


def _last(rows: Sequence[tuple[str, str]], most: int) -> Iterator[tuple[str, str]]:
    if len(rows) > most:
        yield "earlier", f"{len(rows) - most} more, see --json or --html"
    yield from rows[-most:]


def _clip(text: str) -> str:
    most = WIDTH - LABEL - 2
    return text if len(text) <= most or "\x1b[" in text else text[: most - 3] + "..."
