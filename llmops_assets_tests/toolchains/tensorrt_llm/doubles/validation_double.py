"""A double of our own validation: it writes what that writes, of an engine without a fault.

The real one needs the LLM API and weights that answer; `test_validation.py` runs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from llmops_assets.develop.data import read_data
from llmops_assets.develop.metrics import PREDICTION_COLUMNS, TIME_COLUMNS, measure
from llmops_assets.toolchains.tensorrt_llm.validation import (
    PREDICTIONS_FILE,
    VALIDATION_FILE,
    options_of,
)


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    data: Any = read_data(options.evaluation_data).to_pandas()
    table = data.assign(
        prediction=data["completion"], correct=True, loss=0.1, tokens=2, output_tokens=2,
        latency_seconds=0.01, time_to_first_token_seconds=0.005,
        inter_token_latency_seconds=0.005,
    )[[*PREDICTION_COLUMNS, *TIME_COLUMNS]]  # fmt: skip
    options.output.mkdir()
    pd.DataFrame(table).to_parquet(options.output / PREDICTIONS_FILE, index=False)
    found = {
        "backend": options.backend,
        "files": sorted(path.name for path in Path(options.engine).iterdir()),
        "prompts": len(table),
        "token_agreement": 1.0,
        "prompts_equal": len(table),
        "logit_distance": {"largest": 0.01, "mean": 0.001},
        "tokenizer_parity": {"prompts": len(table), "equal": len(table)},
        **measure(table).as_json(),
    }
    (options.output / VALIDATION_FILE).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
