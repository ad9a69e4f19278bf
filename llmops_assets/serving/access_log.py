"""The gateway's access log: one JSON object a line for each call, when the call has ended.

It says which version in which slot answered, under which generation of the route, with
which result and how fast. It holds no header of the client, no query and no body, so no
prompt and no credentials. Times are whole milliseconds, rounded down.

What it cannot tell: an error inside a stream's 200. To Envoy such an answer is bytes like
any other; only a stream that breaks off is seen, by its flags. The model knows better:
Triton's `nv_inference_request_failure` (see `metrics`) counts it, and whoever reads the
stream sees it. A call that still runs is in the log only after its end.

The files are `access.log`, which Envoy writes, and `access.log.<number>`, the older ones;
numbers only grow. `rotate` keeps a bounded number of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from llmops_assets.errors import GatewayError

METADATA = "llmops"
"""Name of our metadata on routes and clusters, which the log reads."""

LONGEST_PATH = 256

FORMAT: Mapping[str, str] = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "model": f"%METADATA(ROUTE:{METADATA}:model)%",
    "generation": f"%METADATA(ROUTE:{METADATA}:generation)%",
    "call": f"%METADATA(ROUTE:{METADATA}:call)%",
    "pinned": f"%METADATA(ROUTE:{METADATA}:pinned)%",
    "release": f"%METADATA(CLUSTER:{METADATA}:release)%",
    "version": f"%METADATA(CLUSTER:{METADATA}:version)%",
    "colour": f"%METADATA(CLUSTER:{METADATA}:colour)%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "upstream": "%UPSTREAM_HOST%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "protocol": "%PROTOCOL%",
    "method": "%REQ(:METHOD)%",
    # Without the query, in which a client may have put its prompt.
    "path": f"%PATH(NQ):{LONGEST_PATH}%",
    "status": "%RESPONSE_CODE%",
    "grpc_status": "%GRPC_STATUS_NUMBER%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "upstream_first_byte_ms": "%COMMON_DURATION(DS_RX_BEG:US_RX_BEG:ms)%",
    "first_byte_ms": "%COMMON_DURATION(DS_RX_BEG:DS_TX_BEG:ms)%",
    "duration_ms": "%DURATION%",
}
"""Envoy's command operator of each field
(https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/advanced/substitution_formatter)."""

QUESTIONS = "/questions"
NO_FLAGS = "-"
OVERFLOW = "UO"
CLIENT_GONE = frozenset({"DC", "DR", "DPE"})
"""Flags for a client that left, reset its stream or broke the protocol: not the model's fault."""
FAILED_GRPC = frozenset({2, 4, 12, 13, 14, 15})
"""Statuses of gRPC that are a server's failure, by OpenTelemetry's conventions for servers:
UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS."""


class Call(BaseModel):
    """One line. What does not apply is None, such as the slot of a call that was refused."""

    model_config = ConfigDict(frozen=True)

    time: AwareDatetime
    """Of the request's first byte."""
    request_id: str | None
    """Also in the answer's header `x-request-id`."""
    environment: str
    model: str | None
    generation: int | None
    call: str | None
    """Such as `generate_stream` or `ModelInfer`; None for what does not pass."""
    pinned: bool | None
    """Whether the client chose the version, rather than the route's weights."""
    release: str | None
    version: int | None
    colour: str | None
    cluster: str | None
    upstream: str | None
    attempts: int | None
    protocol: str | None
    method: str | None
    path: str | None
    status: int
    """Of HTTP; 0 when there was no answer."""
    grpc_status: int | None
    flags: str
    """Envoy's response flags with commas between; `-` for none."""
    details: str | None
    bytes_received: int
    bytes_sent: int
    upstream_first_byte_ms: int | None
    """To the first byte from the slot."""
    first_byte_ms: int | None
    """To the first byte for the client."""
    duration_ms: int

    @property
    def slot(self) -> str | None:
        """`environment/model/version/colour` of an inference; None for everything else.

        It is the cluster's name without the protocol. Readiness, metadata and config are
        no inference.
        """
        if self.cluster is None or self.call is None or self.cluster.endswith(QUESTIONS):
            return None
        return f"{self.environment}/{self.model}/{self.version}/{self.colour}"

    @property
    def cancelled(self) -> bool:
        """Whether the client ended it."""
        return bool(self._flags & CLIENT_GONE)

    @property
    def overflowed(self) -> bool:
        """Whether it was turned away because too many waited for the slot."""
        return OVERFLOW in self._flags

    @property
    def failed(self) -> bool:
        """Whether slot or gateway failed it: no answer, 5xx, gRPC's like, or one cut short.

        Refusals (4xx) are the client's; what the client ended is not judged.
        """
        if self.cancelled:
            return False
        cut = self.status < 400 and bool(self._flags)
        return self.status >= 500 or self.grpc_status in FAILED_GRPC or cut

    @property
    def _flags(self) -> frozenset[str]:
        return frozenset(self.flags.split(",")) - {NO_FLAGS}


@dataclass(frozen=True, order=True)
class Position:
    """A place between two lines: number of the file, and bytes in it."""

    file: int
    offset: int


@dataclass(frozen=True)
class Reading:
    """What was read: the calls in the order of their end, and where to go on."""

    calls: tuple[Call, ...]
    position: Position
    damaged: int
    """Lines that cannot be read, such as the one that a killed Envoy did not finish."""


class AccessLog:
    """Reads the log while Envoy writes it and while it is rotated."""

    def __init__(self, file: Path) -> None:
        """
        Args:
            file: that Envoy writes; older ones are beside it.
        """
        self.file = file

    def start(self) -> Position:
        """The oldest place that is still kept."""
        return Position(min(self._older(), default=self._current()), 0)

    def end(self) -> Position:
        """The place after everything that Envoy wrote so far."""
        while True:
            current = self._current()
            content = _rest(self.file, 0) or b""
            if self._current() == current:
                return Position(current, content.rfind(b"\n") + 1)

    def read(self, since: Position) -> Reading:
        """The calls that ended since; a line that is half-written waits for the next time.

        Args:
            since: from `start`, `end` or an earlier `Reading`.

        Raises:
            GatewayError: lines between are gone, as the log was rotated too often or removed.
        """
        calls: list[Call] = []
        damaged = 0
        number, offset = since.file, since.offset
        while True:
            older = self._older()
            current = max(older, default=0) + 1
            if not min(older, default=current) <= number <= current:
                raise self._gap(since, f"files {min(older, default=current)} to {current}")
            file = older.get(number, self.file)
            content = _rest(file, offset)
            if number == current != self._current():
                continue  # it was set aside while it was read
            if content is None:
                raise self._gap(since, f"{file} gone, or shorter than that")
            complete = content.rfind(b"\n") + 1
            for line in content[:complete].splitlines():
                try:
                    calls.append(Call.model_validate_json(line))
                except ValidationError:
                    damaged += 1
            # Envoy writes into a file that was set aside until it has made the next one.
            if number == current or (number + 1 == current and not self.file.exists()):
                return Reading(tuple(calls), Position(number, offset + complete), damaged)
            damaged += complete < len(content)
            number, offset = number + 1, 0

    def rotate(self, reopen: Callable[[], None], largest_bytes: int, kept: int) -> bool:
        """Sets the file aside if it is larger than that, and removes the oldest.

        Only one process may do so.

        Args:
            reopen: makes Envoy open the file anew; `EnvoyAdmin.reopen_logs`.
            largest_bytes: of one file.
            kept: number of older files.

        Returns: whether it did.
        """
        if not self.file.exists():
            # Set aside earlier by a call that was cut off before Envoy knew.
            reopen()
            return False
        if self.file.stat().st_size <= largest_bytes:
            return False
        self.file.rename(self.file.with_name(f"{self.file.name}.{self._current()}"))
        reopen()
        older = self._older()
        for number in sorted(older)[:-kept]:
            older[number].unlink()
        return True

    def _older(self) -> dict[int, Path]:
        prefix = self.file.name + "."
        return {
            int(path.name.removeprefix(prefix)): path
            for path in self.file.parent.glob(prefix + "*")
            if path.name.removeprefix(prefix).isdecimal()
        }

    def _current(self) -> int:
        return max(self._older(), default=0) + 1

    def _gap(self, since: Position, found: str) -> GatewayError:
        return GatewayError(
            f"Lines of the access log {self.file} are gone",
            expected=f"byte {since.offset} of file {since.file}",
            found=found,
            cure="read on from `start`; what was between is lost to a comparison of versions",
        )


@dataclass(frozen=True)
class Summary:
    """How one slot did. Milliseconds; None where there are no calls to tell from.

    Times are those of calls that neither failed nor were cancelled: a quick refusal would
    make a broken version look fast.
    """

    release: str | None
    version: int | None
    requests: int
    """Inferences, whatever became of them."""
    failures: int
    """Those that failed (see `Call.failed`), overflows included; not errors inside a 200."""
    overflows: int
    refusals: int
    """Those answered with 4xx."""
    cancelled: int
    duration_p50_ms: float | None
    duration_p95_ms: float | None
    first_byte_p50_ms: float | None
    """To the client. For a stream this is the time to its first token."""
    first_byte_p95_ms: float | None


def summarize(calls: Iterable[Call], since: datetime, until: datetime) -> dict[str, Summary]:
    """How each slot did with the inferences that began in a time, pinned ones left out.

    Args:
        calls: in any order; see `AccessLog.read`.
        since: first moment that counts.
        until: first moment that does not count any more.

    Returns: by `Call.slot`; a slot without calls is absent.
    """
    by_slot: dict[str, list[Call]] = {}
    for call in calls:
        if call.slot is not None and not call.pinned and since <= call.time < until:
            by_slot.setdefault(call.slot, []).append(call)
    return {slot: _summary(found) for slot, found in by_slot.items()}


def _summary(calls: list[Call]) -> Summary:
    answered = [c for c in calls if c.status < 400 and not c.failed and not c.cancelled]
    duration_p50, duration_p95 = _quantiles(call.duration_ms for call in answered)
    first_p50, first_p95 = _quantiles(
        call.first_byte_ms for call in answered if call.first_byte_ms is not None
    )
    return Summary(
        release=calls[0].release,
        version=calls[0].version,
        requests=len(calls),
        failures=sum(call.failed for call in calls),
        overflows=sum(call.overflowed for call in calls),
        refusals=sum(400 <= call.status < 500 for call in calls),
        cancelled=sum(call.cancelled for call in calls),
        duration_p50_ms=duration_p50,
        duration_p95_ms=duration_p95,
        first_byte_p50_ms=first_p50,
        first_byte_p95_ms=first_p95,
    )


def _quantiles(values: Iterator[int]) -> tuple[float | None, float | None]:
    """p50 and p95, linear between neighbours (`statistics.quantiles`, inclusive)."""
    found = list(values)
    if not found:
        return None, None
    if len(found) == 1:
        return float(found[0]), float(found[0])
    cuts = statistics.quantiles(found, n=20, method="inclusive")
    return cuts[9], cuts[18]


def _rest(file: Path, offset: int) -> bytes | None:
    """What a file holds from a byte on; None when it does not reach that far."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(offset)
            return stream.read() if offset <= size else None
    except FileNotFoundError:
        # Envoy has yet to make it: at its first start, or in the middle of a rotation.
        return b"" if offset == 0 else None
