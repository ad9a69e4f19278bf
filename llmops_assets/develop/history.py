"""The loss curve of a training, as people want to see it."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

HISTORY_FILE = "history.json"


def read_history(checkpoint: Path) -> list[tuple[int, float]]:
    """Optimiser steps and training loss that a trained checkpoint carries."""
    points = json.loads((checkpoint / HISTORY_FILE).read_text(encoding="utf-8"))
    return [(int(point["step"]), float(point["loss"])) for point in points]


def loss_curve(history: list[tuple[int, float]]) -> str:
    """Markdown with the curve as an inline PNG of some 10 kB; it lives in an event row."""
    # The object interface without pyplot: no global state, no display, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in history], [loss for _, loss in history], linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    encoded = base64.b64encode(image.getvalue()).decode()
    return f"![training loss](data:image/png;base64,{encoded})"
