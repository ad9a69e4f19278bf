"""A rollout as people want to see it: shares, errors and times of both releases."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import datetime

from llmops_assets.deploy.canary import Served, StepFigures
from llmops_assets.deploy.stop_rule import p95

POINTS = 40
"""Of a line, at most."""
COLOURS = {True: "#c2410c", False: "#1d4ed8"}


def rollout_chart(steps: Sequence[StepFigures], served: Sequence[Served]) -> str:
    """Markdown with an inline PNG of some 60 kB; it lives in an event row.

    Args:
        steps: one at least.
        served: requests of clients, in any order.
    """
    # The object interface without pyplot: no global state, no display, safe in threads.
    from matplotlib.figure import Figure

    since, until = steps[0].since, steps[-1].until
    figure = Figure(figsize=(7, 6), dpi=72, layout="constrained")
    weights, errors, times = figure.subplots(3, 1, sharex=True)
    at = [_seconds(since, step.since) for step in steps]
    weights.step(
        [*at, _seconds(since, until)],
        [*(step.candidate.weight for step in steps), steps[-1].candidate.weight],
        where="post",
        color=COLOURS[True],
    )
    weights.set_ylabel("candidate's share (%)")
    weights.set_ylim(0, 105)
    for candidate, name in ((False, "stable"), (True, "candidate")):
        bins = _bins([each for each in served if each.candidate is candidate], since, until)
        drawn = {"color": COLOURS[candidate], "label": name, "marker": ".", "linewidth": 1.2}
        errors.plot(
            list(bins),
            [
                100 * sum(not each.answered for each in found) / len(found)
                for found in bins.values()
            ],
            **drawn,
        )
        slowest = {
            place: found
            for place, calls in bins.items()
            if (found := p95(each.duration_ms for each in calls if each.answered)) is not None
        }
        times.plot(list(slowest), list(slowest.values()), **drawn)
    errors.set_ylabel("failed and refused (%)")
    times.set_ylabel("p95 of answers (ms)")
    times.set_xlabel(f"seconds since {since:%F %T} UTC")
    for axes in (weights, errors, times):
        axes.grid(alpha=0.3)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    encoded = base64.b64encode(image.getvalue()).decode()
    return f"![rollout](data:image/png;base64,{encoded})"


def _bins(served: Sequence[Served], since: datetime, until: datetime) -> dict[float, list[Served]]:
    """Requests by the middle of the interval that they began in, seconds since the start."""
    width = max(_seconds(since, until), 1.0) / POINTS
    found: dict[float, list[Served]] = {}
    for each in sorted(served, key=lambda each: each.time):
        place = int(_seconds(since, each.time) / width)
        found.setdefault((place + 0.5) * width, []).append(each)
    return found


def _seconds(since: datetime, time: datetime) -> float:
    return (time - since).total_seconds()
