"""How far TensorRT-LLM's tools are, from what they print.

Their lines are read in `tensorrt_llm/_utils.py` (engines), ModelOpt's calibration as
`quantize_by_modelopt.py` drives it, and `convert_checkpoint.py`. None of them says how much
there is to do, so that is not in what is reported.
"""

from __future__ import annotations

import re

from llmops_assets.tools import Progress

CALIBRATING = re.compile(r"Calibrating batch (?P<batch>\d+)")
WRITING = re.compile(r"Serializing engine to \S*rank(?P<rank>\d+)\.engine")
STAGES = {
    "Starting quantization...": "quantising",
    "Quantization done.": "quantised",
    "Engine serialized.": "written",
    "Total time of converting checkpoints:": "converted",
    "Total time of building all engines:": "built",
}


def progress_of(line: str) -> Progress | None:
    """The stage that a line of output tells of, with its batch or rank; None for any other.

    Batches and ranks count from 0, as the tools do.
    """
    if match := CALIBRATING.search(line):
        return {"stage": "calibrating", "batch": int(match["batch"])}
    if match := WRITING.search(line):
        return {"stage": "writing", "rank": int(match["rank"])}
    return next(({"stage": stage} for text, stage in STAGES.items() if text in line), None)
