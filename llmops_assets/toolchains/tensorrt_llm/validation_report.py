"""What the gates read of a validation, from the answers that `validation` wrote in the image."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmops_assets.develop import metrics
from llmops_assets.develop.directory import whole_directory
from llmops_assets.errors import ToolchainError
from llmops_assets.evidence.latency import RequestTimes

if TYPE_CHECKING:
    import pyarrow as pa

PREDICTIONS_FILE = "predictions.parquet"
VALIDATION_FILE = "validation.json"
NOT_MEASURED = math.inf
"""Loss where the engine gives no logits of prompts: worse than any bound, so that no gate on
it can pass."""

Seconds = Annotated[float, Field(ge=0)]


class Written(BaseModel):
    """Base of all parts of the answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Times(Written):
    """See `validation.Times`."""

    time_to_first_token: Seconds
    inter_token_latency: Seconds | None
    end_to_end: Seconds
    output_tokens: int


class Row(Written):
    """The answer to one row of the evaluation data; not every row is timed."""

    prediction: str
    loss: float | None
    tokens: int = Field(ge=1)
    times: Times | None


class Answers(Written):
    """What `validation.validate` writes."""

    tensorrt_llm: str
    agreement: dict[str, Any]
    tokenizer_parity: dict[str, int]
    rows: tuple[Row, ...]


def write_report(answers: Path, rows: pa.Table, backend: str, output: Path) -> dict[str, Any]:
    """Writes `predictions.parquet`, see `develop.metrics`, and `validation.json`.

    Args:
        answers: file that `validation` wrote.
        rows: the evaluation data, in the order they were asked in.
        backend: what was asked.
        output: directory to write; must not exist.

    Returns:
        What is in `validation.json`; a loss not measured is null.

    Raises:
        ToolchainError: the answers are not those of this data.
        ToolError: the output exists.
    """
    found = _read(answers, rows.num_rows)
    predictions = rows.to_pandas()
    texts = [row.prediction for row in found.rows]
    predictions["prediction"] = texts
    predictions["correct"] = [
        metrics.is_exact_match(text, completion)
        for text, completion in zip(texts, predictions["completion"], strict=True)
    ]
    predictions["loss"] = [NOT_MEASURED if row.loss is None else row.loss for row in found.rows]
    predictions["tokens"] = [row.tokens for row in found.rows]
    times = [row.times and RequestTimes(**row.times.model_dump()) for row in found.rows]
    predictions = metrics.with_times(predictions, times)
    predictions = predictions[[*metrics.PREDICTION_COLUMNS, *metrics.TIME_COLUMNS]]
    measured = metrics.measure(predictions).as_json()
    if measured["loss"] is None:
        # Perplexity is bounded, and the bound would look like a figure.
        measured["perplexity"] = None
    report = {
        "backend": backend,
        "tensorrt_llm": found.tensorrt_llm,
        **found.agreement,
        "tokenizer_parity": found.tokenizer_parity,
        **measured,
    }
    with whole_directory(output) as folder:
        predictions.to_parquet(folder / PREDICTIONS_FILE, index=False)
        (folder / VALIDATION_FILE).write_text(
            json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    return report


def _read(path: Path, rows: int) -> Answers:
    try:
        found = Answers.model_validate_json(path.read_bytes())
        if len(found.rows) != rows:
            raise ValueError(f"answers to {len(found.rows)} rows")
    except (OSError, ValidationError, ValueError) as error:
        raise ToolchainError(
            f"{path} does not hold the answers to the evaluation data",
            expected=f"answers to {rows} rows, as the validation in the image writes them",
            found=error,
            cure="look into the step's log for the cause, then materialize the asset again",
        ) from error
    return found
